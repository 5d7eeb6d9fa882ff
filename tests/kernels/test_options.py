"""What only some families have, against its NumPy definition: biases, full norms, sinks, windows, shared experts, terms."""

from __future__ import annotations

import functools
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import ExpertTerms, KVCache, Places, RouterWeights, rotary_tables
from elmoe.engine.decoder import Draft
from elmoe.errors import NumericsError
from elmoe.models.spec import Activation
from tests.kernels.test_attention import attention_case
from tests.kernels.test_forward import all_same, decoded
from tests.kernels.test_kernels import normal, packed_experts, same_bits
from tests.tiny import tiny_spec


def options(rng, weights, **wanted):
    """Weights with some of the options."""
    heads, kv_heads, head_dim = weights.heads, weights.kv_heads, weights.head_dim
    made = {
        "projection_bias": normal(rng, (heads + 2 * kv_heads) * head_dim), "output_bias": normal(rng, len(weights.norm)),
        "sinks": normal(rng, heads, magnitude=3.0), "query_norm": normal(rng, heads * head_dim) + 1,
        "key_norm": normal(rng, kv_heads * head_dim) + 1,
    }  # fmt: skip
    return replace(weights, **{key: made[key] if value is True else value for key, value in wanted.items()})


WANTED = [
    {"projection_bias": True, "output_bias": True},
    {"query_norm": True, "key_norm": True},
    {"query_norm": None, "key_norm": None, "sinks": True},
    {"window": 1, "sinks": True},
    {"window": 16},
    {"window": 23, "sinks": True, "projection_bias": True, "output_bias": True},
    {"window": 200},
    {"scale": 0.4},
    {"scale": 0.03, "window": 23, "sinks": True},
]


@functools.cache
def defined(index: int, grouped: bool):
    """Weights, an empty cache, and calls with what the definition makes of them."""
    rng = np.random.default_rng(5)
    base, _, _ = attention_case(rng, 48, 6, 2, 32)
    weights = options(rng, base, **WANTED[index])
    window, lengths, calls = weights.window, [0, 0], []
    groups, layer = (2, 1) if grouped else (1, 0)
    places = np.array([[0, 0], [1, 0]], np.int32) if grouped else None
    table = rng.permutation(2 * 4 * groups).astype(np.int32).reshape(2, 4 * groups)
    shape = (table.size, 1, 2)
    empty = [np.full((*shape, 2, 32, 16), np.nan, np.float16), np.full((*shape, 32, 32), np.nan, np.float16)]
    cosine, sine = rotary_tables(128, 32, 10000.0)
    cache = KVCache(*(array.copy() for array in empty), table.copy(), places)
    for counts in ((1, 0), (14, 3), (1, 1), (1, 12), (16, 1), (2, 1), (40, 20), (1, 1), (30, 7), (3, 1)):
        slots = np.repeat([0, 1], counts).astype(np.int32)
        positions = np.concatenate([np.arange(lengths[s], lengths[s] + counts[s]) for s in (0, 1)]).astype(np.int32)
        if window is not None:
            for slot in (0, 1):
                behind = max(0, lengths[slot] + 1 - window) // 32
                cache.table[slot, layer : behind * groups : groups] = -1
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
        x = normal(rng, len(slots), 48)
        expected = x.copy()
        bitslice.attention_block(weights, expected, cache, layer, Places(slots, positions), cosine, sine)
        calls.append((x, Places(slots, positions), cache.table.copy(), expected))
    return weights, layer, KVCache(*empty, table, places), calls, (cosine, sine), cache


@pytest.mark.parametrize("index", range(len(WANTED)), ids=lambda index: ", ".join(WANTED[index]) + f" {index}")
@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "two groups"])
def test_attention_options(machine, index, grouped):
    """Prompts and steps of two sequences over borders of pages and windows; pages behind the window are gone."""
    weights, layer, empty, calls, tables, theirs = defined(index, grouped)
    ours = KVCache(empty.keys.copy(), empty.values.copy(), empty.table.copy(), empty.places)
    for x, places, table, expected in calls:
        ours.table[:], found = table, x.copy()
        kernels.attention_block(weights, found, ours, layer, places, *tables)
        assert same_bits(found, expected) and np.isfinite(found).all()
    assert same_bits(ours.keys, theirs.keys) and same_bits(ours.values, theirs.values)


def test_a_page_within_the_window_is_needed(machine):
    rng = np.random.default_rng(1)
    base, cache, _ = attention_case(rng, 48, 4, 2, 16)
    cosine, sine = rotary_tables(96, 16, 10000.0)
    slots, positions = np.zeros(1, np.int32), np.array([70], np.int32)
    cache.table[0, 0] = -1
    for window, refused in ((7, False), (39, False), (40, True), (None, True)):
        weights, x = replace(base, window=window), normal(rng, 1, 48)
        if refused:
            with pytest.raises(ValueError, match="no cache page"):
                kernels.attention_block(weights, x, cache, 0, Places(slots, positions), cosine, sine)
        else:
            kernels.attention_block(weights, x, cache, 0, Places(slots, positions), cosine, sine)


def test_a_sink_takes_its_share(machine):
    """With one position, equal logits halve the value; a huge sink takes all, a tiny one nothing."""
    rng = np.random.default_rng(2)
    base, cache, other = attention_case(rng, 48, 1, 1, 16, norms=False)
    zero = np.zeros(1, np.int32)
    cosine, sine = rotary_tables(8, 16, 10000.0)
    x = normal(rng, 1, 48)

    def attended(sink, target):
        result = x.copy()
        weights = replace(base, sinks=np.array([sink], np.float32))
        kernels.attention_block(weights, result, target, 0, Places(zero, zero), cosine, sine)
        return result - x

    plain = x.copy()
    kernels.attention_block(base, plain, other, 0, Places(zero, zero), cosine, sine)
    assert same_bits(attended(-1e30, cache), plain - x)
    assert not attended(1e30, cache).any()


@pytest.mark.parametrize("normalize", [False, True])
def test_route_with_a_bias(machine, normalize):
    rng = np.random.default_rng(8)
    weights = RouterWeights(
        normal(rng, 48) + 1, normal(rng, 13, 48), 1e-6, 3, normalize, bias=normal(rng, 13, magnitude=2.0)
    )
    allowed = (rng.random(13) < 0.5).astype(np.uint8) | (np.arange(13) < 1)
    for tokens in (1, 5, 70):
        x = normal(rng, tokens, 48)
        for choice in ((), (allowed, 2, True), (allowed, 3, False)):
            ours, theirs = kernels.route(weights, x, *choice), bitslice.route(weights, x, *choice)
            for name in ("hidden", "ranked", "scores", "experts", "weights"):
                assert same_bits(getattr(ours, name), getattr(theirs, name)), name
    sigmoid = replace(weights, sigmoid=True, selection_bias=normal(rng, 13, magnitude=0.3), scaling=1.8)
    for choice in ((), (allowed, 2, True), (allowed, 3, False)):
        ours, theirs = kernels.route(sigmoid, x, *choice), bitslice.route(sigmoid, x, *choice)
        for name in ("hidden", "ranked", "scores", "experts", "weights"):
            assert same_bits(getattr(ours, name), getattr(theirs, name)), name
    plain = bitslice.route(replace(weights, bias=None), x)
    assert not np.array_equal(plain.experts, bitslice.route(weights, x).experts)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_bias_of_the_choice_is_finite(value):
    """The logits and scores would be, whatever it is."""
    rng = np.random.default_rng(8)
    with pytest.raises(NumericsError, match="a bias of a router's choice is NaN or infinite"):
        RouterWeights(
            normal(rng, 48), normal(rng, 3, 48), 1e-6, 2, False, selection_bias=np.array([0, value, 1], np.float32)
        )


@pytest.mark.parametrize(("hidden", "width"), [(48, 40), (33, 17), (192, 96)])
def test_expert_terms(machine, hidden, width):
    """Biases of all three products and the clamped SwiGLU, with values on both sides of the limit."""
    rng = np.random.default_rng(hidden)
    layout = bitslice.ExpertLayout(hidden, width)
    _keep, addresses = packed_experts(rng, layout, 6)
    biases = [normal(rng, 6, size, magnitude=2.0) for size in (width, width, hidden)]
    terms = ExpertTerms(*biases, alpha=1.702, limit=2.5)
    for tokens, draft in ((1, False), (3, True), (40, False)):
        x, h = normal(rng, tokens, hidden), normal(rng, tokens, hidden, magnitude=2.0)
        experts = np.sort(np.stack([rng.permutation(6)[:2] for _ in range(tokens)]), axis=1).astype(np.int32)
        weights = rng.random((tokens, 2)).astype(np.float32)
        ours, theirs = x.copy(), x.copy()
        for backend, out in ((kernels, ours), (bitslice, theirs)):
            backend.expert_ffn(layout, addresses, h, experts, weights, out, draft, terms=terms)
        assert same_bits(ours, theirs) and not np.array_equal(ours, x)
    with pytest.raises(ValueError, match="do not fit"):
        kernels.expert_ffn(layout, addresses, h, experts, weights, x, terms=replace(terms, gate=biases[0][:5]))


def variant(spec, attention=None, **moe):
    """The spec with other parts in every layer."""
    layers = tuple(
        msgspec.structs.replace(
            layer, attention=msgspec.structs.replace(layer.attention, **(attention or {})),
            feed_forward=msgspec.structs.replace(layer.feed_forward, **moe) if moe and index not in spec.dense_layers
            else layer.feed_forward,
        )
        for index, layer in enumerate(spec.layers)
    )  # fmt: skip
    return msgspec.structs.replace(spec, layers=layers)


@pytest.mark.parametrize(
    "changes",
    [
        {"shared_width": 40},
        {"shared_width": 64, "shared_gate": True},
        {"bias": True, "activation": Activation(kind="clamped_swiglu", alpha=1.702, limit=1.0)},
        {"attention": {"sinks": True, "query_key_norm": "full", "window": 6, "query_key_value_bias": True}},
        {"attention": {"score_scale": 0.6}, "shared_width": 40},
    ],
    ids=str,
)
def test_layers_in_one_call(machine, changes):
    spec = variant(tiny_spec(dense_layers=(1,), top_k=3), **changes)
    allowed = np.zeros((len(spec.moe_layers), spec.experts), np.uint8)
    allowed[:, 1::2] = 1
    passes = [(range(20), None), ([20], None), ([21], Draft(allowed, 3)), ([21, 22, 23], None)]
    outcomes = decoded(spec, passes)
    assert all_same(outcomes)
    assert not same_bits(outcomes[0][0], decoded(tiny_spec(dense_layers=(1,), top_k=3), passes[:1])[0][0])
