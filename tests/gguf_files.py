"""GGUF files as other programs write them, and what stores and files hold, to compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from elmoe.convert.gguf_export import export_store
from elmoe.convert.gguf_tokenizer import describe
from elmoe.convert.pre_tokenizers import QWEN2_PATTERN
from elmoe.models import family_of, spec_of_config
from elmoe.models.gguf import metadata_of_spec
from elmoe.models.tensors import PROJECTIONS, feed_forward
from elmoe.models.tensors import tensors as model_tensors
from elmoe.store import open_store
from tests.checkpoints import tiny_config


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
    merges = changes.pop("merges", described.merges or ["! !"])
    if isinstance(merges, list):
        writer.add_token_merges(merges)
    elif merges is not None:
        writer.add_uint32(gguf.Keys.Tokenizer.MERGES, merges)
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
