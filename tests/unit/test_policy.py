"""Policies: budgets and residency, each against what it promises."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmoe.errors import BudgetError
from elmoe.kernels.slices import Refill, refill_layer
from elmoe.policy.budget import FastTierSizes, SlotPlan, plan_slots, prefill_chunk
from elmoe.policy.residency import Residency, ResidencyParameters, ResidentSet, refill, updated_hotness
from elmoe.units import format_bytes

SIZES = FastTierSizes(dense=1000, kv=100, staging=50, msb=(9, 9, 12), lsb=(8, 8, 11), experts=16, top_k=2)


@given(st.integers(SIZES.minimum, SIZES.fixed + SIZES.all_experts + 100), st.sampled_from(["msb_first", "whole_experts"]))
def test_a_plan_keeps_the_budget_and_uses_it(budget, split):
    plan = plan_slots(budget, SIZES, split)
    assert plan.bytes <= budget
    used = sum(m * a + x * b for m, a, x, b in zip(plan.msb, SIZES.msb, plan.lsb, SIZES.lsb, strict=True))
    assert plan.bytes == SIZES.fixed + used
    for msb, lsb in zip(plan.msb, plan.lsb, strict=True):
        assert SIZES.top_k <= msb <= SIZES.experts and 0 <= lsb <= msb
    full = all(lsb == SIZES.experts for lsb in plan.lsb)
    assert full or budget - plan.bytes < max(SIZES.msb) + max(SIZES.lsb)


def test_the_two_corners():
    budget = SIZES.budget_of_share(0.4)
    paper, cache = plan_slots(budget, SIZES, "msb_first"), plan_slots(budget, SIZES, "whole_experts")
    assert not any(paper.lsb) and sum(paper.msb) > sum(cache.msb)
    assert cache.msb == cache.lsb
    assert plan_slots(SIZES.budget_of_share(1.0), SIZES).lsb == (16, 16, 16)


def test_a_budget_below_the_minimum_names_it():
    assert plan_slots(SIZES.minimum, SIZES).msb == (2, 2, 2)
    with pytest.raises(BudgetError, match=re.escape(f"below the minimum of {format_bytes(SIZES.minimum)} ")):
        plan_slots(SIZES.minimum // 2, SIZES)
    told = f"budget of {SIZES.minimum - 1:,} bytes is below the minimum of {SIZES.minimum:,} bytes "  # which round alike
    with pytest.raises(BudgetError, match=re.escape(told)) as error:
        plan_slots(SIZES.minimum - 1, SIZES)
    assert "MiB" in (error.value.hint or "")


def test_hotness_counts_and_decays():
    hotness = updated_hotness(np.array([[4.0, 0, 0]]), np.array([[[0, 2]]], np.int32), 0.5)
    assert hotness.tolist() == [[3.0, 0.0, 1.0]]
    hotness = updated_hotness(hotness, np.array([[[0, 1], [1, 2]]], np.int32), 0.5)
    assert hotness.tolist() == [[1.75, 2.0, 1.25]]


def test_old_uses_fade_by_the_token_and_recent_ones_by_the_pass():
    residency = Residency(1, 3, ResidencyParameters(decay=0.5, recent=8.0, recent_decay=0.25))
    residency.learn(np.array([[[0], [0]]], np.int32))
    assert residency.hotness.tolist() == [[2 + 8 * 2, 0, 0]]
    residency.learn(np.array([[[1], [1]]], np.int32))
    assert residency.hotness.tolist() == [[2 / 4 + 8 * 2 / 4, 2 + 8 * 2, 0]]
    assert residency.popularity.tolist() == [[2 / 4, 2, 0]]


@given(st.integers(0, 2**31))
def test_refill_takes_only_what_was_streamed(seed):
    rng = np.random.default_rng(seed)
    slots = SlotPlan((3, 5), (1, 2), 0)
    resident = ResidentSet.empty(2, 12)
    for _ in range(6):
        hotness, streamed = rng.random((2, 12)), rng.random((2, 12)) < 0.4
        after = refill(resident, hotness, streamed, slots, ResidencyParameters())
        assert not (after.msb & ~resident.msb & ~streamed).any()
        assert not (after.lsb & ~resident.lsb & ~streamed).any()
        assert not (after.lsb & ~after.msb).any()
        assert (after.msb.sum(axis=1) <= slots.msb).all() and (after.lsb.sum(axis=1) <= slots.lsb).all()
        assert (after.msb.sum(axis=1) >= resident.msb.sum(axis=1)).all()
        resident = after


@st.composite
def refills(draw):
    """A layer before a refill: residents (LSB slices without MSB slices too), scores with ties, streamed experts, a rule."""
    experts = draw(st.integers(1, 24))
    flags = st.lists(st.booleans(), min_size=experts, max_size=experts)
    scores = st.lists(st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e6)), min_size=experts, max_size=experts)
    slots = draw(st.tuples(st.integers(0, experts + 1), st.integers(0, experts + 1)))
    hysteresis = draw(st.sampled_from([0.0, 0.1, 0.25, 1.0]))
    swap_cap = draw(st.sampled_from([0, 1, 2, 3, 8, 1 << 30]))
    return [np.array(draw(flags)) for _ in range(3)], np.array(draw(scores)), slots, hysteresis, swap_cap


@given(refills())
@settings(max_examples=200)
def test_the_native_refill_of_a_layer_is_the_definition(case):
    (msb, lsb, streamed), scores, slots, hysteresis, swap_cap = case
    plan = SlotPlan((slots[0],), (slots[1],), 0)
    parameters = ResidencyParameters(hysteresis=hysteresis, swap_cap=swap_cap)
    expected = refill(ResidentSet(msb[None], lsb[None]), scores[None], streamed[None], plan, parameters)
    change = Refill((msb.copy(), lsb.copy()), scores, slots, hysteresis, swap_cap)
    refill_layer(change, streamed)
    assert (change.resident[0] == expected.msb[0]).all() and (change.resident[1] == expected.lsb[0]).all()


@pytest.mark.full
@given(refills())
@settings(max_examples=3000)
def test_the_native_refill_of_many_layers_is_the_definition(case):
    test_the_native_refill_of_a_layer_is_the_definition.hypothesis.inner_test(case)


@pytest.mark.parametrize("policy", ["decayed", "lru", "lfu", "random"])
def test_scores_of_a_layer_are_those_of_all(policy):
    rng = np.random.default_rng(1)
    residency = Residency(3, 10, ResidencyParameters(policy))
    for tokens in (1, 4, 2, 2):
        sure = rng.integers(0, 10, (3, tokens, 2)).astype(np.int32)
        for row, scores in enumerate(residency.scores(sure)):
            assert (residency.layer_scores(row, sure[row]) == scores).all()
        residency.learn(sure[:, : int(rng.integers(1, tokens + 1))])


def test_hysteresis_and_swap_cap():
    resident = ResidentSet(np.array([[True, True, False, False]]), np.zeros((1, 4), bool))
    streamed = np.array([[False, False, True, True]])
    slots = SlotPlan((2,), (0,), 0)

    def swap(hotness: list[float], **parameters: float) -> list[bool]:
        return refill(resident, np.array([hotness]), streamed, slots, ResidencyParameters(**parameters)).msb[0].tolist()

    assert swap([1.0, 1.0, 1.05, 0], hysteresis=0.1) == [True, True, False, False]
    assert swap([1.0, 0.9, 1.05, 0], hysteresis=0.1) == [True, False, True, False]
    assert swap([1.0, 1.0, 5, 6], swap_cap=1) == [True, False, False, True]
    assert swap([1.0, 1.0, 5, 6], swap_cap=2) == [False, False, True, True]


@pytest.mark.parametrize(
    ("top_k", "width", "reads", "tokens"),
    [(8, 1024, False, 256), (8, 1024, True, 1024), (2, 64, True, 1024), (8, 2048, True, 512), (6, 8192, True, 256)],
)
def test_chunks_of_prompts_are_larger_where_experts_are_read(top_k, width, reads, tokens):
    assert prefill_chunk(top_k, width, reads) == tokens
