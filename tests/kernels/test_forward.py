"""All layers in one call: the native forward against its NumPy definition, with hooks, feeds and drafts; shapes refused."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import ExpertLayout, LayerStack, LayerWeights
from elmoe.engine.decoder import AllExperts, Decoder, Draft, Places
from elmoe.engine.tier import ExpertTier
from elmoe.errors import NumericsError
from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import ResidencyParameters
from tests.kernels.test_kernels import same_bits
from tests.tiny import TinyReader, bound_cache, tiny_spec


def decoded(spec, passes, source=None, **forced):
    """Logits, routings and cache of (positions, draft) passes by the kernels and by the definition. ``source``: the expert
    source of a reader; ``forced`` goes to ``forward``."""
    reader, outcomes = TinyReader(spec), []
    for backend in (kernels, bitslice):
        wrapped = SimpleNamespace(**vars(backend) | {"forward": partial(backend.forward, **forced)})
        decoder, pool = Decoder(reader, wrapped), bound_cache(spec, 1, 64)
        decoder.reserve_positions(64)
        experts, outcome = AllExperts(reader) if source is None else source(reader), []
        for positions, draft in passes:
            ids = np.array([7 * position % spec.vocabulary for position in positions], np.int32)
            places = Places(np.zeros(len(ids), np.int32), np.array(positions, np.int32))
            logits, routings = decoder.forward(ids, places, pool.kernels, experts, draft)
            outcome += [logits, routings.ranked, routings.scores, routings.experts, routings.weights]
        outcomes.append([*outcome, pool.kernels.keys, pool.kernels.values])
    return outcomes


def all_same(outcomes) -> bool:
    ours, theirs = outcomes
    return len(ours) == len(theirs) and all(same_bits(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dense", [(), (0,), (1,), (0, 1, 2)], ids=["no", "the first", "a middle", "every"])
def test_layers_in_one_call(machine, dense):
    """Prompt, target and draft passes, any layer dense: logits, routings and cache of the NumPy definition."""
    spec = tiny_spec(dense_layers=dense, top_k=3)
    allowed = np.zeros((len(spec.moe_layers), spec.experts), np.uint8)
    allowed[:, 1::2] = 1
    few = allowed.copy()
    few[:1, 3:] = 0  # fewer than top-k
    drafts = [Draft(allowed, 3), Draft(few, 3), Draft(few, 2, False, 3.0), Draft(allowed, 2, bits=8)]
    passes = [(range(20), None), ([20], None), *(([21], draft) for draft in drafts), ([21, 22, 23], None)]
    outcomes = decoded(spec, passes)
    assert all_same(outcomes)
    if few[:1].size:  # layer 0 of the draft with few experts: the one that is allowed, then none
        experts, weights = outcomes[0][5 * 3 + 3][0, 0], outcomes[0][5 * 3 + 4][0, 0]
        assert experts.tolist() == [1, -1, -1] and weights[1:].tolist() == [0, 0] and weights[0] > 0


def test_a_draft_of_eight_bits_and_all_experts_is_the_target(machine):
    spec = tiny_spec()
    everything = np.ones((3, spec.experts), np.uint8)
    target, draft = (decoded(spec, [(range(9), draft)])[0] for draft in (None, Draft(everything, spec.top_k, False, bits=8)))
    assert all(same_bits(one, other) for one, other in zip(target, draft, strict=True))
    coarse = decoded(spec, [(range(9), Draft(everything, spec.top_k, False))])[0]
    assert not same_bits(coarse[0], target[0])
    with pytest.raises(NumericsError, match="4 or 8 bits"):
        Draft(everything, 2, bits=5)
    for backend in (kernels, bitslice):
        reader = TinyReader(spec)
        decoder, pool, zero = Decoder(reader, backend), bound_cache(spec, 1, 16), np.zeros(1, np.int32)
        decoder.reserve_positions(16)
        with pytest.raises(NumericsError, match="no expert it may use"):
            draft = Draft(np.zeros((3, spec.experts), np.uint8), 2)
            decoder.forward(zero, Places(zero, zero), pool.kernels, AllExperts(reader), draft)


@pytest.mark.parametrize("feed", [False, True], ids=["in memory", "fed"])
def test_a_hook_overrules_a_routing(machine, feed):
    """What it writes is what runs: all tokens on experts 2 and 5 of row 1, other rows as they were."""
    spec = tiny_spec(dense_layers=(1,), layers=4)
    seen = []

    def routed(row, routings):
        seen.append(row)
        if row == 1:
            routings.experts[row], routings.weights[row] = (2, 5), (0.25, 0.75)
            routings.ranked[row, :, :2], routings.scores[row] = (2, 5), 0

    passes = [(range(9), None), ([9], None)]
    source = (lambda reader: FedExperts(reader, 3)) if feed else None
    overruled, natural = decoded(spec, passes, source, routed=routed), decoded(spec, passes)[0]
    assert all_same(overruled) and seen == [0, 1, 2] * 4
    assert (overruled[0][3][1] == (2, 5)).all() and (overruled[0][1][1, :, :2] == (2, 5)).all()
    assert same_bits(overruled[0][3][0], natural[3][0]) and not same_bits(overruled[0][0], natural[0])
    with pytest.raises(NumericsError, match="does not exist"):
        decoded(spec, passes, routed=lambda row, routings: routings.experts.fill(8))


class FedExperts(AllExperts):
    """A source whose experts come in stretches of ``size``, whose addresses are there for that time only."""

    def __init__(self, reader, size):
        super().__init__(reader)
        self._real, self._size, self._left, self.order = self.tables, size, [], []
        self.tables = tuple(np.zeros_like(table) for table in self._real)

    def feed(self, draft):
        return None if draft else self

    def begin(self, row, experts):
        self._row, self._left = row, np.unique(experts[experts >= 0]).tolist()
        self.order.append(row)

    def next(self):
        ready, self._left = self._left[: self._size], self._left[self._size :]
        self.tables[self._row][:] = 0
        self.tables[self._row][ready] = self._real[self._row][ready]
        return ready


@pytest.mark.parametrize("size", [1, 2, 8])
def test_experts_that_come_and_go(machine, size):
    """A feed in Python: the same bits as experts that stay, on both backends."""
    spec = tiny_spec(dense_layers=(0,), layers=3, top_k=3)
    passes = [(range(12), None), ([12], None), ([13, 14], None)]
    fed = decoded(spec, passes, lambda reader: FedExperts(reader, size))
    assert all_same(fed) and all_same([fed[0], decoded(spec, passes)[0]])


def test_a_feed_that_lies_is_refused(machine):
    class Lying(FedExperts):
        def next(self):
            return [99]

    for size in (1, 2):
        with pytest.raises(ValueError, match="out of range"):
            decoded(tiny_spec(), [([0], None)], lambda reader: Lying(reader, size))  # noqa: B023
    with pytest.raises(NumericsError, match="not resident"):  # a stretch whose addresses are not set
        decoded(tiny_spec(), [([0], None)], lambda reader: type("Late", (FedExperts,), {
            "next": lambda self: [self._left.pop(0)] if self._left else []})(reader, 1))  # fmt: skip


def test_spans_of_layers(machine):
    """Attention, routing and experts of every layer, in order and without overlap, on both backends."""
    spec = tiny_spec(dense_layers=(1,))
    for backend in (kernels, bitslice):
        spans: list[tuple[str, float, float]] = []
        reader = TinyReader(spec)
        decoder, pool, zero = Decoder(reader, backend), bound_cache(spec, 1, 16), np.zeros(1, np.int32)
        decoder.reserve_positions(16)
        began = time.perf_counter()
        decoder.forward(
            zero, Places(zero, zero), pool.kernels, AllExperts(reader), report=lambda *span, into=spans: into.append(span)
        )
        ended = time.perf_counter()
        names = [f"{part} {layer}" for layer in range(3) for part in ("attention", "routing", "experts")]
        assert [span[0] for span in spans] == [*names, "logits"]
        moments = [began, *(moment for span in spans for moment in span[1:]), ended]
        assert moments == sorted(moments)


def test_what_a_tier_learns_of_a_pass_is_the_same_on_both_backends():
    spec = tiny_spec()
    reader, outcomes = TinyReader(spec), []
    allowed = np.zeros((3, spec.experts), np.uint8)
    allowed[:, 1::2] = 1
    allowed[0, 3:] = 0
    for backend in (kernels, bitslice):
        tier = ExpertTier(reader, ResidencyParameters())
        tier.replan(SlotPlan((spec.experts,) * 3, (0,) * 3, 0), 0)
        decoder, pool, outcome = Decoder(reader, backend), bound_cache(spec, 1, 64), []
        decoder.reserve_positions(64)
        for positions, mask in ((range(20), None), ([20], None), ([21], allowed)):
            ids = np.array([7 * position % spec.vocabulary for position in positions], np.int32)
            tier.begin_step([0])
            if mask is not None:
                tier._active[:] = False
                tier.allowed = mask
            places = Places(np.zeros(len(ids), np.int32), np.array(positions, np.int32))
            decoder.forward(ids, places, pool.kernels, tier, None if mask is None else Draft(mask, spec.top_k))
            outcome += [tier._active.copy(), *tier._sure_routing]
        assert (tier._active <= (allowed != 0)).all() and tier._active[0].sum() == 1  # what is not chosen is not counted
        outcomes.append(outcome)
    assert all_same(outcomes)


def test_layers_in_one_call_report_failures():
    """A NaN in the last layer's weights is named, and arrays that do not fit are refused."""
    spec = tiny_spec()
    reader = TinyReader(spec)
    reader.array("layers.2.router")[0, 0] = np.nan
    decoder, pool = Decoder(reader, kernels), bound_cache(spec, 1, 16)
    decoder.reserve_positions(16)
    tier, zero = ExpertTier(reader, ResidencyParameters()), np.zeros(1, np.int32)
    with pytest.raises(NumericsError, match="router logit"):
        decoder.forward(zero, Places(zero, zero), pool.kernels, tier)
    stack, x = decoder.stack(tier.tables), np.zeros((1, spec.hidden), np.float32)
    tables = decoder._cosine, decoder._sine
    with pytest.raises(ValueError, match="slot or position"):
        kernels.forward(stack, x, pool.kernels, Places(zero + 1, zero), *tables)
    with pytest.raises(ValueError, match="mask does not fit"):
        draft = Draft(np.ones((2, spec.experts), np.uint8), 2)
        kernels.forward(stack, x, pool.kernels, Places(zero, zero), *tables, draft=draft)
    with pytest.raises(ValueError, match="the cache does not fit"):
        kernels.forward(LayerStack(stack.layers * 2), x, pool.kernels, Places(zero, zero), *tables)


def test_shapes_whose_products_wrap_are_refused():
    """What a damaged manifest can ask for: sizes whose products in 32 bits would be those of the tensors."""
    spec = tiny_spec()
    reader = TinyReader(spec)
    decoder, pool = Decoder(reader, kernels), bound_cache(spec, 1, 16)
    decoder.reserve_positions(16)
    stack = decoder.stack(AllExperts(reader).tables)
    layer = stack.layers[0]
    zero, x = np.zeros(1, np.int32), np.zeros((1, spec.hidden), np.float32)

    def run(changed: LayerWeights) -> None:
        whole = LayerStack((changed, *stack.layers[1:]))
        kernels.forward(whole, x, pool.kernels, Places(zero, zero), decoder._cosine, decoder._sine)

    run(replace(layer))
    wrapped = (1 << 28) + layer.attention.heads  # times a head of 16 is, in 32 bits, the heads that the tensor has
    assert (wrapped * layer.attention.head_dim) % (1 << 32) == layer.attention.heads * layer.attention.head_dim
    for changes in ({"heads": wrapped}, {"head_dim": (1 << 28) + 16}, {"kv_heads": 1 << 40}, {"heads": 0}):
        with pytest.raises(ValueError, match=r"heads|head_dim"):
            run(replace(layer, attention=replace(layer.attention, **changes)))
    router = layer.feed_forward
    for top_k in (0, 9, 1 << 32 | 2):
        with pytest.raises((ValueError, NumericsError)):
            run(replace(layer, feed_forward=replace(router, top_k=top_k, ranked=2)))
    with pytest.raises(ValueError, match="do not fit"):
        run(replace(layer, layout=ExpertLayout(spec.hidden + 16, 32)))
    with pytest.raises(ValueError, match="addresses"):
        run(replace(layer, addresses=np.zeros((7, 2), np.int64)))
    for sizes in ((1 << 31, 64), (64, 1 << 33), (0, 64)):
        with pytest.raises((ValueError, OverflowError)):
            kernels._native.Expert(*sizes, [0] * 6, [0] * 3, 1 << 40, 1 << 40)
    sections = [0, 4096, 8192, 12288, 12352, 12416], [0, 4096, 8192]
    with pytest.raises(ValueError, match="outside its record"):
        kernels._native.Expert(1 << 20, 1 << 20, *sections, 16384, 12288)
    with pytest.raises(ValueError, match=r"31 bits"):
        kernels._native.Matrix(1 << 32 | 16, 32, *(np.zeros((1, 1, 256), np.uint8),) * 2, np.zeros((1, 1, 16), np.uint16))
