"""Stores to GGUF and back, bit for bit; what a GGUF file may hold, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as TensorType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.gguf_file import GgufFile
from elmoe.convert.gguf_tokenizer import describe, rebuild
from elmoe.convert.pre_tokenizers import QWEN2_PATTERN
from elmoe.errors import ConvertError, ElmoeError
from elmoe.models import family_of, spec_of_config
from elmoe.models.gguf import metadata_of_spec
from elmoe.models.tensors import PROJECTIONS, feed_forward
from elmoe.models.tensors import tensors as model_tensors
from elmoe.store import open_store
from elmoe.store.format import NO_SHAPES
from tests.checkpoints import expert_name, tiny_config, write_checkpoint

TEXTS = ("The whale's tail,  and 12345 fish!\n\n  x", "naïve e\u0301tude — 東京 🐋\tend", "def f(x):\r\n    return x", " ")


def wide_config(**changes: object) -> dict:
    """A tiny config whose columns fill groups of 32."""
    return tiny_config(**({"hidden_size": 64, "moe_intermediate_size": 32} | changes))


def content(store: Path) -> dict[str, bytes]:
    manifest = json.loads((store / "manifest.json").read_text())
    del manifest["source"]
    files = {file.name: file.read_bytes() for file in store.iterdir() if file.name != "manifest.json"}
    return files | {"manifest": json.dumps(manifest).encode()}


def export(store: Path | str, out: Path) -> Path:
    with open_store(store) as reader:
        export_store(reader, out)
    return out


def tensors(path: Path) -> dict[str, tuple[int, bytes]]:
    return {one.name: (int(one.tensor_type), one.data.tobytes()) for one in gguf.GGUFReader(path).tensors}


def write_gguf(path: Path, parts: dict[str, tuple[TensorType, np.ndarray]], **changes: Any) -> Path:
    """A file as another program writes it: tensors given as bytes (Q8_0, BF16) or values, metadata of ``wide_config``."""
    config = wide_config()
    metadata = metadata_of_spec(spec_of_config(config), family_of(config).gguf)
    metadata |= {f"qwen3moe.{key}": value for key, value in changes.pop("metadata", {}).items()}
    writer = gguf.GGUFWriter(path, changes.pop("architecture", "qwen3moe"))
    for key, value in metadata.items():
        add = {float: writer.add_float32, str: writer.add_string}.get(type(value), writer.add_uint32)
        add(key, value)
    described = describe(changes.pop("tokenizer", byte_tokenizer()), config["vocab_size"])
    writer.add_tokenizer_model(changes.pop("model", "gpt2"))
    writer.add_tokenizer_pre(changes.pop("pre", described.pre))
    writer.add_token_list(described.tokens)
    writer.add_token_types(described.types)
    writer.add_token_merges(described.merges or ["! !"])
    writer.add_eos_token_id(changes.pop("eos", 0))
    for name, (kind, values) in parts.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert not changes
    return path


def byte_tokenizer() -> bytes:
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer.to_str().encode()


def qwen_tokenizer() -> bytes:
    """As Qwen's: normaliser, pattern, merges, added tokens behind the vocabulary."""
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("a", "n"), ("an", "d"), ("Ġ", "Ġ"), ("1", "2"), ("Ċ", "Ċ")]
    names += ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer.to_str().encode()


def random_parts(dtype: TensorType = TensorType.Q8_0, seed: int = 0) -> dict[str, tuple[TensorType, np.ndarray]]:
    """Tensors of ``wide_config``: matrices as ``dtype``, Q8_0 with all codes from -128 to 127 and scales of any size."""
    rng, parts = np.random.default_rng(seed), {}
    for name, (shape, plain) in gguf_shapes(wide_config()).items():
        parts[name] = (TensorType.F32, rng.standard_normal(shape, np.float32)) if plain else values(rng, shape, dtype)
    return parts


def gguf_shapes(config: dict) -> dict[str, tuple[tuple[int, ...], bool]]:
    """Name -> (shape, whether float32) of every tensor of a GGUF file of this configuration."""
    spec, gguf = spec_of_config(config), family_of(config).gguf
    shapes = {
        gguf.names[part.role].format(layer=tensor.layer): (part.shape, tensor.kind == "floats")
        for tensor in model_tensors(spec)
        for part in tensor.parts
    }
    for layer in range(len(spec.layers)):
        one = feed_forward(spec, layer)
        for part in map(one.part, PROJECTIONS):
            shape = (one.count, *part.shape) if one.kind == "expert" else part.shape
            shapes[gguf.names[part.role].format(layer=layer)] = shape, False
    return shapes


def values(rng: np.random.Generator, shape: tuple[int, ...], dtype: TensorType) -> tuple[TensorType, np.ndarray]:
    if dtype == TensorType.Q8_0:
        codes = rng.integers(-128, 128, (*shape[:-1], shape[-1] // 32, 32)).astype(np.int8)
        scales = rng.choice(np.array([0, 6e-8, 1e-5, 0.01, 3.3], np.float16), codes.shape[:-1])
        blocks = np.concatenate([scales[..., None].view(np.uint8), codes.view(np.uint8)], axis=-1)
        return dtype, blocks.reshape(*shape[:-1], -1)
    full = (rng.standard_normal(shape) * 0.1).astype(np.float32)
    if dtype == TensorType.BF16:
        return dtype, (full.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return dtype, full.astype(np.float16) if dtype == TensorType.F16 else full


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": False, "mlp_only_layers": [1], "eos_token_id": [0, 7]},
        {"decoder_sparse_step": 2, "num_hidden_layers": 4, "eos_token_id": [9, 0, 3], "rope_theta": 1e6},
        {"head_dim": 32, "num_key_value_heads": 4, "vocab_size": 301, "rms_norm_eps": 1e-5, "eos_token_id": None},
    ],
)
def test_store_to_gguf_to_store(tmp_path, changes):
    source = write_checkpoint(tmp_path / "source", wide_config(**changes))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }} é")
    (source / "tokenizer_config.json").write_text('{"bos_token": "<s>", "pad_token": {"content": "<pad>"}}')
    convert_checkpoint(source, tmp_path / "store")
    export(tmp_path / "store", tmp_path / "model.gguf")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert content(tmp_path / "store") == content(tmp_path / "back")
    with open_store(tmp_path / "back") as reader:
        assert reader.manifest.special_tokens == {"bos_token": "<s>", "pad_token": "<pad>"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["back", "model.gguf", "source", "store"]


def test_the_demo_goes_there_and_back(tmp_path):
    export("demo", tmp_path / "demo.gguf")
    convert_checkpoint(tmp_path / "demo.gguf", tmp_path / "store")
    with open_store("demo") as demo:
        before = {name: data for name, data in content(demo.path).items() if name != "MODEL_CARD.md"}
    after, shapes = content(tmp_path / "store"), slice(20, 28)  # its files are older: they do not know their shapes
    assert before.keys() == after.keys()
    for name, data in after.items():
        written = name.endswith((".bin", ".experts"))
        assert before[name] == (data[: shapes.start] + NO_SHAPES + data[shapes.stop :] if written else data), name


def test_gguf_to_store_to_gguf(tmp_path):
    """Codes of -128, zero and subnormal scales: the same bytes come out, as the package's own reader sees them."""
    first = write_gguf(tmp_path / "first.gguf", random_parts())
    convert_checkpoint(first, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        reader.verify()
        assert reader.matrix("embedding").codes.min() == -128
    assert tensors(export(tmp_path / "store", tmp_path / "second.gguf")) == tensors(first)


@pytest.mark.parametrize("dtype", [TensorType.F32, TensorType.F16, TensorType.BF16])
def test_other_types_are_quantised_as_a_checkpoint_is(tmp_path, dtype):
    parts = random_parts(dtype)
    convert_checkpoint(write_gguf(tmp_path / "model.gguf", parts), tmp_path / "store")
    config, weights = wide_config(), {}
    spec, family = spec_of_config(config), family_of(config)

    def float32(name: str) -> np.ndarray:
        kind, data = parts[name]
        if kind == TensorType.BF16:
            return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        return data.astype(np.float32)

    for tensor in model_tensors(spec):
        for part in tensor.parts:
            theirs, ours = (names[part.role].format(layer=tensor.layer) for names in (family.names, family.gguf.names))
            weights[theirs] = float32(ours)
    for layer in range(len(spec.layers)):
        for projection in PROJECTIONS:
            stacked = float32(f"blk.{layer}.ffn_{projection}_exps.weight")
            weights |= {expert_name(config, layer, e, projection): values for e, values in enumerate(stacked)}
    convert_checkpoint(write_checkpoint(tmp_path / "source", config, weights), tmp_path / "other")
    same = [name for name in content(tmp_path / "store") if name.endswith((".bin", ".experts"))]
    assert len(same) == 4
    assert all(content(tmp_path / "store")[name] == content(tmp_path / "other")[name] for name in same)


def test_split_files(tmp_path):
    parts = random_parts()
    convert_checkpoint(write_gguf(tmp_path / "whole.gguf", parts), tmp_path / "store")
    names = list(parts)
    for index in range(2):
        write_gguf(tmp_path / f"m-0000{index + 1}-of-00002.gguf", {name: parts[name] for name in names[index::2]})
    convert_checkpoint(tmp_path / "m-00001-of-00002.gguf", tmp_path / "split")
    assert content(tmp_path / "split") == content(tmp_path / "store")
    with pytest.raises(ConvertError, match="not the first part"):
        convert_checkpoint(tmp_path / "m-00002-of-00002.gguf", tmp_path / "other")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(ConvertError, match="m-00002-of-00002"):
        convert_checkpoint(tmp_path / "m-00001-of-00002.gguf", tmp_path / "other")


def test_our_reader_sees_what_the_package_sees(tmp_path):
    path = export("demo", tmp_path / "demo.gguf")
    ours, theirs = GgufFile(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            value = ours.metadata[key]
            assert field.contents() == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value), key
    for one in theirs.tensors:
        tensor = ours.tensor(one.name)
        assert (tensor.start, tensor.bytes, tensor.shape[::-1]) == (one.data_offset, one.n_bytes, tuple(one.shape))


@pytest.mark.parametrize("make,pre", [(byte_tokenizer, "gpt-2"), (qwen_tokenizer, "qwen2")])
def test_tokenizers_are_rebuilt(tmp_path, make, pre):
    """Without the carried tokenizer.json, as other programs write it."""
    path = write_gguf(tmp_path / "model.gguf", random_parts(), tokenizer=make())
    assert GgufFile(path).metadata["tokenizer.ggml.pre"] == pre
    convert_checkpoint(path, tmp_path / "store")
    before, after = Tokenizer.from_str(make().decode()), Tokenizer.from_file(str(tmp_path / "store" / "tokenizer.json"))
    for text in (*TEXTS, "a<|im_start|>b<think> the and  <|endoftext|>"):
        ids = before.encode(text).ids
        assert after.encode(text).ids == ids
        for skip in (False, True):
            assert after.decode(ids, skip_special_tokens=skip) == before.decode(ids, skip_special_tokens=skip)
    convert_checkpoint(export(tmp_path / "store", tmp_path / "again.gguf"), tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "store")


def test_a_begin_token_comes_back():
    tokenizer = Tokenizer.from_str(byte_tokenizer().decode())
    described = describe(byte_tokenizer(), 300)
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": described.tokens,
        "tokenizer.ggml.token_type": described.types, "tokenizer.ggml.merges": ["! !"],
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 0,
    }  # fmt: skip
    text = rebuild(metadata)
    assert Tokenizer.from_str(text.decode()).encode("ab").ids == [0, *tokenizer.encode("ab").ids]
    assert describe(text, 300).add_bos == 0
    with pytest.raises(ConvertError, match="id of the begin"):
        rebuild(metadata | {"tokenizer.ggml.bos_token_id": 300})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"architecture": "falcon"}, "architecture 'falcon'"),
        ({"pre": "kimi-k2"}, "tokenizer.ggml.pre.*kimi-k2"),
        ({"model": "t5"}, "tokenizer.ggml.model.*t5"),
        ({"eos": 300}, "end is 300"),
        ({"metadata": {"rope.freq_base": 0.0}}, r"qwen3moe\.rope\.freq_base"),
        ({"metadata": {"expert_used_count": 7}}, r"qwen3moe\.expert_used_count"),
        ({"metadata": {"expert_shared_count": 1}}, "expert_shared_count"),
        ({"metadata": {"attention.value_length": 32}}, "value_length"),
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


def test_a_given_tokenizer_mends_an_unknown_one(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", random_parts(), pre="kimi-k2")
    (tmp_path / "tokenizer.json").write_bytes(byte_tokenizer())
    convert_checkpoint(path, tmp_path / "store", tokenizer=tmp_path / "tokenizer.json")
    assert (tmp_path / "store" / "tokenizer.json").read_bytes() == byte_tokenizer()


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


def test_a_file_ends_where_llama_cpp_ends(tmp_path):
    """The metadata name one end; control tokens whose texts say that they end are ends too, normal tokens are not."""
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|file_sep|>"])
    tokenizer.add_tokens(["<EOT>"])
    ids = {name: tokenizer.token_to_id(name) for name in ("<|endoftext|>", "<|im_end|>", "<|file_sep|>")}
    path = tmp_path / "model.gguf"
    write_gguf(path, random_parts(), tokenizer=tokenizer.to_str().encode(), eos=ids["<|im_end|>"])
    convert_checkpoint(path, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        assert set(reader.spec.eos_tokens) == set(ids.values()) and reader.spec.eos_tokens[0] == ids["<|im_end|>"]


@pytest.mark.parametrize("eos", [None, 5, [5], [5, 7], [9, 0, 3]])
def test_ends_and_special_tokens_come_back_from_gguf(tmp_path, eos):
    source = write_checkpoint(tmp_path / "source", wide_config(eos_token_id=eos))
    tokenizer = Tokenizer.from_str((source / "tokenizer.json").read_text())
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>", "bos_token": "a"}))
    convert_checkpoint(source, tmp_path / "store")
    export(tmp_path / "store", tmp_path / "model.gguf")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    assert content(tmp_path / "back") == content(tmp_path / "store")


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


@pytest.mark.parametrize(
    "metadata", [{"rope.scaling.factor": 1.0}, {"rope.scale_linear": 0.0}, {"attention.sliding_window": 64}]
)
def test_metadata_that_change_nothing_are_taken(tmp_path, metadata):
    convert_checkpoint(write_gguf(tmp_path / "plain.gguf", random_parts()), tmp_path / "plain")
    convert_checkpoint(write_gguf(tmp_path / "model.gguf", random_parts(), metadata=metadata), tmp_path / "store")
    assert content(tmp_path / "store") == content(tmp_path / "plain")


def test_a_tensor_of_frequencies_is_refused(tmp_path):
    parts = random_parts() | {"rope_freqs.weight": (TensorType.F32, np.full(8, 4.0, np.float32))}
    with pytest.raises(ConvertError, match="rope_freqs"):
        convert_checkpoint(write_gguf(tmp_path / "model.gguf", parts), tmp_path / "store")
