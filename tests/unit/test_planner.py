"""The planner: what it chooses, from which gains on, and what options fix."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmoe.errors import BudgetError
from elmoe.policy.acceptance import Acceptance
from elmoe.policy.budget import FastTierSizes, SlotPlan, TierShape, plan_slots
from elmoe.policy.planner import DRAFT_GAIN, DRAFT_LENGTHS, Plan, Planner, best, popularity, splits
from tests.planning import EXPERTS, LAYERS, LITTLE, LSB, MSB, SHAPE, SIZES, SKEWED, choose, filled, with_reads

# --- what is chosen


@given(st.floats(0.13, 1.0), st.integers(1, 16), st.floats(1e8, 1e11))
def test_a_plan_fits_its_room_and_the_layers(share, sequences, bandwidth):
    plan = choose(with_reads(bandwidth), share, sequences)
    (msb, *_), (lsb, *_) = plan.slots.msb, plan.slots.lsb
    assert plan.slots.bytes == LAYERS * (msb * MSB + lsb * LSB) <= share * SIZES.all_experts + 1
    assert SHAPE.top_k <= msb <= EXPERTS and 0 <= lsb <= msb
    assert plan.draft_length in DRAFT_LENGTHS and plan.rate > 0


@given(st.floats(0.1, 0.9), st.sampled_from([1, 4, 16]), st.floats(2e8, 1e10), st.floats(1.01, 10))
def test_more_of_anything_is_never_slower(share, sequences, bandwidth, more):
    def rate(bandwidth: float, token: float) -> float:
        return choose(with_reads(bandwidth), share, sequences, token=token).rate

    base = rate(bandwidth, 0.01)
    assert rate(bandwidth * more, 0.01) >= base / DRAFT_GAIN  # a plan is chosen by its promise, not its rate alone
    assert rate(bandwidth, 0.01 / more) >= base / DRAFT_GAIN


def test_drafting_pays_where_reads_are_dear_and_not_where_drafts_are_rejected():
    slow, rejected, fast = with_reads(1e9), with_reads(1e9), with_reads(1e12)
    assert choose(slow, 0.5, 16).draft_length >= 4
    for token in range(1000):
        rejected.observe_judged(0.5, token % 50 == 0)
    assert choose(rejected, 0.5, 16).draft_length == 0
    assert choose(fast, 0.5, 16, draft=1.0).draft_length == 0


def test_a_batch_that_touches_everything_wants_msb_slices_and_a_single_token_whole_experts():
    one, many = choose(with_reads(1e9), 0.5, 1, draft=1.0), choose(with_reads(1e9), 0.5, 16)
    assert one.draft_length == 0 and one.slots.msb == one.slots.lsb and one.mode == "cache"
    assert many.draft_length > 0 and many.slots.msb > many.slots.lsb and many.mode == "elastic"


def test_bytes_that_recent_routing_tells_choose_between_the_modes():
    """Of a text whose neighbouring tokens use the same experts a draft's verification reads as much as one token."""
    repeating, independent = with_reads(1e9), with_reads(1e9)
    rng = np.random.default_rng(0)
    uniform = np.full(EXPERTS, 8 / EXPERTS)
    for planner in (repeating, independent):
        choose(planner, 0.3, 1, use=uniform, counted=100)
        found = filled(planner, -9, -9)
        for token in range(60):
            if planner is independent or token % 8 == 0:
                experts = np.stack([rng.permutation(64)[:8] for _ in range(LAYERS)]).astype(np.int32)
            planner.observe_routing({0: 1}, experts[:, None], found)
    assert choose(repeating, 0.3, 1).draft_length > 0
    assert choose(independent, 0.3, 1).draft_length == 0


@pytest.mark.parametrize(
    ("tokens", "msb", "lsb", "learned"),
    [(50.1, 0, 0, True), (49.9, 0, 0, False), (50.1, 1, 0, False), (50.1, 0, 1, False), (50.1, -9, -9, True)],
)
def test_bytes_are_learned_once_popularity_and_slots_have_settled(tokens, msb, lsb, learned):
    """``msb``, ``lsb``: slots free beyond one in twenty."""
    planner = with_reads(1e9)
    choose(planner, 0.5, 1, draft=1.0, counted=tokens)  # as many LSB slices as MSB slices
    found = filled(planner, msb, lsb)
    experts = np.tile(np.arange(56, 64, dtype=np.int32), (LAYERS, 1, 1))
    for _ in range(20):
        planner.observe_routing({0: 1}, experts, found)
    assert (planner.reads.ratios.tolist() != [1.0] * len(DRAFT_LENGTHS)) == learned


def test_popularity_is_a_ranked_probability():
    hotness = np.array([[4.0, 0, 2, 2], [1, 1, 1, 1]])
    assert popularity(hotness, 2).tolist() == [0.75, 0.5, 0.5, 0.25]
    assert popularity(np.full((2, 4), 1e-12), 2).sum() <= 2


# --- slices of layers


@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 50), st.integers(1, 50), st.data())
def test_slices_of_equal_layers_are_those_of_one_layer(layers, experts, msb_bytes, lsb_bytes, data):
    """Whole experts, all MSB slices, five steps between; all LSB slices that fit, half of them, none."""
    top_k = data.draw(st.integers(1, experts))
    room = data.draw(st.integers(layers * top_k * msb_bytes, layers * (experts + 1) * (msb_bytes + lsb_bytes)))
    per_layer = room // layers
    whole = min(experts, per_layer // (msb_bytes + lsb_bytes))
    most = min(experts, per_layer // msb_bytes)
    expected = []
    for msb in sorted({max(top_k, round(whole + (most - whole) * part / 6)) for part in range(7)}):
        lsb = min(msb, (per_layer - msb * msb_bytes) // lsb_bytes)
        expected += dict.fromkeys([(msb, lsb), (msb, lsb // 2), (msb, 0)])
    shape = TierShape((msb_bytes,) * layers, (lsb_bytes,) * layers, experts, top_k)
    plans = splits(shape, room)
    assert [(plan.msb, plan.lsb) for plan in plans] == [((m,) * layers, (x,) * layers) for m, x in expected]


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), min_size=1, max_size=9), st.floats(0, 1.2), st.integers(1, 9)
)
def test_slices_of_uneven_layers_fit_and_are_divided_equally(layers, share, top_k):
    msb_bytes, lsb_bytes = zip(*layers, strict=True)
    shape = TierShape(msb_bytes, lsb_bytes, 12, top_k)
    room = max(top_k * sum(msb_bytes), int(share * 12 * shape.one_expert))
    for plan in splits(shape, room):
        used = sum(m * a + x * b for m, a, x, b in zip(plan.msb, msb_bytes, plan.lsb, lsb_bytes, strict=True))
        assert plan.bytes == used <= room
        assert len(set(plan.msb)) == 1 and top_k <= plan.msb[0] <= 12
        assert len({x for x, size in zip(plan.lsb, lsb_bytes, strict=True) if size}) <= 1
        assert all(x <= m if size else x == m for x, m, size in zip(plan.lsb, plan.msb, lsb_bytes, strict=True))


def test_with_one_slice_the_expert_axis_is_the_only_one():
    shape = TierShape((10, 20), (0, 0), 8, 2)
    assert [(plan.msb, plan.lsb, plan.bytes) for plan in splits(shape, 155)] == [((5, 5), (5, 5), 150)]
    sizes = FastTierSizes(0, 0, 0, (10, 20), (0, 0), 8, 2)
    planner = Planner(shape)
    plan = planner.plan(2, sizes, 155, np.ones((2, 8)))
    assert plan.slots.msb == (5, 5) and plan.rate > 0
    planner.observe_step(2, 0, 40, 1.0)


def test_layers_read_bytes_of_their_own_sizes():
    """What is modelled of two uneven layers is the sum of each layer's."""
    counts = np.tile(SKEWED, (2, 1))
    both = Planner(TierShape((30, 10), (20, 0), EXPERTS, 8), split="msb_first")
    both.plan(3, FastTierSizes(0, 0, 0, (30, 10), (20, 0), EXPERTS, 8), 1000, counts)
    touched = 1 - (1 - SKEWED[None, :]) ** (3 * (1 + np.array(DRAFT_LENGTHS)[:, None]))
    expected = np.zeros(len(DRAFT_LENGTHS))
    for layer, (msb, lsb) in enumerate(((30, 20), (10, 0))):
        kept = both.chosen.slots.msb[layer], both.chosen.slots.lsb[layer]
        expected += touched[:, kept[0] :].sum(axis=1) * msb + touched[:, kept[1] :].sum(axis=1) * lsb
    assert both._modelled == pytest.approx(expected)


# --- gains


@pytest.mark.parametrize(
    ("drafting", "gain", "drafts"),
    [(False, 1.0599, False), (False, 1.0601, True), (True, 0.9999, False), (True, 1.0001, True)],
)
def test_drafts_start_for_a_gain_of_six_percent_and_go_on_for_any(drafting, gain, drafts):
    rates = np.array([[100.0], [100.0 * gain]])
    assert best(rates, np.array([0, 2]), np.array([False]), drafting) == (int(drafts), 0)


@pytest.mark.parametrize(("gain", "switches"), [(1.0399, False), (1.0401, True)])
def test_slices_change_for_a_gain_of_four_percent(gain, switches):
    rates = np.array([[100.0, 100.0 * gain]])
    assert best(rates, np.array([0]), np.array([True, False]), False) == (0, int(switches))
    assert best(rates, np.array([0]), np.array([False, False]), False) == (0, 1)  # none of them is kept now


def test_slices_are_not_changed_for_a_small_gain():
    planner = with_reads(1e9)
    first = choose(planner, 0.5, 8)
    rng = np.random.default_rng(0)
    for _ in range(30):
        plan = choose(planner, 0.5, 8, use=SKEWED * (1 + 0.03 * rng.standard_normal(64)))
        assert plan.slots == first.slots


def test_who_drafts_goes_on_unless_plain_decoding_promises_more():
    drafting, plain = Planner(SHAPE), Planner(SHAPE)
    found = []
    for acceptance in np.linspace(0.2, 0.9, 36):
        for planner in (drafting, plain):
            planner.acceptance = Acceptance(acceptance, 0.0)
            planner.chosen = Plan(SlotPlan((24,) * LAYERS, (24,) * LAYERS, 0), 4 if planner is drafting else 0, 1.0)
            planner._drafting = int(planner is drafting)
        found.append((choose(drafting, 0.5, 4).draft_length > 0, choose(plain, 0.5, 4).draft_length > 0))
    assert (True, False) in found and (False, True) not in found


# --- what options fix


@pytest.mark.parametrize("reads", [True, False])
def test_a_fixed_length_is_kept(reads):
    for length in (0, 3, 20):
        planner = Planner(TierShape.of(LITTLE), split="msb_first", draft_length=length, reads=reads)
        plan = planner.plan(2, LITTLE, LITTLE.all_experts, np.zeros((1, 16)))
        assert plan.draft_length == length
        if length == 3:
            assert planner.proceed([[0.1], [0.1, 0.1, 0.1]], plan) == [True, False]


@pytest.mark.parametrize("mode", ["plain", "cache"])
def test_modes_that_do_not_draft_never_draft(mode):
    planner = Planner(SHAPE, mode, draft_length=4)
    for _ in range(200):
        plan = planner.plan(1, SIZES, SIZES.all_experts // 2, np.zeros((LAYERS, EXPERTS)))
        assert plan.draft_length == 0 and plan.mode == mode and (plan.slots is None) == (mode == "plain")
        planner.observe_step(1, 0, 10**6, 0.1)


@pytest.mark.parametrize("split", ["msb_first", "whole_experts"])
def test_a_given_split_is_kept(split):
    budget = SIZES.minimum + SIZES.all_experts // 3
    plan = Planner(SHAPE, split=split).plan(1, SIZES, budget, np.zeros((LAYERS, EXPERTS)))
    assert plan.slots == plan_slots(budget, SIZES, split)
    with pytest.raises(BudgetError, match="below the minimum"):
        Planner(SHAPE, split=split).plan(1, SIZES, SIZES.minimum - 1, np.zeros((LAYERS, EXPERTS)))
