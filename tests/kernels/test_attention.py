"""Native attention against its NumPy definition: shapes, lengths, pages, what lies behind a length, fp16, refusals."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import AttentionWeights, KVCache, NestedMatrix, Places, rotary_tables
from elmoe.errors import NumericsError
from tests.kernels.test_kernels import normal, same_bits


def attention_case(rng, hidden, heads, kv_heads, head_dim, norms=True):
    weights = AttentionWeights(
        normal(rng, hidden) + 1,
        NestedMatrix.from_weights(normal(rng, (heads + 2 * kv_heads) * head_dim, hidden, magnitude=hidden**-0.5)),
        normal(rng, head_dim) + 1 if norms else None,
        normal(rng, head_dim) + 1 if norms else None,
        NestedMatrix.from_weights(normal(rng, hidden, heads * head_dim, magnitude=0.1)),
        heads, kv_heads, head_dim, 1e-6,
    )  # fmt: skip

    def cache() -> KVCache:
        table = np.array([[3, 0, 5], [1, 4, 2]], np.int32)
        keys = np.zeros((6, 2, kv_heads, 2, head_dim, 16), np.float16)
        return KVCache(keys, np.zeros((6, 2, kv_heads, 32, head_dim), np.float16), table)

    return weights, cache(), cache()


@pytest.mark.parametrize(
    "hidden,heads,kv_heads,head_dim,norms",
    [(48, 4, 2, 16, True), (40, 8, 1, 32, True), (64, 3, 3, 48, False), (64, 2, 1, 128, True)],
)
def test_attention(machine, hidden, heads, kv_heads, head_dim, norms):
    """Prompts and single steps over page borders, two sequences mixed in a call; outputs and cache bytes."""
    rng = np.random.default_rng(hidden)
    weights, ours, theirs = attention_case(rng, hidden, heads, kv_heads, head_dim, norms)
    cosine, sine = rotary_tables(96, head_dim, 10000.0)
    lengths = [0, 0]
    for counts in ((1, 0), (14, 3), (1, 1), (1, 12), (16, 1), (2, 1), (40, 20), (1, 1), (9, 0)):
        slots = np.repeat([0, 1], counts).astype(np.int32)
        positions = np.concatenate([np.arange(lengths[s], lengths[s] + counts[s]) for s in (0, 1)]).astype(np.int32)
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        x = normal(rng, len(slots), hidden)
        expected = x.copy()
        bitslice.attention_block(weights, expected, theirs, 1, Places(slots, positions), cosine, sine)
        kernels.attention_block(weights, x, ours, 1, Places(slots, positions), cosine, sine)
        assert same_bits(x, expected)
        assert same_bits(ours.keys, theirs.keys) and same_bits(ours.values, theirs.values)


@functools.cache
def long_attention(heads: int, kv_heads: int, head_dim: int, page_positions: int):
    """Weights, a filled cache, and calls (x, slots, positions, expected). NaN lies behind the last position of a slot."""
    rng = np.random.default_rng(heads)
    weights, _, _ = attention_case(rng, 48, heads, kv_heads, head_dim)
    pages = 1024 // page_positions
    table = rng.permutation(3 * pages).astype(np.int32).reshape(3, pages)
    keys = rng.standard_normal((3 * pages, 1, kv_heads, page_positions // 16, head_dim, 16)).astype(np.float16)
    values = rng.standard_normal((3 * pages, 1, kv_heads, page_positions, head_dim)).astype(np.float16)
    filled = KVCache(keys, values, table)
    ends = {1: (1,), 15: (3, 15), 16: (5, 16), 17: (8, 9), 63: (31, 63), 64: (32, 64), 65: (33, 64), 1000: (1, 2, 12, 40)}
    places = [
        (np.zeros(count, np.int32), np.arange(length - count, length, dtype=np.int32))
        for length, counts in ends.items()
        for count in counts
    ]
    # Neighbours of one sequence far apart and in any order, and three sequences in a call.
    ragged = ([5, 999, 16, 17, 0], range(60, 75), range(100, 141))
    places.append((np.repeat([0, 1, 2], [5, 15, 41]).astype(np.int32), np.concatenate(ragged).astype(np.int32)))
    cosine, sine = rotary_tables(1024, head_dim, 10000.0)
    calls = []
    for slots, positions in places:
        x = normal(rng, len(slots), 48)
        cache, expected = cut_behind(filled, slots, positions), x.copy()
        bitslice.attention_block(weights, expected, cache, 0, Places(slots, positions), cosine, sine)
        calls.append((x, slots, positions, expected))
    return weights, filled, calls


def cut_behind(filled: KVCache, slots: np.ndarray, positions: np.ndarray) -> KVCache:
    cut = KVCache(filled.keys.copy(), filled.values.copy(), filled.table)
    nothing = np.full((filled.keys.shape[2], filled.keys.shape[4]), np.nan, np.float16)
    for slot in range(len(filled.table)):
        seen = positions[slots == slot].max(initial=-1) + 1
        for position in range(seen, min(seen + 200, 1024)):
            cut.write(0, slot, position, nothing, nothing)
    return cut


@pytest.mark.parametrize("heads,kv_heads,head_dim,page_positions", [(2, 2, 48, 64), (12, 1, 80, 16), (8, 4, 32, 32)])
def test_attention_to_many_positions(machine, heads, kv_heads, head_dim, page_positions):
    """Lengths and counts of queries around the sizes of blocks, tiles and groups."""
    weights, filled, calls = long_attention(heads, kv_heads, head_dim, page_positions)
    cosine, sine = rotary_tables(1024, head_dim, 10000.0)
    for x, slots, positions, expected in calls:
        ours = x.copy()
        kernels.attention_block(
            weights, ours, cut_behind(filled, slots, positions), 0, Places(slots, positions), cosine, sine
        )
        assert same_bits(ours, expected), (len(slots), positions[-1])
        assert np.isfinite(ours).all()


def test_attention_ignores_what_lies_behind_the_length(machine):
    """Rejected drafts leave garbage in the cache; nothing of it may be seen."""
    rng = np.random.default_rng(5)
    weights, ours, theirs = attention_case(rng, 48, 4, 2, 16)
    ours.keys[:], ours.values[:] = np.float16(60000), np.float16(-60000)
    cosine, sine = rotary_tables(96, 16, 10000.0)
    for start, count in ((0, 5), (5, 1), (6, 12), (18, 1)):
        positions = np.arange(start, start + count, dtype=np.int32)
        x = normal(rng, count, 48)
        expected = x.copy()
        bitslice.attention_block(weights, expected, theirs, 0, Places(np.zeros_like(positions), positions), cosine, sine)
        kernels.attention_block(weights, x, ours, 0, Places(np.zeros_like(positions), positions), cosine, sine)
        assert same_bits(x, expected)


def test_attention_refuses_bad_places_and_values(machine):
    rng = np.random.default_rng(6)
    weights, cache, _ = attention_case(rng, 48, 4, 2, 16)
    cosine, sine = rotary_tables(200, 16, 10000.0)

    def call(slot: int, position: int, x: np.ndarray, layer: int = 0) -> None:
        kernels.attention_block(
            weights, x, cache, layer, Places(np.array([slot], np.int32), np.array([position], np.int32)), cosine, sine
        )  # fmt: skip

    for slot, position, layer in ((2, 0, 0), (-1, 0, 0), (0, -1, 0), (0, 96, 0), (0, 199, 0), (0, 0, 2), (0, 0, -1)):
        with pytest.raises(ValueError, match=r"range|page|cache"):
            call(slot, position, np.ones((1, 48), np.float32), layer)
    cache.table[0, 1] = -1
    with pytest.raises(ValueError, match="page"):
        call(0, 40, np.ones((1, 48), np.float32))
    huge = replace(weights, key_norm=np.full(16, 1e30, np.float32))
    with pytest.raises(NumericsError, match="layer 1"):
        kernels.attention_block(
            huge, normal(rng, 1, 48), cache, 1, Places(np.zeros(1, np.int32), np.zeros(1, np.int32)), cosine, sine
        )  # fmt: skip


def test_half_precision_rounds_alike():
    """Every fp16 border: values between neighbouring halves, subnormals, overflow, through the cache."""
    rng = np.random.default_rng(0)
    halves = np.arange(0, 0x7C00, 37, dtype=np.uint16).view(np.float16).astype(np.float32)
    borders = np.concatenate([halves, (halves[1:] + halves[:-1]) / 2, halves * np.float32(1.0003)])
    borders = borders[: len(borders) // 16 * 16].reshape(-1, 16)
    weights, _, _ = attention_case(rng, 16, 1, 1, 16, norms=False)
    assert np.isfinite(borders).all()
    # values reach the cache without rotation: identity projection, value rows
    identity = np.zeros((48, 16), np.float32)
    identity[32:] = np.eye(16)
    weights = replace(weights, norm=np.ones(16, np.float32), query_key_value=NestedMatrix.from_weights(identity))
    cosine, sine = rotary_tables(8, 16, 10000.0)
    for variant in kernels.variants():
        kernels.set_variant(variant)
        for row in borders[::7]:
            caches = [KVCache(np.zeros((1, 1, 1, 1, 16, 16), np.float16), np.zeros((1, 1, 1, 16, 16), np.float16),
                              np.zeros((1, 1), np.int32)) for _ in range(2)]  # fmt: skip
            zero = np.zeros(1, np.int32)
            for backend, cache in zip((kernels, bitslice), caches, strict=True):
                backend.attention_block(weights, row[None].copy(), cache, 0, Places(zero, zero), cosine, sine)
            assert same_bits(caches[0].values, caches[1].values)
    kernels.set_variant(None)
