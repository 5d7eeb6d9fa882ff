"""Normalisation, rotary embedding and attention over an fp16 KV cache, in the canonical order.

The cache is paged. A page holds ``page_positions`` positions of every layer; within it keys lie in blocks of 16 positions
with one SIMD lane per position, values lie position by position. A score is one chain over the head's dimensions
(ascending); the softmax takes the exact maximum first, sums its denominator over 16 lanes (position mod 16); an output is
one chain over positions (ascending) and one division. So no result depends on what else is in the batch.

A window limits the positions that a token sees to the last ones; the lane of a position stays its position mod 16. A sink is
a score without a value: it takes part in the maximum, and in the denominator after the sum over lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.arithmetic import LANES, exp, lane_sum
from elmoe.bitslice.formats import Matrix, matmul
from elmoe.errors import NumericsError


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """Weights of one attention block.

    ``query_key_value``: rows of q, then k, then v. ``query_norm``, ``key_norm``: (head_dim,) by head, or the width of all
    heads of the token together, or None for families without. ``projection_bias``: (rows of ``query_key_value``,);
    ``output_bias``: (hidden,). ``sinks``: (heads,). ``window``: positions that a token sees, itself included. ``scale``: of
    the scores, see ``attend``.
    """

    norm: NDArray[np.float32]
    query_key_value: Matrix
    query_norm: NDArray[np.float32] | None
    key_norm: NDArray[np.float32] | None
    output: Matrix
    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    projection_bias: NDArray[np.float32] | None = None
    output_bias: NDArray[np.float32] | None = None
    sinks: NDArray[np.float32] | None = None
    window: int | None = None
    scale: float | None = None

    @property
    def full_norms(self) -> bool:
        """Whether queries and keys are normed over all heads together."""
        return self.query_norm is not None and self.query_norm.size != self.head_dim


@dataclass(slots=True, eq=False)
class Places:
    """Where the tokens of a call are; (tokens,) int32 each.

    ``slots``: the cache slot of a token's sequence. ``positions``: its place in the text, from which its rotary embedding
    comes. ``cells``: where in the slot its keys and values lie; None is the cell of its position. ``parents``: the token of
    this call that is before it in the text; -1, and None for all, where the text before it lies in cells 0..position-1.
    A token sees its own cell and those that its parent sees. A chain is a tree without branches: every token is in the cell
    of its position.
    """

    slots: NDArray[np.int32]
    positions: NDArray[np.int32]
    cells: NDArray[np.int32] | None = None
    parents: NDArray[np.int32] | None = None

    @property
    def chain(self) -> bool:
        """Whether every token is in the cell of its position, and so sees the cells before it."""
        return self.cells is None or np.array_equal(self.cells, self.positions)

    def seen(self) -> list[NDArray[np.int32]]:
        """The cells that each token sees, by position; its own is the last.

        :raises ValueError: a parent is not the token before, two tokens are in one cell, or one is in a cell that it sees.
        """
        cells = self.positions if self.cells is None else self.cells
        parents = np.full_like(cells, -1) if self.parents is None else self.parents
        if len(set(zip(self.slots.tolist(), cells.tolist(), strict=True))) < len(cells):
            raise ValueError("two tokens are in one cell")
        result: list[NDArray[np.int32]] = []
        for token, (parent, position) in enumerate(zip(parents.tolist(), self.positions.tolist(), strict=True)):
            if not -1 <= parent < token or (parent >= 0 and self.slots[parent] != self.slots[token]):
                raise ValueError(f"token {token} has the parent {parent}, which is not before it in its sequence")
            before = result[parent] if parent >= 0 else np.arange(position, dtype=np.int32)
            if len(before) != position:
                raise ValueError(f"token {token} at position {position} has a parent at position {len(before) - 1}")
            if cells[token] in before:
                raise ValueError(f"token {token} is in the cell {cells[token]}, which it sees")
            result.append(np.append(before, cells[token]))
        return result


@dataclass(frozen=True, eq=False)
class KVCache:
    """Pages of keys and values, fp16.

    ``keys``: (pages, layers, kv_heads, page_positions / 16, head_dim, 16). ``values``: (pages, layers, kv_heads,
    page_positions, head_dim). ``table``: (slots, pages per slot) int32 page of each stretch of a slot's cells, -1 where none
    is assigned. ``places``: (layers of the model, 2) int32 where layers lie in several groups, each with pages of its own:
    the group of a layer, and its place in a page; the pages of a stretch are side by side in the table, one of each group.
    None: one group, a layer is in its own place. Of latent attention, ``keys`` have no dimensions, and ``values`` are the
    latent and behind it the rotary key, of one head.
    """

    keys: NDArray[np.float16]
    values: NDArray[np.float16]
    table: NDArray[np.int32]
    places: NDArray[np.int32] | None = None

    @property
    def page_positions(self) -> int:
        """Cells in a page, a multiple of 16."""
        return self.values.shape[3]

    @property
    def groups(self) -> int:
        """Groups of layers with pages of their own."""
        return 1 if self.places is None else int(self.places[:, 0].max()) + 1

    def place(self, layer: int) -> tuple[int, int]:
        """The group of a layer, and its place in a page."""
        return (0, layer) if self.places is None else (int(self.places[layer, 0]), int(self.places[layer, 1]))

    def gather(self, layer: int, slot: int, length: int, first: int = 0) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Keys and values of cells first..length-1 of a slot: (kv_heads, length - first, head_dim) each."""
        group, inner = self.place(layer)
        start = first // self.page_positions
        pages = self.table[slot, group :: self.groups][start : -(-length // self.page_positions)]
        blocks = self.keys[pages, inner]  # (pages, kv_heads, blocks, head_dim, 16)
        kv_heads, cells = blocks.shape[1], len(pages) * self.page_positions
        keys = blocks.transpose(1, 0, 2, 4, 3).reshape(kv_heads, cells, -1 if blocks.size else 0)
        values = self.values[pages, inner].transpose(1, 0, 2, 3).reshape(kv_heads, cells, -1)
        here = slice(first - start * self.page_positions, length - start * self.page_positions)
        return keys[:, here], values[:, here]

    def write(self, layer: int, slot: int, cell: int, keys: NDArray[np.float16], values: NDArray[np.float16]) -> None:
        """Store one token's (kv_heads, head_dim) keys and values."""
        group, inner = self.place(layer)
        page, within = self.table[slot, cell // self.page_positions * self.groups + group], cell % self.page_positions
        self.keys[page, inner, :, within // LANES, :, within % LANES] = keys
        self.values[page, inner, :, within] = values


def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], epsilon: float) -> NDArray[np.float32]:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis (Zhang and Sennrich, arXiv 1910.07467)."""
    mean: NDArray = lane_sum(x * x) / np.float32(x.shape[-1])
    inverse: NDArray = np.float32(1) / np.sqrt(mean + np.float32(epsilon))
    return (x * inverse[..., None]) * weight


def rotate(x: NDArray[np.float32], cosine: NDArray[np.float32], sine: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rotary embedding, half-split form (arXiv 2104.09864): x (tokens, heads, head_dim), tables (tokens, pairs); the first
    ``2 * pairs`` dimensions are rotated."""
    half = cosine.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cosine, sine = cosine[:, None, :], sine[:, None, :]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, rest], axis=-1)


def attend(
    query: NDArray[np.float32], keys: NDArray[np.float16], values: NDArray[np.float16], first: int = 0,
    sinks: NDArray[np.float32] | None = None, scale: np.float32 | None = None,
) -> NDArray[np.float32]:  # fmt: skip
    """One token: query (heads, head_dim), keys and values (kv_heads, length, head_dim) of the positions from ``first`` on,
    ``sinks`` (heads,) -> (heads, head_dim). ``scale`` of the scores: None is ``1 / sqrt(head_dim)``. Values may have fewer
    dimensions than keys, and then the result has as few."""
    heads, head_dim = query.shape
    kv_heads, length, _ = keys.shape
    repeat = heads // kv_heads
    wide_keys = np.repeat(keys.astype(np.float32), repeat, axis=0)
    wide_values = np.repeat(values.astype(np.float32), repeat, axis=0)
    scores = np.zeros((heads, length), np.float32)
    for i in range(head_dim):
        scores = scores + query[:, i, None] * wide_keys[:, :, i]
    scores = scores * (np.float32(1) / np.sqrt(np.float32(head_dim)) if scale is None else scale)
    largest = scores.max(axis=1)
    if sinks is not None:
        largest = np.maximum(largest, sinks)
    weights = exp(scores - largest[:, None])
    result = np.zeros((heads, values.shape[2]), np.float32)
    for position in range(length):
        result = result + weights[:, position, None] * wide_values[:, position]
    divisor = lane_sum(np.pad(weights, ((0, 0), (first % LANES, 0))))
    if sinks is not None:
        divisor = divisor + exp(sinks - largest)
    return result / divisor[:, None]


def attention_block(
    weights: AttentionWeights,
    x: NDArray[np.float32],
    cache: KVCache,
    layer: int,
    places: Places,
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None:
    """Add attention to the residual stream ``x`` (tokens, hidden) in place and write keys and values to the cache.

    A token attends to the cells that it sees (see ``Places``), tokens of this call included, in the order of positions:
    where they lie changes no bit. ``cosine``, ``sine``: tables (positions, pairs) indexed by position, see ``rotate``.

    :raises NumericsError: a key or value is not finite in fp16. :raises ValueError: places contradict each other.
    """
    tokens, slots, positions = x.shape[0], places.slots, places.positions
    seen, cells = (None, positions) if places.chain or places.cells is None else (places.seen(), places.cells)
    heads, kv_heads, head_dim = weights.heads, weights.kv_heads, weights.head_dim
    projected = matmul(weights.query_key_value, rms_norm(x, weights.norm, weights.epsilon))
    if weights.projection_bias is not None:
        projected = projected + weights.projection_bias
    query, key, value = np.split(projected, [heads * head_dim, (heads + kv_heads) * head_dim], axis=1)
    query, key, value = (
        _normed(weights, query, weights.query_norm), _normed(weights, key, weights.key_norm),
        value.reshape(tokens, kv_heads, head_dim),
    )  # fmt: skip
    query = rotate(query, cosine[positions], sine[positions])
    with np.errstate(over="ignore"):
        key16 = rotate(key, cosine[positions], sine[positions]).astype(np.float16)
        value16 = value.astype(np.float16)
    if not (np.isfinite(key16).all() and np.isfinite(value16).all()):
        raise NumericsError(f"layer {layer}: a key or value is not finite in fp16")
    for token in range(tokens):
        cache.write(layer, int(slots[token]), int(cells[token]), key16[token], value16[token])
    attended = np.empty((tokens, heads * head_dim), np.float32)
    scale = None if weights.scale is None else np.float32(weights.scale)
    for token in range(tokens):
        slot, length = int(slots[token]), int(positions[token]) + 1
        low = 0 if weights.window is None else max(0, length - weights.window)
        if seen is None:
            keys, values = cache.gather(layer, slot, length, low)
        else:
            keys, values = (part[:, seen[token][low:]] for part in cache.gather(layer, slot, max(seen[token]) + 1))
        attended[token] = attend(query[token], keys, values, low, weights.sinks, scale).reshape(-1)
    output = matmul(weights.output, attended)
    x += output if weights.output_bias is None else output + weights.output_bias


def _normed(weights: AttentionWeights, rows: NDArray[np.float32], norm: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Queries or keys of all heads, (tokens, width) -> (tokens, heads, head_dim), normed where there is a norm."""
    if norm is not None and weights.full_norms:
        rows = rms_norm(rows, norm, weights.epsilon)
    heads = rows.reshape(len(rows), -1, weights.head_dim)
    return heads if norm is None or weights.full_norms else rms_norm(heads, norm, weights.epsilon)
