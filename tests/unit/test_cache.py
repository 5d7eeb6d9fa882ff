"""Models given as they are on disk: converted once, found again, converted anew where the source changed, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import ANY

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

import elmoe
from elmoe.cli.main import cli
from elmoe.convert import cache, convert_checkpoint, identity
from elmoe.convert.cache import Telling, stored
from elmoe.convert.gguf_export import export_store
from elmoe.errors import ConvertError, ElmoeError, NumericsError, StoreError
from elmoe.store import open_store, writer
from tests.checkpoints import tiny_config, write_checkpoint
from tests.unit.test_dense import LLAMA

MOE = tiny_config(hidden_size=64, moe_intermediate_size=32)


class Told:
    """What a conversion tells."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.formats: list[str] = []
        self.bars: dict[str, list[tuple[float, float]]] = {}

    @contextmanager
    def bar(self, description, total):
        seen = self.bars.setdefault(description, [])
        yield lambda done, all_=None: seen.append((done, all_ or total))

    def line(self, text):
        (self.formats if " -> " in text else self.lines).append(text)

    @property
    def telling(self) -> Telling:
        return Telling(self.line, self.bar)


def folder_of(config: dict, tmp_path: Path, name: str = "source") -> Path:
    return write_checkpoint(tmp_path / name, config)


def file_of(config: dict, tmp_path: Path, name: str = "model.gguf") -> Path:
    convert_checkpoint(folder_of(config, tmp_path, f"{name}-source"), tmp_path / f"{name}-store")
    with open_store(tmp_path / f"{name}-store") as reader:
        export_store(reader, tmp_path / name)
    return tmp_path / name


def contents(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir()}


@pytest.mark.parametrize("make,config", [(folder_of, MOE), (file_of, MOE), (folder_of, LLAMA), (file_of, LLAMA)])
def test_a_source_is_converted_once_and_found_again(tmp_path, make, config):
    source, told, formats = make(config, tmp_path), Told(), []
    path = Path(stored(source, tmp_path / "cache", told.telling))
    convert_checkpoint(source, tmp_path / "expected", told=formats.extend)
    assert told.formats == formats and all(" -> nested8: " in line for line in formats) and formats
    assert contents(path) == contents(tmp_path / "expected")
    (line,) = told.lines
    assert line.startswith(f"'{source.name}' is converted once: ") and "of disk in" in line and "seconds" in line
    for description in ("converting", "verifying"):
        done = [one for one, _ in told.bars[description]]
        assert done == sorted(done) and done[-1] <= told.bars[description][-1][1]
    assert told.bars["converting"][-1][0] == told.bars["converting"][-1][1]
    assert stored(str(source), tmp_path / "cache", told.telling) == path and len(told.lines) == 1
    os.symlink(source, tmp_path / "link.gguf")
    assert stored(tmp_path / "link.gguf", tmp_path / "cache", told.telling) == path or source.is_file()
    moved = shutil.move(source, tmp_path / f"moved-{source.name}") if source.is_dir() else source.rename(
        (tmp_path / "other").mkdir() or tmp_path / "other" / source.name
    )  # fmt: skip
    assert stored(moved, tmp_path / "cache", told.telling) == path and len(told.lines) == 1


def test_other_names_stay_as_they_are(tmp_path):
    for name in ("demo", str(tmp_path), str(tmp_path / "missing.gguf"), "no\0name"):
        assert stored(name, tmp_path / "cache") == name
    convert_checkpoint(folder_of(MOE, tmp_path), tmp_path / "store")
    shutil.copy(tmp_path / "source" / "config.json", tmp_path / "store" / "config.json")
    assert stored(tmp_path / "store", tmp_path / "cache") == tmp_path / "store"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("how", ["content", "size", "recipe", "gone"])
def test_a_source_that_changed_is_converted_anew_and_the_reason_is_told(tmp_path, monkeypatch, how):
    source, told = file_of(LLAMA, tmp_path), Told()
    path, stat = Path(stored(source, tmp_path / "cache", told.telling)), source.stat()
    first = contents(path)
    if how == "content":  # at one place, with size and time as before
        data = bytearray(source.read_bytes())
        data[len(data) // 2 + 2] ^= 1
        source.write_bytes(data)
        os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        expected = "'model.gguf' has changed ('model.gguf' has another content)"
    elif how == "size":
        with open(source, "ab") as file:
            file.write(bytes(32))
        expected = f"had {stat.st_size} bytes and has {stat.st_size + 32}"
    elif how == "recipe":
        monkeypatch.setattr(cache, "RECIPE", cache.RECIPE + 1)
        expected = "was converted by another version of elmoe"
    else:
        shutil.rmtree(path)
        expected = "goes on where it stopped"
    again = Path(stored(source, tmp_path / "cache", told.telling))
    assert (again == path) == (how == "gone") and len(told.lines) == 2 and expected in told.lines[1]
    assert (contents(again)["dense.bin"] == first["dense.bin"]) == (how != "content")
    assert stored(source, tmp_path / "cache", told.telling) == again and len(told.lines) == 2
    assert sorted(one.name for one in again.parent.iterdir()) == sorted([cache.ENTRY, again.name])  # nothing of before


def test_a_store_is_never_taken_for_that_of_another_source(tmp_path):
    """Whatever happens to the entry: the store's own name tells whose it is."""
    source, told = file_of(LLAMA, tmp_path), Told()
    path = Path(stored(source, tmp_path / "cache", told.telling))
    first, entry = contents(path), path.parent / cache.ENTRY
    for damage in ("", "{", "[]", '{"path": "x", "name": "../x", "identity": {}}'):
        entry.write_text(damage)
        assert stored(source, tmp_path / "cache", told.telling) == path and len(told.lines) == 1
    other = file_of(LLAMA | {"num_hidden_layers": 2}, tmp_path, "other.gguf")
    shutil.move(other, source)
    again = Path(stored(source, tmp_path / "cache", told.telling))
    assert again != path and contents(again)["dense.bin"] != first["dense.bin"]
    with open_store(again) as reader:
        assert len(reader.spec.layers) == 2


def test_a_store_that_lost_its_manifest_is_made_anew(tmp_path):
    source, told = file_of(LLAMA, tmp_path), Told()
    path = Path(stored(source, tmp_path / "cache", told.telling))
    before = contents(path)
    (path / "manifest.json").unlink()
    assert Path(stored(source, tmp_path / "cache", told.telling)) == path and contents(path) == before


def test_a_damaged_store_in_the_cache_is_named_with_what_mends_it(tmp_path):
    source = file_of(LLAMA, tmp_path)
    path = Path(stored(source, tmp_path / "cache", Told().telling))
    (path / "manifest.json").write_text("{")
    with pytest.raises(StoreError) as caught:
        elmoe.load(source, store_dir=tmp_path / "cache")
    assert "elmoe cache remove" in caught.value.hint and path.name in caught.value.hint
    (removed,) = cache.remove(path.name, tmp_path / "cache")
    assert removed.store == path
    with elmoe.load(source, store_dir=tmp_path / "cache") as model:
        assert model.generate([5], max_tokens=1).token_ids


@pytest.mark.parametrize(
    "name", ["entry.json.gguf", "m" * 240 + ".gguf", os.fsdecode(b"m\xff\xfe.gguf"), "ä b;c.gguf", "-x.gguf"]
)
def test_any_name_of_a_file(tmp_path, name):
    source, told = file_of(LLAMA, tmp_path), Told()
    source = source.rename(tmp_path / name)
    path = stored(source, tmp_path / "cache", told.telling)
    assert stored(source, tmp_path / "cache", told.telling) == path and len(told.lines) == 1
    (one,) = cache.entries(tmp_path / "cache")
    assert one.whole and cache.remove(str(source), tmp_path / "cache") == [one]


def test_pipes_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert stored(tmp_path / "pipe", tmp_path / "cache") == tmp_path / "pipe"  # no source: it is not opened
    folder = folder_of(LLAMA, tmp_path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(folder / "generation_config.json")
    with pytest.raises(ConvertError, match=r"generation_config\.json' is not a regular file"):
        stored(folder, tmp_path / "cache", Told().telling)


@pytest.mark.parametrize("identity", [5, [1, 2], "abc", {"a": 1}])
def test_an_entry_that_is_damaged_is_made_anew(tmp_path, identity):
    source, told = file_of(LLAMA, tmp_path), Told()
    store = Path(stored(source, tmp_path / "cache", told.telling))
    entry = json.loads((store.parent / cache.ENTRY).read_text())
    (store.parent / cache.ENTRY).write_text(json.dumps(entry | {"identity": {"model.gguf": identity}}))
    (store / "manifest.json").unlink()
    assert [one.entry.path for one in cache.entries(tmp_path / "cache")] == [cache.UNREADABLE]
    assert stored(source, tmp_path / "cache", told.telling) == store
    assert json.loads((store.parent / cache.ENTRY).read_text()) == entry | {"made": ANY}


def test_a_store_that_another_process_made_meanwhile_is_taken(tmp_path):
    source, told = file_of(LLAMA, tmp_path), Told()
    made = []

    def line(text: str) -> None:  # before this conversion begins
        if not made:
            made.append(Path(stored(source, tmp_path / "cache", told.telling)))
            made.append((made[0] / "manifest.json").stat().st_mtime_ns)

    assert [stored(source, tmp_path / "cache", Telling(line, told.bar))] == made[:1]
    assert (made[0] / "manifest.json").stat().st_mtime_ns == made[1], "it may be in use"


def test_everything_in_a_cache_can_be_removed(tmp_path):
    root = tmp_path / "cache"
    stored(file_of(LLAMA, tmp_path), root, Told().telling)
    (root / "damaged").mkdir()
    (root / "damaged" / cache.ENTRY).write_text("{")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / cache.ENTRY).write_text("{}")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    result = CliRunner().invoke(cli, ["cache", "remove", "--all", "--store-dir", str(root)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert [one.name for one in root.iterdir()] == ["link"] and (tmp_path / "elsewhere" / cache.ENTRY).exists()


def test_a_bad_source_leaves_the_store_of_the_good_one(tmp_path):
    source, told = file_of(LLAMA, tmp_path), Told()
    path = Path(stored(source, tmp_path / "cache", told.telling))
    good = source.read_bytes()
    source.write_bytes(good[:-100])
    with pytest.raises(ConvertError, match=r"lies outside 'model\.gguf'"):
        stored(source, tmp_path / "cache", told.telling)
    source.write_bytes(good)
    assert (path / "manifest.json").exists()


@pytest.mark.parametrize("config,after", [(MOE, 3), (LLAMA, 9)])
def test_a_killed_conversion_goes_on(tmp_path, config, after):
    source = file_of(config, tmp_path)
    code = f"""
        import os, signal
        from contextlib import contextmanager
        from elmoe.convert.cache import stored, Telling
        from elmoe.store import writer
        writer.SAFE_BYTES = 4096
        steps = []
        @contextmanager
        def bar(description, total):
            def step(done, all=None):
                steps.append(done)
                if done > 0.7 * total:
                    os.kill(os.getpid(), signal.SIGKILL)
            yield step
        stored({str(source)!r}, __import__("pathlib").Path({str(tmp_path / "cache")!r}), Telling(print, bar))
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (place,) = (tmp_path / "cache").iterdir()
    (partial,) = (one for one in place.iterdir() if one.is_dir())
    assert partial.suffix == ".partial" and not (place / partial.stem).exists()
    assert len((partial / "journal.jsonl").read_text().splitlines()) >= after
    told = Told()
    path = Path(stored(source, tmp_path / "cache", told.telling))
    assert "goes on where it stopped" in told.lines[0]
    convert_checkpoint(source, tmp_path / "expected")
    assert contents(path) == contents(tmp_path / "expected")


def test_what_is_noted_of_an_unfinished_file_is_not_computed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SAFE_BYTES", 4096)
    source, asked = folder_of(LLAMA, tmp_path), []

    class Stopped(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > 0.6 * total:
            raise Stopped

    from elmoe.convert.convert import convert_source
    from elmoe.convert.source import CheckpointSource, open_source

    with pytest.raises(Stopped):
        convert_source(open_source(source), tmp_path / "store", written=stop)
    real = CheckpointSource.matrix

    def matrix(self, tensor, *rows):
        asked.append(tensor.name)
        return real(self, tensor, *rows)

    monkeypatch.setattr(CheckpointSource, "matrix", matrix)
    partial = tmp_path / "store.partial" / "dense.bin"
    data = bytearray(partial.read_bytes())
    data[4096 + 10] ^= 1  # of the embedding: its note no longer holds, and it is written anew
    partial.write_bytes(data)
    convert_source(open_source(source), tmp_path / "store")
    assert "embedding" in asked and "layers.1.attention_output" not in asked
    convert_checkpoint(source, tmp_path / "expected")
    assert contents(tmp_path / "store") == contents(tmp_path / "expected")


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    source = file_of(LLAMA, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConvertError, match="cannot write the cache") as caught:
        stored(source, tmp_path / "file" / "cache", Told().telling)
    assert "--store-dir" in caught.value.hint
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(ConvertError, match=" more of disk, 10 B are free") as caught:
        stored(source, tmp_path / "cache", Told().telling)
    assert "--store-dir" in caught.value.hint


def split(config: dict, tmp_path: Path, name: str = "m", **changes: int) -> Path:
    """A file of two parts, as llama.cpp's gguf-split writes them."""
    whole = gguf.GGUFReader(file_of(config, tmp_path, f"{name}-whole.gguf"))
    tensors = list(whole.tensors)
    for index, part in enumerate((tensors[:3], tensors[3:])):
        out = gguf.GGUFWriter(tmp_path / f"{name}-0000{index + 1}-of-00002.gguf", config["model_type"])
        if index == 0:
            for field in whole.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    value = field.contents()
                    kind = field.types[0]
                    out.add_key_value(field.name, value, kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
        out.add_uint16("split.no", index + changes.get("no", 0))
        out.add_uint16("split.count", 2)
        out.add_int32("split.tensors.count", len(tensors) + changes.get("tensors", 0) * index)
        for one in part:
            out.add_tensor(one.name, one.data, raw_dtype=one.tensor_type)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()
    return tmp_path / f"{name}-00001-of-00002.gguf"


def test_split_files(tmp_path):
    first, told = split(LLAMA, tmp_path), Told()
    path = Path(stored(first, tmp_path / "cache", told.telling))
    assert contents(path)["dense.bin"] == contents(tmp_path / "m-whole.gguf-store")["dense.bin"]
    second = tmp_path / "m-00002-of-00002.gguf"
    with pytest.raises(ConvertError, match="not the first part"):
        stored(second, tmp_path / "cache", told.telling)
    data = second.read_bytes()
    second.write_bytes(data[:-64] + bytes(64))
    assert Path(stored(first, tmp_path / "cache", told.telling)) != path
    assert "'m-00002-of-00002.gguf' has another content" in told.lines[1]
    second.unlink()
    with pytest.raises(ConvertError, match=r"'m-00002-of-00002\.gguf' is missing"):
        stored(first, tmp_path / "cache", told.telling)
    other = split(LLAMA | {"num_hidden_layers": 2}, tmp_path, "o")
    shutil.copy(other.with_name("o-00002-of-00002.gguf"), second)
    with pytest.raises(ConvertError, match=r"'m-0000\d-of-00002\.gguf' does not belong to 'm-00001-of-00002\.gguf'"):
        stored(first, tmp_path / "cache", told.telling)


@pytest.mark.parametrize("change,key", [({"no": 1}, "split.no"), ({"tensors": 1}, "split.tensors.count")])
def test_parts_that_do_not_belong_together(tmp_path, change, key):
    with pytest.raises(ConvertError, match=rf"does not belong to .*its '{key}'"):
        stored(split(LLAMA, tmp_path, **change), tmp_path / "cache", Told().telling)


def test_damaged_files_are_named_and_leave_nothing(tmp_path):
    good = file_of(LLAMA, tmp_path).read_bytes()
    cases = {
        "is big-endian": good[:4] + good[4:8][::-1] + good[8:],
        "has GGUF version 9": good[:4] + b"\x09\0\0\0" + good[8:],
        r"ends before|lies outside": good[:3000],
        "architecture 'falcon' is not supported": good.replace(b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama",
                                                               b"general.architecture\x08\0\0\0\x06\0\0\0\0\0\0\0falcon"),
    }  # fmt: skip
    for index, (message, data) in enumerate(cases.items()):
        path = tmp_path / f"{index}.gguf"
        path.write_bytes(data)
        with pytest.raises(ElmoeError, match=message) as caught:
            stored(path, tmp_path / "cache", Told().telling)
        assert caught.value.hint
    folder = folder_of(LLAMA, tmp_path)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(NumericsError, match="NaN"):
        stored(folder, tmp_path / "cache", Told().telling)
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "cache").rmdir()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConvertError, match=r"tokenizer\.json"):
        stored(folder, tmp_path / "cache", Told().telling)
    assert not (tmp_path / "cache").exists()


def test_python_and_the_command_line_take_files(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    source = file_of(LLAMA, tmp_path)
    with elmoe.load(str(source)) as model:
        text = model.generate([5, 6, 7], max_tokens=4).token_ids
    assert (tmp_path / "home" / "elmoe" / "stores").is_dir()
    assert "is converted once" in capfd.readouterr().err
    with elmoe.load(source, store_dir=tmp_path / "other") as model:
        assert model.generate([5, 6, 7], max_tokens=4).token_ids == text
    run = CliRunner()

    def call(*words: str) -> dict:
        result = run.invoke(cli, [*words, "--json"], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert call("inspect", str(source), "--verify")["path"].startswith("model-")
    assert call("export", str(source), str(tmp_path / "again.gguf"))["bytes"] > 0
    row = call("cache", "list")["rows"][0]
    assert row["source"] == str(source) and row["whole"] and row["bytes"] > 100_000
    with pytest.raises(ConvertError, match="the cache has no 'nothing'"):
        call("cache", "remove", "nothing")
    assert call("cache", "remove", "model.gguf")["removed"] == [str(source)]
    assert call("cache", "list")["rows"] == []
    assert "stores: 0 models; a GGUF file" in run.invoke(cli, ["cache", "list"]).stdout
    assert len(call("cache", "list", "--store-dir", str(tmp_path / "other"))["rows"]) == 1
    assert len(call("cache", "remove", "--all", "--store-dir", str(tmp_path / "other"))["removed"]) == 1


def test_an_identity_sees_every_file_and_its_ends(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "m.gguf"
    for size in (0, 3, 4096, 5000, 1 << 20):
        data = bytearray(rng.bytes(size))
        path.write_bytes(data)
        before, times = identity.identity(path), path.stat().st_mtime_ns
        for at in {0, size // 2, size - 1} if size else ():
            changed = bytearray(data)
            changed[at] ^= 255
            path.write_bytes(changed)
            os.utime(path, ns=(times, times))
            assert identity.identity(path) != before and "another content" in identity.difference(
                before, identity.identity(path)
            )
