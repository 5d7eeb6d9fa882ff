"""Opening stores: damaged, foreign, hostile and future ones are refused with the file and the field."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from elmoe import bitslice
from elmoe.convert import convert_checkpoint
from elmoe.convert.losses import FormatChoice
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import StoreError
from elmoe.models import spec_of_config
from elmoe.store import open_direct, open_store
from elmoe.store.reader import MANIFEST_LIMIT
from elmoe.store.synthetic import synthesize
from tests.checkpoints import tiny_config, write_checkpoint


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    convert_checkpoint(write_checkpoint(folder / "source", tiny_config(mlp_only_layers=[1])), folder / "store")
    return folder / "store"


@pytest.fixture
def store(original, tmp_path) -> Path:
    return shutil.copytree(original, tmp_path / "store")


def edit(store: Path, change) -> None:
    manifest = json.loads((store / "manifest.json").read_text())
    change(manifest)
    (store / "manifest.json").write_text(json.dumps(manifest))


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as handle:
        handle.seek(offset)
        handle.write(data)


def shift_experts(store: Path) -> None:
    """Experts that fill their file, but do not begin on a page."""
    lengthen(store, 1, 64)
    edit(store, lambda manifest: manifest["layers"][0].update(offset=4160))


def tensor(manifest: dict, name: str) -> dict:
    return next(entry for entry in manifest["tensors"] if entry["name"] == name)


def test_an_intact_store_verifies(store):
    with open_store(store) as reader:
        seen: list[float] = []
        reader.verify(seen.append)
        assert seen == sorted(seen) and seen[-1] > 0


def ffn(manifest: dict, layer: int) -> dict:
    return manifest["model"]["layers"][layer]["feed_forward"]


def lengthen(store: Path, index: int, more: int = 4096) -> None:
    """Bytes of nothing at the end of a data file, which the manifest knows of."""

    def change(manifest: dict) -> None:
        file = manifest["files"][index]
        os.truncate(store / file["name"], file["bytes"] + more)
        file["bytes"] += more

    edit(store, change)


@pytest.mark.parametrize(
    "damage,message",
    [
        (lambda s: overwrite(s / "dense.bin", 0, b"NOTASTOR"), "dense.bin.*magic"),
        (lambda s: overwrite(s / "layer-000.experts", 8, b"\x09"), "layer-000.experts.*version 9"),
        (lambda s: overwrite(s / "layer-000.experts", 16, b"\x02"), "another role or layer"),
        (lambda s: os.truncate(s / "layer-002.experts", 8192), "layer-002.experts.*8192 bytes"),
        (lambda s: os.truncate(s / "layer-002.experts", 1 << 20), "layer-002.experts.*1048576 bytes"),
        (lambda s: (s / "layer-002.experts").unlink(), "layer-002.experts"),
        (lambda s: (s / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda s: (s / "manifest.json").unlink(), "manifest.json"),
        (lambda s: (s / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (lambda s: (s / "manifest.json").write_bytes(b"\xff\xfe"), "manifest.json is not JSON"),
        (lambda s: edit(s, lambda m: m.update(format="zip")), "'format'"),
        (lambda s: edit(s, lambda m: m.update(version=3)), "newer elmoe"),
        (lambda s: edit(s, lambda m: m.update(version=1)), "older elmoe"),
        (lambda s: edit(s, lambda m: m.update(version=None)), "older elmoe"),
        (lambda s: edit(s, lambda m: m.update(extra=1)), "extra"),
        (lambda s: edit(s, lambda m: m["model"].update(hidden="x")), "model.hidden"),
        (lambda s: edit(s, lambda m: m["model"].update(hidden=-5)), "model.hidden"),
        (lambda s: edit(s, lambda m: ffn(m, 0)["router"].update(top_k=99)), "top_k"),
        (
            lambda s: edit(s, lambda m: m["model"]["layers"].append(m["model"]["layers"][0])),
            "lacks 'layers.3.attention_norm'",
        ),
        (lambda s: edit(s, lambda m: ffn(m, 0).update(width=400)), "layers.0.offset"),
        (lambda s: edit(s, lambda m: m["layers"][0].update(offset=2**40)), r"layers.0.offset"),
        (lambda s: edit(s, lambda m: m["layers"][0].update(offset=100)), r"layers.0.offset"),
        (lambda s: edit(s, lambda m: m["layers"][0].update(checksums=[])), r"checksums"),
        (lambda s: edit(s, lambda m: m["layers"][0].update(file="../manifest.json")), "plain file name|lacks|belongs"),
        (lambda s: edit(s, lambda m: m["files"][0].update(name="/etc/passwd")), "plain file name"),
        (lambda s: edit(s, lambda m: m["tokenizer"].update(name="../../x")), "plain file name"),
        (lambda s: edit(s, lambda m: m["files"].pop()), "'files' lacks"),
        (lambda s: edit(s, lambda m: tensor(m, "embedding")["offsets"].update(lo=2**50)), r"tensors.embedding.offsets.lo"),
        (lambda s: edit(s, lambda m: tensor(m, "embedding")["offsets"].update(lo=-64)), r"tensors.embedding.offsets.lo"),
        (lambda s: edit(s, lambda m: tensor(m, "embedding")["offsets"].pop("lo")), r"tensors.embedding.offsets"),
        (lambda s: edit(s, lambda m: m["model"].update(vocabulary=2**24)), r"tensors.embedding.offsets"),
        (lambda s: edit(s, lambda m: m["model"].update(vocabulary=2**31)), r"model.vocabulary"),
        (lambda s: edit(s, lambda m: m["model"]["layers"][0]["attention"].update(heads=268435460)), r"attention.heads"),
        (lambda s: edit(s, lambda m: m["model"]["layers"][0]["attention"].update(head_dim=268435472)), r"head_dim"),
        (lambda s: edit(s, lambda m: m["model"]["layers"][2]["attention"].update(heads=2)), r"differ in attention"),
        (lambda s: edit(s, lambda m: ffn(m, 1).update(width=99999)), r"tensors.layers.1.dense_ffn.offsets"),
        (lambda s: edit(s, lambda m: m["model"].update(layers=[])), r"0 layers"),
        (lambda s: edit(s, lambda m: m["tensors"].append(m["tensors"][0])), r"'tensors' lists twice 'embedding'"),
        (lambda s: edit(s, lambda m: m["tensors"].append(m["tensors"][0] | {"name": "extra"})), r"unknown 'extra'"),
        (lambda s: edit(s, lambda m: tensor(m, "embedding").update(format="float32")), r"embedding.format is 'float32'"),
        (lambda s: edit(s, lambda m: tensor(m, "embedding").update(format="q2")), r"embedding.format is 'q2'"),
        (lambda s: edit(s, lambda m: m["layers"][0].update(format="float32")), r"layers.0.format"),
        (lambda s: edit(s, lambda m: m["layers"][0].update(format="q2")), r"layers.0.format is 'q2'"),
        (lambda s: edit(s, lambda m: m["layers"].pop()), r"'layers' lacks '2'"),
        (lambda s: edit(s, lambda m: m["layers"].append(m["layers"][0])), r"'layers' lists twice '0'"),
        (lambda s: edit(s, lambda m: m["layers"][0].update(layer=7)), r"'layers' lacks '0'"),
        (lambda s: edit(s, lambda m: m["files"].append(m["files"][0])), r"'files' lists twice 'dense.bin'"),
        (lambda s: (s / "manifest.json").write_text("[" * 100000), "manifest.json is not JSON"),
        (lambda s: edit(s, lambda m: m["model"].update(hidden=32)), r"tensors.embedding.offsets.lo.*gap or an overlap"),
        (lambda s: edit(s, lambda m: m["model"].update(vocabulary=284)), r"tensors.embedding.offsets.lo.*gap"),
        (lambda s: edit(s, lambda m: tensor(m, "embedding")["offsets"].update(lo=4096)), r"embedding.offsets.lo.*overlap"),
        (lambda s: edit(s, lambda m: ffn(m, 1).update(width=8)), r"layers.1.dense_ffn.offsets.lsb.*gap|tensors fill"),
        (
            lambda s: edit(s, lambda m: ffn(m, 0).update(width=1)),
            r"layers.0: .*end at byte \d+ of \d+ of 'layer-000.experts'",
        ),
        (lambda s: lengthen(s, 0), r"tensors fill \d+ of \d+ bytes of dense.bin"),
        (shift_experts, r"layers.0.offset = 4160"),
        (lambda s: lengthen(s, 1), r"layers.0: .* end at byte \d+ of \d+ of 'layer-000.experts'"),
        (lambda s: edit(s, lambda m: m["tensors"].remove(tensor(m, "final_norm"))), r"lacks 'final_norm'"),
    ],
)
def test_damage_is_named(store, damage, message):
    damage(store)
    with pytest.raises(StoreError, match=message):
        open_store(store)


def forget_shapes(store: Path) -> None:
    """As stores of before the files knew the shapes of their tensors."""
    for path in (store / "dense.bin", *store.glob("*.experts")):
        overwrite(path, 20, bytes(8))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["model"].update(vocabulary=299),
        lambda m: m["model"].update(vocabulary=304),
        lambda m: m["model"].update(hidden=47),
        lambda m: ffn(m, 0).update(width=39),
        lambda m: ffn(m, 1).update(width=63),
    ],
    ids=["vocabulary of the same blocks", "larger", "norms of the same pages", "experts", "dense"],
)
def test_a_size_that_leaves_no_trace_in_sizes_of_files_is_found(store, change):
    edit(store, change)
    with pytest.raises(StoreError, match=r"'dense\.bin' holds tensors of other shapes than those of the model"):
        open_store(store)
    with pytest.raises(StoreError, match="other shapes"):
        open_direct(store)


def test_files_of_two_stores_are_no_store(store, tmp_path):
    other = write_checkpoint(tmp_path / "source", tiny_config(mlp_only_layers=[1], moe_intermediate_size=37))
    convert_checkpoint(other, tmp_path / "other")
    shutil.copy(tmp_path / "other" / "layer-002.experts", store / "layer-002.experts")
    with pytest.raises(StoreError, match=r"'layer-002\.experts' holds tensors of other shapes"):
        open_store(store)


def test_older_stores_open_and_values_behind_the_end_of_a_tensor_are_found(store):
    forget_shapes(store)
    with open_store(store) as reader, open_direct(store):
        reader.verify()
    for change, name in (
        (lambda m: m["model"].update(vocabulary=299), "embedding"),
        (lambda m: m["model"].update(hidden=47), "final_norm"),
    ):
        original = (store / "manifest.json").read_text()
        edit(store, change)
        for opener in (open_store, open_direct):
            with pytest.raises(StoreError, match=r"is larger in dense\.bin than the model says") as caught:
                opener(store)
            assert name in str(caught.value) or "norm" in str(caught.value)
        (store / "manifest.json").write_text(original)


@pytest.mark.parametrize("name", ["planes6", "affine4_k", "table4_mx", "experts=table4_nl"])
def test_older_stores_of_other_formats_open(tmp_path, name):
    source = write_checkpoint(tmp_path / "source", tiny_config(mlp_only_layers=[1]))
    convert_checkpoint(source, tmp_path / "store", choice=FormatChoice.parse([name]))
    forget_shapes(tmp_path / "store")
    with open_store(tmp_path / "store") as reader, open_direct(tmp_path / "store"):
        reader.verify()


def test_a_tensor_that_the_model_lacks_is_named(store):
    with open_store(store) as reader:
        for ask, name in ((reader.array, "embedding"), (reader.matrix, "final_norm"), (reader.matrix, "head")):
            with pytest.raises(StoreError, match=name):
                ask(name)


@pytest.mark.parametrize(
    "file,offset,message",
    [
        ("layer-002.experts", 4096, "layer-002.experts: expert 0, MSB slice"),
        ("layer-000.experts", -1, "layer-000.experts: expert 5, LSB slice"),
        ("tokenizer.json", 0, "tokenizer.json"),
    ],
)
def test_checksums_find_a_flipped_byte(store, file, offset, message):
    path = store / file
    offset = offset if offset >= 0 else path.stat().st_size + offset
    byte = path.read_bytes()[offset]
    overwrite(path, offset, bytes([byte ^ 1]))
    with open_store(store) as reader, pytest.raises(StoreError, match=message):
        reader.verify()


def test_checksums_find_every_tensor(store):
    with open_store(store) as reader:
        sections = [(entry.name, offset) for entry in reader.manifest.tensors for offset in entry.offsets.values()]
    for name, offset in sections[::5]:
        byte = (store / "dense.bin").read_bytes()[offset]
        overwrite(store / "dense.bin", offset, bytes([byte ^ 0x80]))
        with open_store(store) as reader, pytest.raises(StoreError, match=name):
            reader.verify()
        overwrite(store / "dense.bin", offset, bytes([byte]))


def test_views_are_read_only(store):
    with open_store(store) as reader:
        with pytest.raises(ValueError, match="read-only"):
            reader.array("final_norm")[0] = 1
        with pytest.raises(ValueError, match="read-only"):
            reader.matrix("embedding").hi[0, 0, 0] = 1


def test_no_store():
    with pytest.raises(StoreError, match="there is no file or folder"):
        open_store("does/not/exist")


def test_synthetic_stores_are_deterministic(tmp_path):
    spec = spec_of_config(tiny_config(tie_word_embeddings=False, mlp_only_layers=[0]))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthesize(tmp_path / name, spec, seed)
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in "abc"]
    assert files[0] == files[1] and files[0]["layer-001.experts"] != files[2]["layer-001.experts"]
    tokens = json.loads(files[0]["tokenizer.json"])["model"]["vocab"]
    bytes_ = sorted(tokens, key=tokens.get)[:256]
    assert bytes_ == sorted(bytes_)  # whatever order the alphabet comes in, which changes from process to process
    with open_store(tmp_path / "a") as reader:
        reader.verify()
        values = reader.matrix("head").dequantize()
        assert 0.5 < np.std(values) * np.sqrt(spec.hidden) < 2


def test_a_closed_store_is_named(store):
    reader = open_store(store)
    engine = Engine(reader, bitslice, EngineOptions(mode="plain"))
    reader.close()
    with pytest.raises(StoreError, match="closed"):
        engine.generate([Request((1, 2), 2)])


def test_a_manifest_without_end_is_not_read(tmp_path):
    (tmp_path / "manifest.json").write_bytes(b"{}")
    os.truncate(tmp_path / "manifest.json", MANIFEST_LIMIT + 1)
    with pytest.raises(StoreError, match=f"has more than {MANIFEST_LIMIT} bytes") as caught:
        open_store(tmp_path)
    assert caught.value.hint
