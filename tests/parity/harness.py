"""Runs a store through the decoder and the engine on any backend, and measures. Needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from elmoe.bitslice import Backend, ExpertLayout, SamplingParameters
from elmoe.bitslice.moe import expert_matrices
from elmoe.convert import convert_checkpoint
from elmoe.convert.fused_experts import fused_name
from elmoe.convert.latent_rows import FusedRows
from elmoe.convert.stacked import stacked_names, stacked_shapes
from elmoe.engine.decoder import AllExperts, Decoder, Draft, Places, WeightReader
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request, Result
from elmoe.engine.statistics import Statistics
from elmoe.errors import KernelError, StoreError
from elmoe.models import FAMILIES
from elmoe.models.tensors import FeedForward, feed_forwards, tensors
from elmoe.opening import load_backend
from elmoe.store import open_store, resolve_store
from tests.parity import float_backend
from tests.parity.bounds import Measured
from tests.parity.tiny_checkpoints import Dtype, Recipe, bfloat16_bits, write_checkpoint
from tests.tiny import bound_cache


def native_kernels() -> Backend | None:
    """elmoe.kernels, or None where the package is installed without them."""
    try:
        return load_backend("native")
    except (ImportError, KernelError):
        return None


def convert(source: Path, store: Path) -> Any:
    """Convert a Hugging Face folder and open the store; the caller closes it."""
    convert_checkpoint(source, store)
    return open_store(store)


def convert_recipe(recipe: Recipe, folder: Path) -> Any:
    """Write a recipe's checkpoint below ``folder``, convert it, open the store."""
    return convert(write_checkpoint(recipe, folder / "checkpoint"), folder / "store")


def decoder_logits(
    reader: WeightReader, backend: Backend, ids: NDArray[np.int32], chunk: int = 32, draft: Draft | None = None
) -> NDArray:
    """Logits (tokens, vocabulary) of every position of one sequence, computed ``chunk`` tokens at a time."""
    decoder, pool = Decoder(reader, backend), bound_cache(reader.spec, 1, len(ids))
    decoder.reserve_positions(len(ids))
    parts = []
    for start in range(0, len(ids), chunk):
        positions = np.arange(start, min(start + chunk, len(ids)), dtype=np.int32)
        places = Places(np.zeros_like(positions), positions)
        parts.append(decoder.forward(ids[positions], places, pool.kernels, AllExperts(reader), draft)[0])
    return np.concatenate(parts)


def greedy(
    reader: Any, backend: Backend, prompts: list[NDArray[np.int32]], count: int, **options: Any
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


def position_errors(values: NDArray, reference: NDArray) -> NDArray[np.float64]:
    """For each position the root mean square of a - b over that of all b."""
    difference = values.astype(np.float64) - reference
    return np.sqrt(np.mean(difference**2, axis=1) / np.mean(np.square(reference)))


def int8_float_logits(reader: WeightReader, ids: NDArray[np.int32]) -> NDArray:
    """Logits of the float backend with INT8 activations and an fp16 cache: bitslice but for the order of operations."""
    with float_backend.int8_activations():
        return decoder_logits(reader, float_backend, ids)


def measure(w8a8: NDArray, exact: NDArray, int8_float: NDArray) -> Measured:
    """How far W8A8 logits are from the float model, and for how long they follow the float model with INT8 activations."""
    apart = np.abs(w8a8 - int8_float).max(axis=1) > 1e-5 * np.abs(int8_float).max()
    return Measured(
        relative_error(w8a8, exact),
        rms_error(w8a8, exact),
        float(np.median(position_errors(w8a8, exact))),
        int(np.argmax(apart)) if apart.any() else len(apart),
    )


def check(found: Measured, measured: Measured) -> None:
    """Fail where an error is twice what was measured, or where the INT8 models part in half the positions."""
    assert found.maximum <= 2 * measured.maximum
    assert found.rms <= 2 * measured.rms
    assert found.median <= 2 * measured.median
    assert 2 * found.agreeing >= measured.agreeing


def as_written(values: NDArray[np.float32], dtype: Dtype) -> NDArray[np.float32]:
    """Values as a checkpoint of this type holds them."""
    if dtype == "float32":
        return values
    return (bfloat16_bits(values).astype(np.uint32) << np.uint32(16)).view(np.float32)


def demo_path(checkpoint: Path, folder: Path) -> Path:
    """Where the embedded demo store is, or if there is none, the checkpoint converted into ``folder``."""
    try:
        path = resolve_store("demo")
        open_store(path).close()
    except StoreError:
        path = folder / "demo"
        convert_checkpoint(checkpoint, path)
    return path


def cross_entropy(logits: NDArray, targets: NDArray) -> float:
    """Sum of the targets' negative log-probabilities, nats, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]).sum())


def dequantized_tensors(reader: WeightReader) -> dict[str, NDArray[np.float32]]:
    """The store's weights under their Hugging Face names: matrices dequantised, routers and norms as they are."""
    spec, values = reader.spec, {}
    names = FAMILIES[spec.family].names
    assert names is not None
    for tensor in tensors(spec):
        whole = reader.array(tensor.name) if tensor.kind == "floats" else reader.matrix(tensor.name).dequantize()
        borders = np.cumsum([part.shape[0] for part in tensor.parts])[:-1]
        for part, rows in zip(tensor.parts, np.split(whole, borders), strict=True):
            values[names[part.role].format(layer=tensor.layer)] = rows
        if tensor.name.endswith("value_up"):
            keys = reader.matrix(tensor.name.replace("value_up", "key_up")).dequantize()
            values[names["value_up"].format(layer=tensor.layer)] = _fused_up(FusedRows.of(spec), keys, whole)
    if FAMILIES[spec.family].alternating is not None:
        return values | _fused_experts(reader, values)
    for one in feed_forwards(spec):
        layer, shared = one.layer, one.kind == "shared"
        layout, addresses = reader.expert_layout(layer, shared), reader.expert_addresses(layer, shared)
        if (stacked := stacked_names(names, one)) is not None:
            values |= zip(stacked, _stacked(one, layout, addresses), strict=True)
            continue
        for expert in range(one.count):
            for projection, matrix in expert_matrices(layout, addresses, expert, False).items():
                values[names[one.part(projection).role].format(layer=layer, expert=expert)] = matrix.dequantize()
    return values


def _stacked(
    one: FeedForward, layout: ExpertLayout, addresses: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The two tensors of a feed-forward whose gates lie above its ups."""
    experts = [expert_matrices(layout, addresses, expert, False) for expert in range(one.count)]
    gate_up = [np.concatenate([matrices[name].dequantize() for name in ("gate", "up")]) for matrices in experts]
    down = [matrices["down"].dequantize() for matrices in experts]
    shapes = stacked_shapes(one)
    return np.stack(gate_up).reshape(shapes[0]), np.stack(down).reshape(shapes[1])


def _fused_up(rows: FusedRows, keys: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The projection from latents of all heads: of each one its keys, then its values."""
    keys = keys.reshape(rows.heads, rows.rank, rows.plain).transpose(0, 2, 1)
    return np.concatenate([keys, values.reshape(rows.heads, rows.value, rows.rank)], axis=1).reshape(rows.shape)


def _fused_experts(reader: WeightReader, values: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """All experts of a layer in one tensor, as GPT-OSS has them, and their biases, of which ``values`` has the ups."""
    family, found = FAMILIES[reader.spec.family], {}
    assert family.alternating is not None and family.names is not None
    for one in feed_forwards(reader.spec):
        layout, addresses = reader.expert_layout(one.layer), reader.expert_addresses(one.layer)
        experts = [expert_matrices(layout, addresses, expert, False) for expert in range(one.count)]
        down = [matrices["down"].dequantize().T for matrices in experts]
        found[fused_name(family.alternating, one, "down")] = np.stack(down)
        both = [np.stack([matrices[name].dequantize() for name in ("gate", "up")], axis=1) for matrices in experts]
        fused = np.stack([pair.reshape(-1, one.hidden).T for pair in both])
        found[fused_name(family.alternating, one, "gate")] = fused
        biases = [reader.array(f"layers.{one.layer}.expert_{name}_bias") for name in ("gate", "up")]
        name = family.names["expert_gate_bias"].format(layer=one.layer)
        found[name] = np.stack(biases, axis=2).reshape(one.count, -1)
    return found


def weights_digest(reader: WeightReader) -> str:
    """A hash of everything :func:`dequantized_tensors` gives."""
    state = hashlib.blake2b(digest_size=16)
    for name, value in sorted(dequantized_tensors(reader).items()):
        state.update(name.encode() + np.ascontiguousarray(value, "<f4").tobytes())
    return state.hexdigest()


def demo_result(prompt: str, sampling: dict[str, Any], count: int, backend: Backend, **options: Any) -> dict[str, Any]:
    """What the embedded demo model answers, down to the bytes of its cache, in JSON's types."""
    reader = open_store(resolve_store("demo"))
    try:
        ids = Tokenizer.from_file(str(reader.tokenizer_path)).encode(prompt).ids
        request = Request(tuple(ids), count, SamplingParameters(**sampling))
        engine = Engine(reader, backend, EngineOptions(keep_kv_digest=True, **options))
        result = engine.generate([request])[0][0]
    finally:
        reader.close()
    return {
        "prompt_ids": ids, "tokens": list(result.tokens), "logprobs": list(result.logprobs), "finish": result.finish,
        "kv_digest": result.kv_digest,
    }  # fmt: skip
