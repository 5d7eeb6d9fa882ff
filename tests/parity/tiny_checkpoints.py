"""Tiny random Qwen3-MoE checkpoints as Hugging Face folders, written without torch.

Weights come from integers by splitmix64 and a handful of exactly rounded operations, so a recipe names the same bytes on
every machine and with every NumPy.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END_OF_TEXT = "<|endoftext|>"
BYTES = 256
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Recipe:
    """A checkpoint's shapes and seed. ``shards`` files hold its tensors; ``new_rope`` writes transformers 5's
    ``rope_parameters`` in place of ``rope_theta``."""

    name: str
    seed: int = 1
    dtype: Dtype = "float32"
    vocabulary: int = 265
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    experts: int = 8
    top_k: int = 2
    expert_width: int = 32
    dense_width: int = 64
    mlp_only_layers: tuple[int, ...] = ()
    sparse_step: int = 1
    normalize: bool = True
    tied: bool = True
    epsilon: float = 1e-6
    rope_theta: float = 10000.0
    new_rope: bool = False
    shards: int = 1

    def is_dense(self, layer: int) -> bool:
        """Whether transformers builds one dense FFN in this layer."""
        return layer in self.mlp_only_layers or (layer + 1) % self.sparse_step != 0


RECIPES = (
    Recipe("gqa_tied", seed=7),
    Recipe(
        "wide_heads_bf16", seed=2, dtype="bfloat16", hidden=96, heads=8, kv_heads=1, head_dim=32, experts=16, top_k=4,
        expert_width=64, normalize=False, tied=False, rope_theta=1e6,
    ),
    Recipe(
        "mha_odd_widths", seed=4, hidden=80, heads=4, kv_heads=4, head_dim=48, experts=6, top_k=3, expert_width=48,
        tied=False, epsilon=1e-2, vocabulary=300,
    ),
    Recipe(
        "dense_layers_bf16", seed=8, dtype="bfloat16", layers=4, heads=6, kv_heads=3, head_dim=32, mlp_only_layers=(0, 2),
        dense_width=112, expert_width=48, normalize=False,
    ),
    Recipe(
        "sparse_step_shards", seed=5, hidden=48, layers=4, sparse_step=2, dense_width=72, expert_width=40,
        shards=3, new_rope=True, rope_theta=5000.0,
    ),
    Recipe(
        "all_experts", seed=4, layers=4, heads=4, kv_heads=1, head_dim=32, experts=4, top_k=4, sparse_step=2,
        mlp_only_layers=(3,), tied=False, normalize=False,
    ),
    Recipe(
        "top_one", seed=6, hidden=128, layers=2, heads=4, kv_heads=2, head_dim=32, experts=32, top_k=1, expert_width=16,
        normalize=False, tied=False,
    ),
)  # fmt: skip


def recipe(name: str) -> Recipe:
    """The recipe of this name."""
    return next(r for r in RECIPES if r.name == name)


def random_tensor(seed: int, name: str, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> NDArray[np.float32]:
    """Bell-shaped numbers (a sum of four uniforms of 16 bits each) for the tensor ``name``."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
    z = (np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    total = np.zeros(z.shape, np.int64)
    for shift in (0, 16, 32, 48):
        total += ((z >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.int64)
    # Four uniforms on 0..65535 have mean 131070 and variance 4 * (65536^2 - 1) / 12.
    centred = (total - 131070).astype(np.float64) / np.sqrt((65536.0 * 65536.0 - 1.0) / 3.0)
    return (mean + deviation * centred).astype(np.float32).reshape(shape)


def tensors(r: Recipe) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Names and float32 values. Scales are such that attention is peaked, gates bend and routers prefer, and that no block
    drowns the residual stream (else INT8 noise grows from layer to layer and bounds say nothing)."""

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> tuple[str, NDArray[np.float32]]:
        return name, random_tensor(r.seed, name, (rows, columns), gain / float(np.sqrt(np.float64(columns))))

    def norm(name: str, size: int, mean: float = 1.0) -> tuple[str, NDArray[np.float32]]:
        return name, random_tensor(r.seed, name, (size,), 0.2, mean)

    yield matrix("model.embed_tokens.weight", r.vocabulary, r.hidden, 3.0)
    if not r.tied:
        yield matrix("lm_head.weight", r.vocabulary, r.hidden, 3.0)
    yield norm("model.norm.weight", r.hidden)
    for layer in range(r.layers):
        p = f"model.layers.{layer}."
        yield norm(p + "input_layernorm.weight", r.hidden)
        yield matrix(p + "self_attn.q_proj.weight", r.heads * r.head_dim, r.hidden)
        yield matrix(p + "self_attn.k_proj.weight", r.kv_heads * r.head_dim, r.hidden)
        yield matrix(p + "self_attn.v_proj.weight", r.kv_heads * r.head_dim, r.hidden)
        yield matrix(p + "self_attn.o_proj.weight", r.hidden, r.heads * r.head_dim, 0.7)
        yield norm(p + "self_attn.q_norm.weight", r.head_dim, 1.5)
        yield norm(p + "self_attn.k_norm.weight", r.head_dim, 1.5)
        yield norm(p + "post_attention_layernorm.weight", r.hidden)
        if r.is_dense(layer):
            ffns = [(p + "mlp.", r.dense_width)]
        else:
            yield matrix(p + "mlp.gate.weight", r.experts, r.hidden, 2.0)
            ffns = [(p + f"mlp.experts.{expert}.", r.expert_width) for expert in range(r.experts)]
        for prefix, width in ffns:
            yield matrix(prefix + "gate_proj.weight", width, r.hidden, 1.5)
            yield matrix(prefix + "up_proj.weight", width, r.hidden, 1.5)
            yield matrix(prefix + "down_proj.weight", r.hidden, width, 0.7)


def config(r: Recipe, dtype: str | None = None) -> dict:
    """The config.json of a recipe."""
    values = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": r.vocabulary,
        "hidden_size": r.hidden, "intermediate_size": r.dense_width, "moe_intermediate_size": r.expert_width,
        "num_hidden_layers": r.layers, "num_attention_heads": r.heads, "num_key_value_heads": r.kv_heads,
        "head_dim": r.head_dim, "num_experts": r.experts, "num_experts_per_tok": r.top_k, "norm_topk_prob": r.normalize,
        "decoder_sparse_step": r.sparse_step, "mlp_only_layers": list(r.mlp_only_layers), "rms_norm_eps": r.epsilon,
        "max_position_embeddings": 512, "tie_word_embeddings": r.tied, "hidden_act": "silu", "attention_bias": False,
        "attention_dropout": 0.0, "use_sliding_window": False, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    if r.new_rope:
        values |= {"rope_parameters": {"rope_theta": r.rope_theta, "rope_type": "default"}, "dtype": dtype or r.dtype}
    else:
        values |= {"rope_theta": r.rope_theta, "rope_scaling": None, "torch_dtype": dtype or r.dtype}
    return values


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round finite float32 to the nearest bfloat16, ties to even; the result as its bits."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def write_safetensors(path: Path, values: Mapping[str, NDArray[np.float32]], dtype: Dtype) -> int:
    """Write tensors in the given type; returns the bytes of their data."""
    header: dict = {"__metadata__": {"format": "pt"}}
    blobs, end = [], 0
    for name, value in values.items():
        blob = (bfloat16_bits(value) if dtype == "bfloat16" else np.ascontiguousarray(value, "<f4")).tobytes()
        header[name] = {
            "dtype": "BF16" if dtype == "bfloat16" else "F32", "shape": list(value.shape),
            "data_offsets": [end, end + len(blob)],
        }  # fmt: skip
        blobs.append(blob)
        end += len(blob)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))
    return end


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: id 0 ends the text, byte ``b`` is some id in 1..256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(alphabet) == BYTES
    vocabulary = {END_OF_TEXT: 0} | {symbol: index for index, symbol in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END_OF_TEXT, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": None}) + "\n"
    )


def write_folder(
    folder: Path, configuration: dict, values: Mapping[str, NDArray[np.float32]], dtype: Dtype, shards: int = 1
) -> None:
    """A Hugging Face folder; more than one shard comes with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(configuration, indent=1) + "\n")
    write_tokenizer(folder)
    if shards == 1:
        write_safetensors(folder / "model.safetensors", values, dtype)
        return
    items, weight_map, total = iter(values.items()), {}, 0
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(islice(items, -(-len(values) // shards)))
        total += write_safetensors(folder / name, part, dtype)
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def write_checkpoint(r: Recipe, folder: Path) -> Path:
    """Write a recipe's checkpoint and return its folder."""
    write_folder(folder, config(r), dict(tensors(r)), r.dtype, r.shards)
    return folder


def digest(r: Recipe) -> str:
    """A hash of a recipe's parameters and weights, to tell a changed generator from a changed engine."""
    state = hashlib.blake2b(json.dumps(asdict(r), sort_keys=True).encode(), digest_size=16)
    for name, value in tensors(r):
        state.update(name.encode() + np.ascontiguousarray(value, "<f4").tobytes())
    return state.hexdigest()


def token_sequence(r: Recipe, count: int = 80, seed: int = 0) -> NDArray[np.int32]:
    """Token ids for a comparison; 80 of them cross a page of the KV cache."""
    uniform = random_tensor(r.seed, f"tokens {seed}", (count,), 1000.0)
    return (np.abs(uniform).astype(np.int64) % r.vocabulary).astype(np.int32)
