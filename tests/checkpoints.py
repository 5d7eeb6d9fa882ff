"""Tiny Qwen3-MoE checkpoints as Hugging Face folders, written byte by byte."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from elmoe.convert.fused_experts import fused_name, fused_shape
from elmoe.convert.latent_rows import ROLES, FusedRows
from elmoe.convert.stacked import stacked_names, stacked_shapes
from elmoe.models import family_of, spec_of_config
from elmoe.models.tensors import PROJECTIONS, FeedForward, feed_forward, feed_forwards, tensors


def tiny_config(**changes: object) -> dict:
    values: dict = dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=300, hidden_size=48, intermediate_size=64,
        moe_intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=6, num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=128, tie_word_embeddings=True, hidden_act="silu",
        eos_token_id=0,
    )  # fmt: skip
    return values | changes


def checkpoint_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a checkpoint with this configuration."""
    spec, names = spec_of_config(config), family_of(config).names
    assert names is not None
    shapes = {
        names[part.role].format(layer=tensor.layer): FusedRows.of(spec).shape if part.role in ROLES else part.shape
        for tensor in tensors(spec)
        for part in tensor.parts
    }
    family = family_of(config)
    for one in feed_forwards(spec):
        if family.alternating is not None:
            for projection in ("gate", "down"):
                rows, columns = fused_shape(one, projection)
                shapes[fused_name(family.alternating, one, projection)] = one.count, columns, rows
            bias = names["expert_gate_bias"].format(layer=one.layer)
            shapes[bias] = one.count, 2 * one.width
            continue
        if (stacked := stacked_names(names, one)) is not None:
            shapes |= dict(zip(stacked, stacked_shapes(one), strict=True))
            continue
        for expert in range(one.count):
            shapes |= {_part_name(config, one, expert, name): one.shape(name) for name in PROJECTIONS}
    return shapes


def expert_name(config: dict, layer: int, expert: int, projection: str) -> str:
    """The checkpoint's name of an expert's projection, or of the layer's dense feed-forward."""
    return _part_name(config, feed_forward(spec_of_config(config), layer), expert, projection)


def _part_name(config: dict, one: FeedForward, expert: int, projection: str) -> str:
    names = family_of(config).names
    assert names is not None
    return names[one.part(projection).role].format(layer=one.layer, expert=expert)


def random_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of the config, float32."""
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_normal(shape) * 0.1).astype(np.float32) for name, shape in checkpoint_shapes(config).items()}


def write_safetensors(path: Path, tensors: dict[str, np.ndarray], dtype: str = "F32") -> None:
    header, parts, end = {}, [], 0
    for name, values in tensors.items():
        if dtype == "BF16":
            data = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data = values.astype({"F32": "<f4", "F16": "<f2", "F64": "<f8"}[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [end, end + len(data)]}
        parts.append(data)
        end += len(data)
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def write_tokenizer(path: Path) -> None:
    names = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(path))


def write_checkpoint(
    folder: Path, config: dict, weights: dict[str, np.ndarray] | None = None, shards: int = 1, dtype: str = "F32"
) -> Path:
    folder.mkdir(parents=True)
    weights = random_weights(config) if weights is None else weights
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder / "tokenizer.json")
    if shards == 1:
        write_safetensors(folder / "model.safetensors", weights, dtype)
        return folder
    names = list(weights)
    index = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard::shards]}
        write_safetensors(folder / file, part, dtype)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder
