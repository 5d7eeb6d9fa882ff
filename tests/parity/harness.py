"""Runs a store through the decoder and the engine on any backend, and measures. Needs no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.moe import expert_matrices
from elmoe.convert import convert_checkpoint
from elmoe.engine.engine import Engine, EngineOptions
from elmoe.engine.kv import KVPool
from elmoe.engine.request import Request, Result
from elmoe.engine.statistics import Statistics
from elmoe.models.decoder import Decoder, Tokens, WeightReader
from elmoe.store import open_store
from tests.parity.tiny_checkpoints import Recipe, write_checkpoint


def native_kernels() -> ModuleType | None:
    """elmoe.kernels, or None where the package is installed without them."""
    if find_spec("elmoe.kernels") is None:
        return None
    from elmoe.errors import KernelError

    try:
        return import_module("elmoe.kernels")
    except (ImportError, KernelError):
        return None


def convert(source: Path, store: Path) -> Any:
    """Convert a Hugging Face folder and open the store; the caller closes it."""
    convert_checkpoint(source, store)
    return open_store(store)


def convert_recipe(recipe: Recipe, folder: Path) -> Any:
    """Write a recipe's checkpoint below ``folder``, convert it, open the store."""
    return convert(write_checkpoint(recipe, folder / "checkpoint"), folder / "store")


class AllExperts:
    """An expert source for a store that is wholly readable."""

    def __init__(self, reader: WeightReader) -> None:
        self._addresses = {layer: reader.expert_addresses(layer) for layer in reader.schema.moe_layers}

    def fetch(self, layer: int, experts: NDArray[np.int32], draft: bool) -> NDArray[np.int64]:
        return self._addresses[layer]


def decoder_logits(reader: WeightReader, backend: ModuleType, ids: NDArray[np.int32], chunk: int = 32) -> NDArray:
    """Logits (tokens, vocabulary) of every position of one sequence, computed ``chunk`` tokens at a time."""
    decoder, pool = Decoder(reader, backend), KVPool(reader.schema, 1, len(ids))
    decoder.reserve_positions(len(ids))
    pool.reserve(0, len(ids))
    parts = []
    for start in range(0, len(ids), chunk):
        positions = np.arange(start, min(start + chunk, len(ids)), dtype=np.int32)
        tokens = Tokens(ids[positions], np.zeros_like(positions), positions)
        parts.append(decoder.forward(tokens, pool.cache, AllExperts(reader))[0])
    return np.concatenate(parts)


def greedy(
    reader: Any, backend: ModuleType, prompts: list[NDArray[np.int32]], count: int, **options: Any
) -> tuple[list[Result], Statistics]:
    """Greedy generation through the engine; the end of a text does not end it."""
    requests = [Request(tuple(int(i) for i in prompt), count, ignore_eos=True) for prompt in prompts]
    return Engine(reader, backend, EngineOptions(**options)).generate(requests)


def relative_error(values: NDArray, reference: NDArray) -> float:
    """max |a - b| / max |b|."""
    return float(np.abs(values.astype(np.float64) - reference).max() / np.abs(reference).max())


def rms_error(values: NDArray, reference: NDArray) -> float:
    """Root mean square of a - b over that of b."""
    return float(np.sqrt(np.mean((values.astype(np.float64) - reference) ** 2) / np.mean(np.square(reference))))


def cross_entropy(logits: NDArray, targets: NDArray) -> float:
    """Sum of the targets' negative log-probabilities, nats, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]).sum())


def dequantized_tensors(reader: WeightReader) -> dict[str, NDArray[np.float32]]:
    """The store's weights under their Hugging Face names: matrices dequantised, routers and norms as they are."""
    schema = reader.schema
    values = {"model.embed_tokens.weight": reader.nested("embedding").dequantize()}
    if not schema.tied_embeddings:
        values["lm_head.weight"] = reader.nested("head").dequantize()
    values["model.norm.weight"] = reader.array("final_norm")
    query, key = schema.heads * schema.head_dim, schema.kv_heads * schema.head_dim
    for layer in range(schema.layers):
        p, s = f"model.layers.{layer}.", f"layers.{layer}."
        parts = np.split(reader.nested(s + "query_key_value").dequantize(), [query, query + key])
        for name, part in zip("qkv", parts, strict=True):
            values[p + f"self_attn.{name}_proj.weight"] = part
        values[p + "self_attn.o_proj.weight"] = reader.nested(s + "attention_output").dequantize()
        for theirs, ours in (
            ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
            ("self_attn.q_norm", "query_norm"), ("self_attn.k_norm", "key_norm"),
        ):  # fmt: skip
            values[p + theirs + ".weight"] = reader.array(s + ours)
        dense = layer in schema.dense_layers
        if not dense:
            values[p + "mlp.gate.weight"] = reader.array(s + "router")
        layout, addresses = reader.expert_layout(layer), reader.expert_addresses(layer)
        for expert in range(1 if dense else schema.experts):
            prefix = p + ("mlp." if dense else f"mlp.experts.{expert}.")
            for projection, matrix in expert_matrices(layout, addresses, expert, False).items():
                values[prefix + f"{projection}_proj.weight"] = matrix.dequantize()
    return values
