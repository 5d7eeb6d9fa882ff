"""What a GGUF file may not hold, and what it cannot say: refused by name."""

from __future__ import annotations

import os
import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as TensorType
from tokenizers import Tokenizer, pre_tokenizers

from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_file import GgufFile
from elmoe.errors import ConvertError, ElmoeError
from tests.checkpoints import write_checkpoint
from tests.gguf_files import export, random_parts, values, wide_config, write_gguf

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"architecture": "falcon"}, "architecture 'falcon'"),
        ({"pre": "kimi-k2"}, "tokenizer.ggml.pre.*kimi-k2"),
        ({"model": "t5"}, "tokenizer.ggml.model.*t5"),
        ({"eos": 300}, "end is 300"),
        ({"merges": None}, r"'tokenizer\.ggml\.merges' is missing"),
        ({"merges": ["a"]}, r"'tokenizer\.ggml\.merges' has 'a', not two tokens"),
        ({"merges": 7}, r"'tokenizer\.ggml\.merges' is not a list of texts"),
        ({"metadata": {"rope.freq_base": 0.0}}, r"qwen3moe\.rope\.freq_base"),
        ({"metadata": {"expert_used_count": 7}}, r"qwen3moe\.expert_used_count"),
        ({"metadata": {"expert_shared_count": 1}}, "expert_shared_count"),
        ({"metadata": {"attention.value_length": 32}}, "value_length"),
        ({"metadata": {"final_logit_softcapping": 30.0}}, r"qwen3moe\.final_logit_softcapping' is 30\.0"),
        ({"metadata": {"expert_group_count": 2}}, r"qwen3moe\.expert_group_count' is 2"),
        ({"metadata": {"logit_scale": 8.0}}, r"qwen3moe\.logit_scale' is 8\.0"),
        ({"metadata": {"block_count": 4_000_000_000}}, "block_count"),
        ({"metadata": {"block_count": 4}}, r"blk\.3\."),
        ({"metadata": {"embedding_length": 96}}, "token_embd.weight.*shape"),
    ],
)
def test_unsupported_files_are_named(tmp_path, changes, message):
    path = write_gguf(tmp_path / "model.gguf", random_parts(), **changes)
    with pytest.raises(ConvertError, match=message) as error:
        convert_checkpoint(path, tmp_path / "store")
    assert error.value.hint
    assert not list(tmp_path.glob("store*"))


def test_tensors_lie_one_behind_the_other_and_no_key_is_there_twice(tmp_path):
    """As llama.cpp wants them; a type or an offset that was changed would give other weights."""
    good = write_gguf(tmp_path / "good.gguf", random_parts()).read_bytes()
    name = b"blk.1.attn_norm.weight"
    place = good.index(name) + len(name) + 4 + 8  # one dimension
    kind, offset = struct.unpack_from("<IQ", good, place)
    cases = {
        f"{name.decode()}.* begins at byte {offset + 1} of the data, expected is {offset}": (kind, offset + 1),
        f"{name.decode()}.* begins at byte 0 of the data": (kind, 0),
        "begins at byte .* of the data, expected is": (TensorType.F16, offset),
    }
    for index, (message, change) in enumerate(cases.items()):
        path = tmp_path / f"{index}.gguf"
        path.write_bytes(good[:place] + struct.pack("<IQ", *change) + good[place + 12 :])
        with pytest.raises(ConvertError, match=message) as error:
            GgufFile(path)
        assert error.value.hint
    values = struct.unpack_from("<Q", good, 16)[0]
    first = good[24 : 24 + 8 + len("general.architecture") + 4 + 8 + len("qwen3moe")]
    twice = tmp_path / "twice.gguf"
    twice.write_bytes(good[:16] + struct.pack("<Q", values + 1) + first + good[24:])
    with pytest.raises(ConvertError, match=r"metadata 'general\.architecture' is in 'twice\.gguf' twice"):
        GgufFile(twice)


def test_tensors_are_checked(tmp_path):
    name = "blk.1.ffn_up_exps.weight"
    good = random_parts()
    nan = good[name][1].copy()
    nan[2, 5, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    cases = {
        "is missing": None,
        "is I32": (TensorType.I32, np.zeros((6, 32, 64), np.int32)),
        "is Q8_1": (TensorType.Q8_1, np.zeros((6, 32, 80), np.uint8)),
        "has shape": (TensorType.F32, np.zeros((6, 32, 32), np.float32)),
        "NaN": (TensorType.Q8_0, nan),
    }
    for index, (message, change) in enumerate(cases.items()):
        parts = good | ({} if change is None else {name: change})
        if change is None:
            del parts[name]
        with pytest.raises(ElmoeError, match=f"{name}.*{message}"):
            convert_checkpoint(write_gguf(tmp_path / f"{index}.gguf", parts), tmp_path / "store")
        assert not (tmp_path / "store").exists()
    router = good | {"blk.0.ffn_gate_inp.weight": values(np.random.default_rng(0), (6, 64), TensorType.Q8_0)}
    with pytest.raises(ConvertError, match=r"ffn_gate_inp.weight' is Q8_0"):
        convert_checkpoint(write_gguf(tmp_path / "router.gguf", router), tmp_path / "store")


def test_a_truncated_file_is_named_wherever_it_ends(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_parts())
    whole = path.read_bytes()
    for size in [*range(0, 200, 7), *np.linspace(200, len(whole) - 1, 60).astype(int).tolist()]:
        os.truncate(path, size)
        with pytest.raises(ConvertError, match=r"model\.gguf"):
            convert_checkpoint(path, tmp_path / "store")
        path.write_bytes(whole)
    assert not list(tmp_path.glob("store*"))


def test_a_hostile_header_is_refused(tmp_path):
    """Absurd counts and lengths allocate nothing; random damage raises our errors, or does no harm."""
    path = write_gguf(tmp_path / "model.gguf", random_parts())
    whole = path.read_bytes()
    array = struct.pack("<Q", 1) + b"a" + struct.pack("<IIQ", 9, 0, 1 << 40)
    for raw in (
        b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60) + bytes(100),
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(100),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array + bytes(100),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 1) + bytes(100),
    ):
        path.write_bytes(raw)
        with pytest.raises(ConvertError, match=r"model\.gguf"):
            GgufFile(path)
    rng = np.random.default_rng(0)
    for _ in range(150):
        raw = bytearray(whole)
        for at in rng.integers(0, 12_000, 3):
            raw[at] = rng.integers(256)
        path.write_bytes(raw)
        try:
            convert_checkpoint(path, tmp_path / "store")
        except ElmoeError:
            assert not (tmp_path / "store").exists()
        else:
            (tmp_path / "store").rename(tmp_path / f"store{rng.integers(1 << 60)}")


def test_what_gguf_cannot_say_is_refused(tmp_path):
    cases: list[tuple[dict, str]] = [
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"hidden_size": 48}, r"token_embd.weight.*48 columns"),
        ({"moe_intermediate_size": 40}, r"ffn_down_exps.*40 columns"),
        ({"rope_scaling": YARN | {"truncate": False}}, "the rope scaling 'yarn' with 'truncate' false cannot"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention factor of 2 cannot"),
    ]
    for index, (changes, message) in enumerate(cases):
        store = tmp_path / f"store{index}"
        convert_checkpoint(write_checkpoint(tmp_path / f"source{index}", wide_config(**changes)), store)
        with pytest.raises(ConvertError, match=message):
            export(store, tmp_path / "out.gguf")
    good = tmp_path / "good"
    convert_checkpoint(write_checkpoint(tmp_path / "source", wide_config()), good)
    tokenizer = Tokenizer.from_file(str(good / "tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(good / "tokenizer.json"))
    with pytest.raises(ConvertError, match="pre-tokenizer"):
        export(good, tmp_path / "out.gguf")
    assert not list(tmp_path.glob("out*"))


def test_an_existing_file_and_a_full_disk(tmp_path, monkeypatch):
    import shutil

    (tmp_path / "old.gguf").write_bytes(b"")
    with pytest.raises(ConvertError, match=r"old.gguf' exists already"):
        export("demo", tmp_path / "old.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConvertError, match=" of disk, 1000 B are free"):
        export("demo", tmp_path / "new.gguf")
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConvertError, match=r"cannot write.*No space left"):
        export("demo", tmp_path / "new.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["old.gguf"]


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope.scaling.type": "longrope"},
        {"rope.scale_linear": 4.0},
        {"rope.scaling.attn_factor": 2.0},
        {"rope.scaling.yarn_log_multiplier": 0.5},
        {"rope.dimension_sections": 3},
        {"attention.scale": 0.5},
        {"attention.clamp_kqv": 8.0},
    ],
)
def test_metadata_that_would_change_attention_are_refused_by_name(tmp_path, metadata):
    path = write_gguf(tmp_path / "model.gguf", random_parts(), metadata=metadata)
    with pytest.raises(ConvertError, match=f"metadata 'qwen3moe.{next(iter(metadata))}'"):
        convert_checkpoint(path, tmp_path / "store")


def test_a_tensor_of_frequencies_is_refused(tmp_path):
    parts = random_parts() | {"rope_freqs.weight": (TensorType.F32, np.full(8, 4.0, np.float32))}
    with pytest.raises(ConvertError, match="rope_freqs"):
        convert_checkpoint(write_gguf(tmp_path / "model.gguf", parts), tmp_path / "store")
