"""A third backend with bitslice's signatures: ordinary float64 NumPy on the dequantised weights.

Activations are not quantised, so what the decoder computes on this backend is the float model that transformers computes
with the same dequantised weights: a difference beyond rounding is an error of the wiring. It exists for parity only, so
np.exp, BLAS and einsum are fine here, and no promise about bits is made. Within :func:`int8_activations` the inputs of
matmuls are quantised as bitslice does, and what is left between the two is float32 rounding and the fp16 cache.

Keys and values live in float64 beside the fp16 cache, in pages of the same table: the pages' bookkeeping is exercised, the
rounding is not, and the fp16 arrays (hence ``kv_digest``) stay zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from elmoe import bitslice
from elmoe.bitslice import (
    AttentionWeights,
    ExpertLayout,
    ExpertTerms,
    KVCache,
    LatentWeights,
    NestedMatrix,
    Places,
    RouterWeights,
    Routing,
    Sample,
    SamplingParameters,
    quantize_activations,
)
from elmoe.bitslice.backend import Operations
from elmoe.bitslice.moe import expert_matrices, ranking

Float = NDArray[np.float64]

_dense: WeakKeyDictionary[NestedMatrix, Float] = WeakKeyDictionary()
_shadows: WeakKeyDictionary[KVCache, tuple[Float, Float]] = WeakKeyDictionary()
_int8 = False


@contextmanager
def int8_activations() -> Iterator[None]:
    """Quantise activations while the context lasts."""
    global _int8
    _int8 = True
    try:
        yield
    finally:
        _int8 = False


def _weights(matrix: NestedMatrix, draft: bool, bits: int = 4, offset: float | None = None) -> Float:
    if draft:
        return matrix.dequantize(bits, offset).astype(np.float64)
    if matrix not in _dense:
        _dense[matrix] = matrix.dequantize().astype(np.float64)
    return _dense[matrix]


def _shadow(cache: KVCache) -> tuple[Float, Float]:
    """Keys and values (pages, layers, kv_heads, page_positions, head_dim) in float64."""
    if cache not in _shadows:
        _shadows[cache] = np.zeros(cache.values.shape), np.zeros(cache.values.shape)
    return _shadows[cache]


def nested_matmul(
    matrix: NestedMatrix, x: NDArray, draft: bool = False, bits: int = 4, offset: float | None = None
) -> Float:
    return _inputs(x) @ _weights(matrix, draft, bits, offset).T


def _inputs(x: NDArray) -> Float:
    """Vectors that a matrix is multiplied with, (count, columns)."""
    if not _int8:
        return x.astype(np.float64)
    quantized = quantize_activations(x.astype(np.float32))
    grouped = quantized.codes.reshape(*quantized.scales.shape, -1) * quantized.scales.astype(np.float64)[:, :, None]
    return grouped.reshape(len(x), -1)[:, : x.shape[1]]


def rms_norm(x: NDArray, weight: NDArray, epsilon: float) -> Float:
    x = x.astype(np.float64)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight


def _softmax(x: Float) -> Float:
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _rotate(x: Float, cosine: NDArray, sine: NDArray) -> Float:
    """``x * cos + rotate_half(x) * sin`` with tables repeated over both halves, of the dimensions that are rotated."""
    half = cosine.shape[-1]
    x, rest = x[..., : 2 * half], x[..., 2 * half :]
    turned = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return np.concatenate([x * np.tile(cosine, 2)[:, None, :] + turned * np.tile(sine, 2)[:, None, :], rest], axis=-1)


def attention_block(
    weights: AttentionWeights,
    x: NDArray,
    cache: KVCache,
    layer: int,
    places: Places,
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None:
    assert places.chain
    slots, positions = places.slots, places.positions
    heads, kv_heads, head_dim = weights.heads, weights.kv_heads, weights.head_dim
    projected = nested_matmul(weights.query_key_value, rms_norm(x, weights.norm, weights.epsilon))
    if weights.projection_bias is not None:
        projected = projected + weights.projection_bias
    query, key, value = np.split(projected, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
    query, key = (_normed(weights, *pair) for pair in ((query, weights.query_norm), (key, weights.key_norm)))
    value = value.reshape(len(x), kv_heads, head_dim)
    query = _rotate(query, cosine[positions], sine[positions]).reshape(len(x), kv_heads, heads // kv_heads, head_dim)
    key = _rotate(key, cosine[positions], sine[positions])
    keys, values = _shadow(cache)
    inner, table, pages, within = _where(cache, layer, places)
    keys[pages, inner, :, within] = key.astype(np.float16) if _int8 else key
    values[pages, inner, :, within] = value.astype(np.float16) if _int8 else value
    attended = np.empty((len(x), heads * head_dim))
    for token, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        seen = np.arange(0 if weights.window is None else max(0, position + 1 - weights.window), position + 1)
        page, place = table[slot, seen // cache.page_positions], seen % cache.page_positions
        if (page < 0).any():
            raise IndexError("a position that is seen has no page")
        scores = np.einsum("grd,pgd->grp", query[token], keys[page, inner, :, place])
        scores = scores * (head_dim**-0.5 if weights.scale is None else weights.scale)
        if weights.sinks is not None:
            sinks = np.broadcast_to(weights.sinks.reshape(*scores.shape[:2], 1), (*scores.shape[:2], 1))
            scores = np.concatenate([scores, sinks], axis=2)
        shares = _softmax(scores)[:, :, : len(seen)]
        attended[token] = np.einsum("grp,pgd->grd", shares, values[page, inner, :, place]).reshape(-1)
    output = nested_matmul(weights.output, attended)
    x += output if weights.output_bias is None else output + weights.output_bias


def _where(cache: KVCache, layer: int, places: Places) -> tuple[int, NDArray, NDArray, NDArray]:
    """A layer's place in a page, its table of pages, and pages and places in them of the tokens."""
    group, inner = cache.place(layer)
    table = cache.table[:, group :: cache.groups]
    pages = table[places.slots, places.positions // cache.page_positions]
    if (pages < 0).any():
        raise IndexError("a position has no page")
    return inner, table, pages, places.positions % cache.page_positions


def latent_block(
    weights: LatentWeights,
    x: NDArray,
    cache: KVCache,
    layer: int,
    places: Places,
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None:
    assert places.chain
    tokens, heads, rank, plain, rotary = len(x), weights.heads, weights.rank, weights.plain_dim, weights.rotary_dim
    cosine, sine = cosine[places.positions], sine[places.positions]
    projected = nested_matmul(weights.query_latent, rms_norm(x, weights.norm, weights.epsilon))
    query, latent, key = np.split(projected, [-(rank + rotary), -rotary], axis=1)
    if weights.query_up is not None:
        query = nested_matmul(weights.query_up, rms_norm(query, weights.query_norm, weights.latent_epsilon))
    query = query.reshape(tokens, heads, plain + rotary)
    order = np.arange(rotary).reshape(-1, 2).T.reshape(-1) if weights.interleaved else np.arange(rotary)
    turned = _rotate(query[..., plain:][..., order], cosine, sine)
    key = _rotate(key[:, None, order], cosine, sine)[:, 0]
    rows = np.concatenate([rms_norm(latent, weights.latent_norm, weights.latent_epsilon), key], axis=1)
    values = _shadow(cache)[1]
    inner, table, pages, within = _where(cache, layer, places)
    values[pages, inner, 0, within] = rows.astype(np.float16) if _int8 else rows
    key_up = _weights(weights.key_up, False).reshape(heads, rank, plain)
    value_up = _weights(weights.value_up, False).reshape(heads, -1, rank)
    queries = _inputs(query[..., :plain].reshape(-1, plain)).reshape(tokens, heads, plain)
    absorbed = np.concatenate([np.einsum("thi,hri->thr", queries, key_up), turned], axis=2)
    attended = np.empty((tokens, heads, rank))
    for token, (slot, position) in enumerate(zip(places.slots, places.positions, strict=True)):
        seen = np.arange(position + 1)
        found = values[table[slot, seen // cache.page_positions], inner, 0, seen % cache.page_positions]
        attended[token] = _softmax(absorbed[token] @ found.T * weights.scale) @ found[:, :rank]
    sums = _inputs(attended.reshape(-1, rank)).reshape(tokens, heads, rank)
    x += nested_matmul(weights.output, np.einsum("thr,hvr->thv", sums, value_up).reshape(tokens, -1))


def _normed(weights: AttentionWeights, rows: Float, norm: NDArray[np.float32] | None) -> Float:
    """Queries or keys (tokens, heads, head_dim), normed by head or over all of them."""
    if norm is not None and weights.full_norms:
        rows = rms_norm(rows, norm, weights.epsilon)
    heads = rows.reshape(len(rows), -1, weights.head_dim)
    return heads if norm is None or weights.full_norms else rms_norm(heads, norm, weights.epsilon)


def route(
    weights: RouterWeights,
    x: NDArray,
    allowed: NDArray[np.uint8] | None = None,
    draft_top_k: int | None = None,
    rescale: bool = True,
) -> Routing:
    hidden = rms_norm(x, weights.norm, weights.epsilon)
    logits = hidden @ weights.router.astype(np.float64).T
    logits = logits if weights.bias is None else logits + weights.bias
    probabilities = 1 / (1 + np.exp(-logits)) if weights.sigmoid else _softmax(logits)
    choice = probabilities if weights.selection_bias is None else probabilities + weights.selection_bias
    order = ranking(weights, choice)
    natural = np.sort(order[:, : weights.top_k], axis=1)
    natural_sum = np.take_along_axis(probabilities, natural, axis=1).sum(axis=1, keepdims=True)
    experts = natural
    if allowed is not None:
        size = min(draft_top_k or weights.top_k, weights.top_k, int(np.count_nonzero(allowed)))
        usable = order[allowed[order] != 0].reshape(len(order), -1)
        experts = np.sort(usable[:, :size], axis=1)
    chosen = np.take_along_axis(probabilities, experts, axis=1)
    if allowed is not None and rescale:
        chosen = chosen / chosen.sum(axis=1, keepdims=True) * (1.0 if weights.normalize else natural_sum)
    elif weights.normalize:
        chosen = chosen / natural_sum
    chosen = chosen * weights.scaling
    ranked = order[:, : 2 * weights.top_k].astype(np.int32)
    return Routing(hidden, ranked, np.take_along_axis(probabilities, ranked, axis=1), experts.astype(np.int32), chosen)


def expert_ffn(
    layout: ExpertLayout,
    addresses: NDArray[np.int64],
    hidden: NDArray,
    experts: NDArray[np.int32],
    weights: NDArray,
    x: NDArray,
    draft: bool = False,
    offset: float = 8.0,
    chain: bool = False,
    terms: ExpertTerms | None = None,
) -> None:
    for expert in np.unique(experts[experts >= 0]):
        tokens, place = np.nonzero(experts == expert)
        matrices = expert_matrices(layout, addresses, int(expert), draft)
        gate = nested_matmul(matrices["gate"], hidden[tokens], draft, offset=offset)
        up = nested_matmul(matrices["up"], hidden[tokens], draft, offset=offset)
        if terms is None:
            inner = gate / (1 + np.exp(-gate)) * up
        else:
            gate = np.minimum(gate + terms.gate[expert], terms.limit)
            up = np.clip(up + terms.up[expert], -terms.limit, terms.limit)
            inner = gate / (1 + np.exp(-terms.alpha * gate)) * (up + 1)
        down = nested_matmul(matrices["down"], inner, draft, offset=offset)
        if terms is not None:
            down = down + terms.down[expert]
        x[tokens] += weights[tokens, place][:, None] * down


def shared_weights(gate: NDArray[np.float32] | None, hidden: NDArray) -> Float:
    return np.ones((len(hidden), 1)) if gate is None else 1 / (1 + np.exp(-(hidden @ gate)))[:, None]


forward = partial(
    bitslice.forward, operations=Operations(attention_block, rms_norm, route, expert_ffn, shared_weights, latent_block)
)


def embed(matrix: NestedMatrix, tokens: NDArray[np.int32]) -> Float:
    return _weights(matrix, False)[tokens]


def logits(norm: NDArray, epsilon: float, head: NestedMatrix, x: NDArray) -> Float:
    return nested_matmul(head, rms_norm(x, norm, epsilon))


def sample(logits: NDArray, parameters: SamplingParameters, position: int, adjusted: NDArray | None = None) -> Sample:
    """Greedy in float64; what else is asked for is left to bitslice."""
    if parameters.temperature != 0 or adjusted is not None:
        return bitslice.sample(logits.astype(np.float32), parameters, position, adjusted)
    probabilities = _softmax(logits.astype(np.float64))
    token = int(np.argmax(logits))
    return Sample(token, float(probabilities[token]), float(np.log(probabilities[token])))
