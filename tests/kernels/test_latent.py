"""Native latent attention and groups of experts against their NumPy definitions: options, lengths, pages, refusals."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import KVCache, LatentWeights, NestedMatrix, Places, RouterWeights, rotary_tables
from elmoe.bitslice.formats import StackedMatrix, quantized
from elmoe.errors import NumericsError
from elmoe.models.formats import FORMATS
from tests.kernels.test_kernels import normal, same_bits

HIDDEN, ROTARY = 48, 16


def latent_case(rng, heads, rank, plain, value, query_rank=None, format="nested8", interleaved=True):
    def matrix(rows, columns, magnitude=None):
        return quantized(FORMATS[format], normal(rng, rows, columns, magnitude=magnitude or columns**-0.5))

    queries = heads * (plain + ROTARY)
    first = matrix(query_rank or queries, HIDDEN)
    return LatentWeights(
        norm=normal(rng, HIDDEN) + 1,
        query_latent=StackedMatrix((first, NestedMatrix.from_weights(normal(rng, rank + ROTARY, HIDDEN, magnitude=0.3)))),
        query_norm=None if query_rank is None else normal(rng, query_rank) + 1,
        query_up=None if query_rank is None else matrix(queries, query_rank),
        latent_norm=normal(rng, rank) + 1,
        key_up=matrix(heads * rank, plain), value_up=matrix(heads * value, rank),
        output=matrix(HIDDEN, heads * value, magnitude=0.1),
        heads=heads, plain_dim=plain, rotary_dim=ROTARY, epsilon=1e-5, latent_epsilon=1e-6,
        scale=0.3, interleaved=interleaved,
    )  # fmt: skip


def empty_cache(weights, pages, layers, page_positions, table, places=None):
    width = weights.rank + ROTARY
    keys = np.zeros((pages, layers, 1, page_positions // 16, 0, 16), np.float16)
    return KVCache(keys, np.full((pages, layers, 1, page_positions, width), np.nan, np.float16), table, places)


CASES = {
    "one matrix of queries": dict(heads=4, rank=32, plain=24, value=16),
    "query rank": dict(heads=3, rank=48, plain=33, value=32, query_rank=48, interleaved=False),
    "many heads": dict(heads=20, rank=16, plain=16, value=16, query_rank=16),
    "4 bits": dict(heads=4, rank=32, plain=32, value=32, format="affine4_k"),
    "more heads than lanes of a run": dict(heads=70, rank=96, plain=8, value=16),
}


@functools.cache
def defined(name):
    """Weights, page tables, and calls with what the definition makes of them: two sequences over borders of pages."""
    rng = np.random.default_rng(len(name))
    weights = latent_case(rng, **CASES[name])
    cosine, sine = rotary_tables(128, ROTARY, 10000.0)
    table = rng.permutation(8).astype(np.int32).reshape(2, 4)
    cache, lengths, calls = empty_cache(weights, 8, 2, 32, table), [0, 0], []
    for counts in ((1, 0), (14, 3), (1, 1), (1, 12), (16, 1), (2, 1), (40, 20), (1, 1), (30, 7), (3, 1)):
        slots = np.repeat([0, 1], counts).astype(np.int32)
        positions = np.concatenate([np.arange(lengths[s], lengths[s] + counts[s]) for s in (0, 1)]).astype(np.int32)
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        x = normal(rng, len(slots), HIDDEN)
        expected = x.copy()
        bitslice.latent_block(weights, expected, cache, 1, Places(slots, positions), cosine, sine)
        calls.append((x, Places(slots, positions), expected))
    return weights, table, calls, (cosine, sine), cache


@pytest.mark.parametrize("name", CASES)
def test_latent_attention(machine, name):
    """Outputs and cache bytes. What was never written is NaN, and is never seen."""
    weights, table, calls, tables, theirs = defined(name)
    ours = empty_cache(weights, 8, 2, 32, table)
    for x, places, expected in calls:
        found = x.copy()
        kernels.latent_block(weights, found, ours, 1, places, *tables)
        assert same_bits(found, expected) and np.isfinite(found).all()
    assert same_bits(ours.values, theirs.values) and np.isnan(ours.values[:, 0]).all()


@functools.cache
def long_calls(page_positions):
    rng = np.random.default_rng(page_positions)
    weights = latent_case(rng, 5, 80, 32, 16)
    pages = 1024 // page_positions
    table = rng.permutation(2 * pages).astype(np.int32).reshape(2, pages)
    filled = empty_cache(weights, 2 * pages, 1, page_positions, table)
    filled.values[:] = rng.standard_normal(filled.values.shape).astype(np.float16)
    cosine, sine = rotary_tables(1024, ROTARY, 10000.0)
    calls = []
    for slots, positions in (
        ([0], [999]), ([0], [63]), ([0], [64]), ([1] * 12, range(53, 65)), ([0] * 40, range(960, 1000)),
        ([0] * 5 + [1] * 15, [5, 999, 16, 17, 0, *range(100, 115)]),
    ):  # fmt: skip
        places = Places(np.array(slots, np.int32), np.array(list(positions), np.int32))
        x = normal(rng, len(slots), HIDDEN)
        cache, expected = cut_behind(filled, places), x.copy()
        bitslice.latent_block(weights, expected, cache, 0, places, cosine, sine)
        calls.append((x, places, expected))
    return weights, filled, calls, (cosine, sine)


def cut_behind(filled, places):
    """The cache, NaN behind the last position of a slot in the call."""
    cut = KVCache(filled.keys, filled.values.copy(), filled.table)
    nothing = np.empty((1, 0), np.float16), np.full((1, filled.values.shape[4]), np.nan, np.float16)
    for slot in (0, 1):
        seen = int(places.positions[places.slots == slot].max(initial=-1)) + 1
        for position in range(seen, min(seen + 100, 1024)):
            cut.write(0, slot, position, *nothing)
    return cut


@pytest.mark.parametrize("page_positions", [16, 64])
def test_latent_attention_to_many_positions(machine, page_positions):
    weights, filled, calls, tables = long_calls(page_positions)
    for x, places, expected in calls:
        found = x.copy()
        kernels.latent_block(weights, found, cut_behind(filled, places), 0, places, *tables)
        assert same_bits(found, expected) and np.isfinite(found).all()


def test_absorbed_attention_is_the_attention_that_it_stands_for():
    """Keys and values of every head, made of the latents in float64, give the same outputs up to rounding."""
    rng = np.random.default_rng(3)
    heads, rank, plain, value = 4, 32, 24, 16
    weights = latent_case(rng, heads, rank, plain, value)
    cache = empty_cache(weights, 1, 1, 32, np.zeros((1, 1), np.int32))
    cosine, sine = rotary_tables(32, ROTARY, 10000.0)
    positions = np.arange(20, dtype=np.int32)
    x = normal(rng, 20, HIDDEN)
    found = x.copy()
    bitslice.latent_block(weights, found, cache, 0, Places(np.zeros(20, np.int32), positions), cosine, sine)
    rows = cache.gather(0, 0, 20)[1][0].astype(np.float64)
    normed = bitslice.rms_norm(x, weights.norm, weights.epsilon)
    query = (
        bitslice.matmul(weights.query_latent, normed)[-1, : heads * (plain + ROTARY)].reshape(heads, -1).astype(np.float64)
    )
    turned = (query[:, plain::2] + 1j * query[:, plain + 1 :: 2]) * (cosine[19] + 1j * sine[19])
    query[:, plain::2], query[:, plain + 1 :: 2] = turned.real, turned.imag
    key_up = weights.key_up.dequantize().astype(np.float64).reshape(heads, rank, plain)
    value_up = weights.value_up.dequantize().astype(np.float64).reshape(heads, value, rank)
    keys = np.concatenate(
        [np.einsum("pr,hri->hpi", rows[:, :rank], key_up), np.repeat(rows[None, :, rank:], heads, axis=0)], axis=2
    )
    scores = np.einsum("hi,hpi->hp", query, keys) * weights.scale
    shares = np.exp(scores - scores.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    values = np.einsum("hp,pr,hvr->hv", shares, rows[:, :rank], value_up).reshape(-1)
    expected = weights.output.dequantize().astype(np.float64) @ values
    assert np.abs(found[-1] - x[-1] - expected).max() < 0.03 * np.abs(expected).max()


def test_a_tree_of_tokens_is_defined():
    """The definition computes branches: a token with a sibling gives what it gives alone."""
    rng = np.random.default_rng(4)
    weights = latent_case(rng, 2, 16, 8, 16)
    tables, zero = rotary_tables(32, ROTARY, 10000.0), np.zeros(3, np.int32)
    x = normal(rng, 3, HIDDEN)
    outcomes = []
    for tokens, cells in (([0, 1], [0, 1]), ([0, 1, 2], [0, 1, 2])):
        cache = empty_cache(weights, 1, 1, 32, np.zeros((1, 1), np.int32))
        positions = np.array([0, 1, 1], np.int32)[tokens]
        parents = np.array([-1, 0, 0], np.int32)[tokens]
        found = x[tokens]
        places = Places(zero[tokens], positions, np.array(cells, np.int32), parents)
        bitslice.latent_block(weights, found, cache, 0, places, *tables)
        outcomes.append(found)
    assert same_bits(outcomes[0], outcomes[1][:2]) and not same_bits(outcomes[1][1], outcomes[1][2])


def test_latent_attention_refuses_what_does_not_fit(machine):
    rng = np.random.default_rng(6)
    weights = latent_case(rng, 4, 32, 24, 16)
    table = np.zeros((1, 2), np.int32)
    zero, tables = np.zeros(1, np.int32), rotary_tables(200, ROTARY, 10000.0)

    def call(cache, position=0, weights=weights, tables=tables, layer=0):
        places = Places(zero, np.array([position], np.int32))
        kernels.latent_block(weights, normal(rng, 1, HIDDEN), cache, layer, places, *tables)

    for position, layer in ((64, 0), (-1, 0), (0, 2), (0, -1)):
        with pytest.raises(ValueError, match=r"range|cache"):
            call(empty_cache(weights, 1, 1, 32, table), position, layer=layer)
    with pytest.raises(ValueError, match="no cache page"):
        call(empty_cache(weights, 1, 1, 32, table - 1))
    wide = KVCache(np.zeros((1, 1, 1, 2, 48, 16), np.float16), np.zeros((1, 1, 1, 32, 48), np.float16), table)
    narrow = KVCache(np.zeros((1, 1, 1, 2, 0, 16), np.float16), np.zeros((1, 1, 1, 32, 32), np.float16), table)
    for cache in (wide, narrow):
        with pytest.raises(ValueError, match="the cache does not fit"):
            call(cache)
    with pytest.raises(ValueError, match="rotary tables"):
        call(empty_cache(weights, 1, 1, 32, table), tables=rotary_tables(200, 8, 10000.0))
    huge = replace(weights, latent_norm=np.full(32, 1e30, np.float32))
    with pytest.raises(NumericsError, match=r"layer 0: a latent or rotary key is not finite"):
        call(empty_cache(weights, 1, 1, 32, table), weights=huge)
    for wrong in (
        {"latent_norm": np.ones(24, np.float32)}, {"key_up": weights.value_up}, {"heads": 5}, {"plain_dim": 23},
        {"query_norm": np.ones(64, np.float32)}, {"rotary_dim": 32}, {"output": weights.key_up},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"fit|give both|multiples|differ"):
            call(empty_cache(weights, 1, 1, 32, table), weights=replace(weights, **wrong))


@pytest.mark.parametrize("best_two", [False, True])
def test_route_by_groups(machine, best_two):
    rng = np.random.default_rng(8)
    plain = RouterWeights(normal(rng, HIDDEN) + 1, normal(rng, 24, HIDDEN), 1e-6, 4, True)
    weights = replace(plain, groups=6, kept_groups=2, best_two=best_two)
    biased = replace(weights, sigmoid=True, selection_bias=normal(rng, 24, magnitude=0.5), scaling=1.8, normalize=False)
    allowed = (rng.random(24) < 0.3).astype(np.uint8) | (np.arange(24) < 1)
    for router in (weights, biased, replace(biased, groups=3, kept_groups=3), replace(weights, ranked=24)):
        for tokens in (1, 5, 70):
            x = normal(rng, tokens, HIDDEN)
            for choice in ((), (allowed, 2, True), (allowed, 4, False)):
                ours, theirs = kernels.route(router, x, *choice), bitslice.route(router, x, *choice)
                for name in ("hidden", "ranked", "scores", "experts", "weights"):
                    assert same_bits(getattr(ours, name), getattr(theirs, name)), name
    x = normal(rng, 200, HIDDEN)
    found, free = bitslice.route(weights, x), bitslice.route(plain, x)
    assert (np.array([len(set(row // 4)) for row in found.experts]) <= 2).all()
    assert not np.array_equal(found.experts, free.experts)
    assert np.array_equal(np.sort(found.ranked[:, :4], axis=1), found.experts)


def test_groups_that_tie_and_those_that_do_not_fit(machine):
    """Equal scores: the lowest groups, and in them the lowest experts."""
    router = RouterWeights(
        np.ones(16, np.float32), np.zeros((12, 16), np.float32), 1e-6, 3, True, groups=4, kept_groups=2, best_two=True
    )
    x = np.ones((2, 16), np.float32)
    for backend in (kernels, bitslice):
        assert backend.route(router, x).experts.tolist() == [[0, 1, 2]] * 2
        assert backend.route(router, x).ranked.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    for wrong in ({"groups": 5}, {"kept_groups": 5}, {"groups": 12, "kept_groups": 2}, {"groups": 12, "kept_groups": 3}):
        with pytest.raises(ValueError, match="groups of experts do not fit"):
            kernels.route(replace(router, **wrong), x)
