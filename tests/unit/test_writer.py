"""Writing a store: one writer, folders of the user's, what a resume trusts, and what is read back."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from elmoe.convert import convert_checkpoint
from elmoe.errors import ConvertError
from elmoe.store import StoreWriter, open_store
from elmoe.store.ahead import STEP, WriteBack
from elmoe.store.journal import Journal
from elmoe.store.layout import store_bytes
from tests.checkpoints import random_weights, tiny_config, write_checkpoint
from tests.descriptors import open_below


class Stopped(Exception):
    pass


def content(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir()}


def stop_at(count: int):
    def progress(done: int, total: int) -> None:
        if done >= total - count:
            raise Stopped

    return progress


@pytest.fixture
def source(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "source", tiny_config())


@pytest.fixture
def stopped(source, tmp_path) -> Path:
    """The folder of a conversion that stopped in its last layer."""
    with pytest.raises(Stopped):
        convert_checkpoint(source, tmp_path / "store", stop_at(2))
    return tmp_path / "store.partial"


def whole(source: Path, tmp_path: Path) -> dict[str, bytes]:
    convert_checkpoint(source, tmp_path / "whole")
    return content(tmp_path / "whole")


def test_a_second_writer_is_refused_and_disturbs_nothing(source, tmp_path):
    other = write_checkpoint(tmp_path / "other", tiny_config(), random_weights(tiny_config(), 1))
    refused = []

    def progress(done: int, total: int) -> None:
        if not refused and done == total - 3:
            for one in (source, other):
                with pytest.raises(ConvertError, match="is being written by another conversion") as caught:
                    convert_checkpoint(one, tmp_path / "store")
                refused.append(caught.value.hint)

    convert_checkpoint(source, tmp_path / "store", progress)
    assert len(refused) == 2 and all(refused)
    assert content(tmp_path / "store") == whole(source, tmp_path)


def test_the_lock_goes_with_its_process(source, tmp_path):
    code = f"""
        import os, signal
        from elmoe.convert import convert_checkpoint
        stop = lambda done, total: os.kill(os.getpid(), signal.SIGSTOP)
        convert_checkpoint({str(source)!r}, {str(tmp_path / "store")!r}, stop)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    try:
        os.waitpid(process.pid, os.WUNTRACED)
        with pytest.raises(ConvertError, match="is being written"):
            convert_checkpoint(source, tmp_path / "store")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    convert_checkpoint(source, tmp_path / "store")
    assert content(tmp_path / "store") == whole(source, tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        {"journal.jsonl": '{"event": 1}\n', "notes.txt": "mine"},
        {"journal.jsonl": '{"event": 1}\n'},
        {"journal.jsonl": '{"fingerprint":"x"}\n', "notes.txt": "mine"},
        {"notes.txt": "mine"},
        {"manifest.json": "{}"},
        {"journal.jsonl/inner": "mine"},
    ],
)
def test_a_folder_of_the_users_is_refused_and_stays(source, tmp_path, files):
    folder = tmp_path / "store.partial"
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    with pytest.raises(ConvertError, match=r"store\.partial' exists, and no conversion made it"):
        convert_checkpoint(source, tmp_path / "store")
    assert {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()} == files


def test_a_partial_that_is_a_link_or_a_file_stays(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "store.partial").symlink_to(tmp_path / "mine")
    (tmp_path / "other.partial").write_text("mine")
    for name in ("store", "other"):
        with pytest.raises(ConvertError, match="is no folder"):
            convert_checkpoint(source, tmp_path / name)
    assert not list((tmp_path / "mine").iterdir()) and (tmp_path / "other.partial").read_text() == "mine"


@pytest.mark.parametrize("name", ["below/file/store", "a" * 300, "nul\0name"])
def test_a_target_that_cannot_be_written_is_told_before_work(source, tmp_path, name):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_text("")
    with pytest.raises(ConvertError):
        convert_checkpoint(source, tmp_path / name, lambda done, total: pytest.fail("work had begun"))


def damage(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "dense.bin").unlink(),
        lambda folder: (folder / "layer-000.experts").unlink(),
        lambda folder: os.truncate(folder / "layer-001.experts", 4096),
        lambda folder: os.truncate(folder / "dense.bin", 3),
        lambda folder: damage(folder / "dense.bin", 5000),
        lambda folder: damage(folder / "dense.bin", 0),
        lambda folder: damage(folder / "layer-000.experts", 4096 + 77),
        lambda folder: shutil.copy(folder / "layer-000.experts", folder / "layer-001.experts"),
    ],
)
def test_a_resume_redoes_what_is_not_as_it_was_written(source, tmp_path, stopped, change):
    change(stopped)
    convert_checkpoint(source, tmp_path / "store")
    assert content(tmp_path / "store") == whole(source, tmp_path)


@pytest.mark.parametrize("size", [0, 5, 40, 2000])
def test_a_journal_that_was_cut_off_is_resumed(source, tmp_path, stopped, size):
    os.truncate(stopped / "journal.jsonl", size)
    convert_checkpoint(source, tmp_path / "store")
    assert content(tmp_path / "store") == whole(source, tmp_path)


def test_a_hostile_journal_reads_and_removes_nothing_outside(source, tmp_path, stopped):
    (tmp_path / "secret").write_bytes(bytes(4096))
    lines = (stopped / "journal.jsonl").read_text().splitlines()
    dense = json.loads(lines[1])
    dense["file"]["name"] = "../secret"
    (stopped / "journal.jsonl").write_text("\n".join([lines[0], json.dumps(dense), "[" * 100_000]) + "\n")
    convert_checkpoint(source, tmp_path / "store")
    assert (tmp_path / "secret").exists() and content(tmp_path / "store") == whole(source, tmp_path)


@pytest.mark.parametrize("when", [3, 0])
def test_a_source_that_changes_during_its_conversion_is_refused(source, tmp_path, when):
    other = write_checkpoint(tmp_path / "other", tiny_config(), random_weights(tiny_config(), 1))

    def progress(done: int, total: int) -> None:
        if done == total - when:
            shutil.copy(other / "model.safetensors", source / "model.safetensors")

    # Or the reading of what comes next, which goes on meanwhile, meets a file that is shorter.
    with pytest.raises(ConvertError, match=r"has changed during the conversion|model\.safetensors' ends at byte"):
        convert_checkpoint(source, tmp_path / "store", progress)
    assert not (tmp_path / "store").exists()
    convert_checkpoint(source, tmp_path / "store")
    convert_checkpoint(other, tmp_path / "expected")
    left, right = content(tmp_path / "store"), content(tmp_path / "expected")
    assert left.pop("manifest.json") != right.pop("manifest.json") and left == right  # the manifests name their sources


def test_the_journal_outlives_the_rename(source, tmp_path, monkeypatch):
    """Killed before the rename the folder resumes, killed behind it the store is whole."""
    real = os.rename

    def refuse(*names: object) -> None:
        raise Stopped

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(Stopped):
        convert_checkpoint(source, tmp_path / "store")
    assert (tmp_path / "store.partial" / "journal.jsonl").exists()

    def rename(*names: str) -> None:
        real(*names)
        raise Stopped

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(Stopped):
        convert_checkpoint(source, tmp_path / "store")
    monkeypatch.setattr(os, "rename", real)
    with open_store(tmp_path / "store") as reader:
        reader.verify()


@pytest.mark.parametrize("tokenizer,template", [(b"{", None), (None, "{% if %}")])
def test_what_cannot_be_read_back_never_becomes_a_store(source, tmp_path, monkeypatch, tokenizer, template):
    real = StoreWriter.finish

    def finish(writer: StoreWriter, found: bytes, *texts: object) -> None:
        real(writer, tokenizer or found, template)

    monkeypatch.setattr(StoreWriter, "finish", finish)
    with pytest.raises(ConvertError, match="what was written"):
        convert_checkpoint(source, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_what_an_earlier_attempt_finished_is_kept_as_it_is(source, tmp_path, stopped):
    before = {path.name: path.stat().st_ino for path in stopped.iterdir() if path.name != "journal.jsonl"}
    marks = {name: (stopped / name).stat().st_mtime_ns for name in before}
    finished = json.loads("[" + ",".join((stopped / "journal.jsonl").read_text().splitlines()) + "]")
    names = {line["file"]["name"] for line in finished if line.get("file")}
    assert {"dense.bin", "layer-000.experts", "layer-001.experts"} <= names
    convert_checkpoint(source, tmp_path / "store")
    for name in names:
        found = (tmp_path / "store" / name).stat()
        assert (found.st_ino, found.st_mtime_ns) == (before[name], marks[name]), name


def test_a_conversion_that_finds_no_room_lets_go_of_its_target(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        with pytest.raises(ConvertError, match="more of disk") as kept:  # a traceback keeps the writer alive
            convert_checkpoint(source, tmp_path / "store")
        assert not (tmp_path / "store.partial").exists()
    convert_checkpoint(source, tmp_path / "store")
    assert kept.value.hint and (tmp_path / "store").is_dir()


def test_a_resume_that_finds_no_room_lets_go_of_what_is_there(source, stopped, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0))
        with pytest.raises(ConvertError, match="more of disk") as kept:  # a traceback keeps the writer alive
            convert_checkpoint(source, tmp_path / "store")
    assert stopped.is_dir() and open_below(tmp_path) == []
    convert_checkpoint(source, tmp_path / "store")
    assert content(tmp_path / "store") == whole(source, tmp_path) and kept.value.hint


@pytest.mark.parametrize("changes", [{}, {"num_experts": 12}, {"tie_word_embeddings": False, "mlp_only_layers": [1]}])
def test_the_room_that_is_asked_for_is_what_a_store_takes(tmp_path, changes):
    convert_checkpoint(write_checkpoint(tmp_path / "source", tiny_config(**changes)), tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        needed, taken = store_bytes(reader.spec, reader.formats), sum(file.bytes for file in reader.manifest.files)
    assert needed == taken


def test_what_is_written_is_put_on_the_disk_before_the_rename(source, tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        synced.append(os.readlink(f"/proc/self/fd/{number}"))
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    convert_checkpoint(source, tmp_path / "store")
    partial = str(tmp_path / "store.partial")
    names = ("", "/journal.jsonl", "/dense.bin", "/layer-002.experts", "/tokenizer.json", "/manifest.json")
    assert {partial + name for name in names} <= set(synced) and synced[-1] == str(tmp_path)
    assert open_below(tmp_path) == []


@pytest.mark.parametrize("begun", [False, True])
def test_a_target_that_another_conversion_finished_meanwhile_is_kept(source, tmp_path, monkeypatch, begun):
    """It appears between the look whether it is there and the lock; what an earlier run has begun stays."""
    if begun:
        with pytest.raises(Stopped):
            convert_checkpoint(source, tmp_path / "store", stop_at(2))
    lock = Journal._lock

    def late(journal):
        lock(journal)
        (tmp_path / "store").mkdir()

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "_lock", late)
        with pytest.raises(ConvertError, match="exists already") as kept:  # a traceback keeps the journal alive
            convert_checkpoint(source, tmp_path / "store")
    assert (tmp_path / "store.partial").exists() == begun and list((tmp_path / "store").iterdir()) == []
    assert open_below(tmp_path) == []
    (tmp_path / "store").rmdir()
    convert_checkpoint(source, tmp_path / "store")  # the lock is free
    assert content(tmp_path / "store") == whole(source, tmp_path) and kept.value.hint


def test_a_disk_that_fails_behind_the_last_byte_is_told(tmp_path, monkeypatch):
    def fail(handle):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fdatasync", fail)
    with open(tmp_path / "file", "wb") as handle:
        with pytest.raises(OSError, match="Input/output error"), WriteBack(handle.fileno()) as disk:
            disk.wrote(STEP)
        with pytest.raises(KeyError), WriteBack(handle.fileno()) as disk:  # an error that came first is not hidden
            disk.wrote(STEP)
            raise KeyError
