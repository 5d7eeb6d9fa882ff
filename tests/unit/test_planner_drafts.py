"""The planner: when a draft stops, and what its choices come to over a run."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe.policy.acceptance import Acceptance
from elmoe.policy.budget import TierShape
from elmoe.policy.planner import Plan, Planner
from tests.planning import LITTLE

# --- the stop of a draft


def stopping(further: float, acceptance: float = 0.5) -> Planner:
    """In memory; a plain step takes 1 second, one more token ``further``."""
    planner = Planner(TierShape.of(LITTLE), split="msb_first", reads=False)
    planner.acceptance = Acceptance(acceptance, 0.0)
    planner.acceptance.of = lambda confidence: confidence
    for _ in range(2):
        planner.costs.observe_draft(1, 1.0)
    planner.costs.draft_seconds = lambda tokens: 0.0
    planner.costs.target_seconds = lambda tokens: 1.0 + further * (np.asarray(tokens) - 1)
    planner.plan(1, LITTLE, LITTLE.all_experts, np.zeros((1, 16)))
    return planner


@pytest.mark.parametrize(("further", "goes_on"), [(0.1999, True), (0.2001, False)])
def test_a_draft_goes_on_while_more_tokens_pay_the_rate_so_far(further, goes_on):
    """After one token of confidence 0.5 a step has 1.5 tokens in 1 + f seconds; the next one has 0.5 * 0.5 in f."""
    plan = Plan(None, 2, 1.0)
    # 0.25 / f > 1.5 / (1 + f)  <=>  f < 0.2
    assert stopping(further).proceed([[0.5]], plan) == [goes_on]


def test_each_sequence_stops_by_its_own_confidence():
    planner = stopping(0.1)
    assert planner.proceed([[0.9], [0.05]], Plan(None, 2, 1.0)) == [True, False]
    assert planner.proceed([[0.9], [0.9]], Plan(None, 1, 1.0)) == [False, False]


def test_a_draft_goes_on_where_only_several_more_tokens_pay():
    """A verification whose first extra token reads most of what all would read."""
    planner = stopping(0.0, acceptance=0.95)
    verify = np.array([0, 1.0, 3.0, 3.2, 3.3, 3.4, 3.5, 3.6, 3.7, 3.8])
    planner.costs.draft_seconds = lambda tokens: 0.1
    planner.costs.target_seconds = lambda tokens: verify[np.asarray(tokens)]
    assert planner.proceed([[]], Plan(None, 8, 1.0)) == [True]
    assert planner.proceed([[]], Plan(None, 1, 1.0)) == [False]
    planner.acceptance = Acceptance(0.3, 0.0)
    assert planner.proceed([[]], Plan(None, 8, 1.0)) == [False]


def test_no_draft_is_longer_than_sixteen():
    """However well drafts pay: here they and longer verifications cost nothing."""
    assert stopping(0.0, acceptance=0.999).chosen.draft_length == 16


@pytest.mark.parametrize(("steps", "wait"), [(15, 256), (16, 64), (17, 64)])
def test_drafts_that_ran_for_sixteen_steps_are_tried_again_soon(steps, wait):
    """Others wait twice as long as before."""
    planner = stopping(0.5)
    planner.chosen, planner._drafting, planner._wait = Plan(None, 0, 1.0), steps, 128
    planner._judge_drafts()
    assert planner._wait == wait and planner._drafting == planner._resting == 0


# --- what it all comes to


def simulate(accept: float, draft: float, plain: float, per_token: float, steps: int = 600) -> tuple[float, float]:
    """(rate of the planner, rate of plain decoding) in memory, for one sequence with constant costs and acceptance."""
    rng = np.random.default_rng(0)
    planner = Planner(TierShape.of(LITTLE), split="msb_first", reads=False)
    clock = tokens = 0.0
    for _ in range(steps):
        plan = planner.plan(1, LITTLE, LITTLE.all_experts, np.zeros((1, 16)))
        confidences: list[float] = []
        while len(confidences) < plan.draft_length:
            confidences.append(0.8)
            planner.observe_draft(1, draft)
            if not planner.proceed([confidences], plan)[0]:
                break
        verify = plain + per_token * len(confidences)
        planner.observe_target(1 + len(confidences), verify, 0.0)
        committed = 1
        for confidence in confidences:
            accepted = rng.random() < accept
            planner.observe_judged(confidence, accepted)
            if not accepted:
                break
            committed += 1
        seconds = verify + draft * len(confidences)
        planner.observe_step(1, len(confidences), 0, seconds)
        clock, tokens = clock + seconds, tokens + committed
    return tokens / clock, 1 / plain


def test_it_drafts_where_it_pays():
    elastic, plain = simulate(accept=0.9, draft=0.1, plain=1.0, per_token=0.05)
    assert elastic > 2 * plain


def test_it_gives_up_where_it_does_not_pay():
    for accept, draft in ((0.1, 0.8), (0.5, 1.0), (0.0, 0.3)):
        elastic, plain = simulate(accept, draft, plain=1.0, per_token=0.5)
        assert elastic > 0.95 * plain


@pytest.mark.parametrize(("accept", "draft"), [(0.1, 0.8), (0.5, 1.0), (0.7, 0.9)])
def test_finding_out_that_drafts_do_not_pay_costs_little(accept, draft):
    """From the first token on, trials included."""
    elastic, plain = simulate(accept, draft, plain=1.0, per_token=0.5, steps=200)
    assert elastic > 0.97 * plain
