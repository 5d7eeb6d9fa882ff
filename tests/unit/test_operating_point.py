"""The planner of an enforced tier: fits its room, follows costs the right way, learns, and does not draft in vain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmoe.policy.operating_point import (
    ASSUMED_BANDWIDTH,
    DRAFT_GAIN,
    DRAFT_LENGTHS,
    AcceptanceCurve,
    OperatingPoint,
    Planner,
    TierShape,
    popularity,
)
from elmoe.policy.pass_cost import PassCost
from elmoe.policy.residency import ResidentSet

SHAPE = TierShape(layers=16, experts=64, top_k=8, msb=3_538_944, lsb=3_145_728)
EVERYTHING = SHAPE.layers * SHAPE.experts * (SHAPE.msb + SHAPE.lsb)
STAGING = 16 * (SHAPE.msb + SHAPE.lsb)
SKEWED = np.linspace(1.9, 0.1, 64) / 8
"""Probability that a token uses the hottest, ..., coldest expert: 8 in all."""


def choose(planner: Planner, share: float, sequences: int, draft: float = 0.05, token: float = 0.01, use=SKEWED):
    capacity = int(share * EVERYTHING) + STAGING
    costs = (lambda n: draft + 0.001 * n), (lambda n: 0.05 + token * n)
    return planner.choose(use, sequences, capacity, STAGING, *costs)


@given(st.floats(0.08, 1.0), st.integers(1, 16), st.floats(1e8, 1e11))
def test_a_point_fits_its_room_and_the_layers(share, sequences, bandwidth):
    planner = Planner(SHAPE)
    planner.observe_reads(int(bandwidth), 1.0)
    point = choose(planner, share, sequences)
    assert SHAPE.layers * (point.msb * SHAPE.msb + point.lsb * SHAPE.lsb) <= share * EVERYTHING + 1
    assert SHAPE.top_k <= point.msb <= SHAPE.experts and 0 <= point.lsb <= point.msb
    assert point.draft_length in DRAFT_LENGTHS and point.rate > 0


@given(st.floats(0.1, 0.9), st.sampled_from([1, 4, 16]), st.floats(2e8, 1e10), st.floats(1.01, 10))
def test_more_of_anything_is_never_slower(share, sequences, bandwidth, more):
    def rate(share: float, bandwidth: float, token: float) -> float:
        planner = Planner(SHAPE)
        planner.observe_reads(int(bandwidth), 1.0)
        return choose(planner, share, sequences, token=token).rate

    base = rate(share, bandwidth, 0.01)
    assert rate(share, bandwidth * more, 0.01) >= base / DRAFT_GAIN  # a point is chosen by its promise, not its rate alone
    assert rate(share, bandwidth, 0.01 / more) >= base / DRAFT_GAIN


def test_drafting_pays_where_reads_are_dear_and_not_where_drafts_are_rejected():
    slow, rejected, fast = Planner(SHAPE), Planner(SHAPE), Planner(SHAPE)
    for planner, bandwidth in ((slow, 1e9), (rejected, 1e9), (fast, 1e12)):
        planner.observe_reads(int(bandwidth), 1.0)
    assert choose(slow, 0.5, 16).draft_length >= 4
    for _ in range(50):
        rejected.acceptance.observe(1.0, 2, 100)
    assert choose(rejected, 0.5, 16).draft_length == 0
    assert choose(fast, 0.5, 16, draft=1.0).draft_length == 0


def test_a_batch_that_touches_everything_wants_msb_slices_and_a_single_token_whole_experts():
    single, batch = Planner(SHAPE), Planner(SHAPE)
    for planner in (single, batch):
        planner.observe_reads(int(1e9), 1.0)
    one, many = choose(single, 0.5, 1, draft=1.0), choose(batch, 0.5, 16)
    assert one.draft_length == 0 and one.msb == one.lsb
    assert many.draft_length > 0 and many.msb > many.lsb


def test_measurements_correct_the_model_of_their_mode():
    planner = Planner(SHAPE)
    planner.observe_reads(int(1e9), 1.0)
    before = choose(planner, 0.5, 8)
    for _ in range(40):  # whatever drafts is twice as slow as modelled
        planner.observe(True, 2.0, 1.0)
        planner.observe(False, 1.0, 1.0)
    assert planner.correction(True) == pytest.approx(2.0, abs=0.1)
    assert planner.correction(False) == pytest.approx(1.0)
    after = choose(planner, 0.5, 8)
    assert after.rate < before.rate


def test_one_bad_step_does_not_rule_a_mode_out_for_good():
    planner = Planner(SHAPE)
    planner.observe_reads(int(1e9), 1.0)
    assert choose(planner, 0.5, 16, draft=0.7).draft_length > 0
    planner.observe(True, 1.0, 1.0)
    planner.observe(True, 20.0, 1.0)  # the disk had other things to do
    assert choose(planner, 0.5, 16, draft=0.7).draft_length == 0
    steps = 0
    while choose(planner, 0.5, 16, draft=0.7).draft_length == 0:
        planner.observe(False, 1.0, 1.0)
        steps += 1
        assert steps < 400
    assert steps > 20  # and a mode that is worse is not tried all the time


def test_slices_are_not_changed_for_a_small_gain():
    planner = Planner(SHAPE)
    planner.observe_reads(int(1e9), 1.0)
    first = choose(planner, 0.5, 8)
    rng = np.random.default_rng(0)
    for _ in range(30):
        point = choose(planner, 0.5, 8, use=SKEWED * (1 + 0.03 * rng.standard_normal(64)))
        assert (point.msb, point.lsb) == (first.msb, first.lsb)


def test_reads_of_few_bytes_pay_for_their_layers_and_a_device_that_changes_is_followed():
    def truth(mebibytes: float, bandwidth: float) -> float:
        stalls = 16 * (1 - np.exp(-mebibytes * 2**20 / 16 / (SHAPE.msb + SHAPE.lsb)))
        return stalls * 0.001 + mebibytes * 2**20 / bandwidth

    planner = Planner(SHAPE)
    assert planner.bandwidth == ASSUMED_BANDWIDTH
    for bandwidth in (2e9, 5e8):
        for _ in range(150):
            for mebibytes in (20, 100, 400):
                planner.observe_reads(mebibytes << 20, truth(mebibytes, bandwidth))
        for mebibytes in (10, 50, 1000):
            expected = pytest.approx(truth(mebibytes, bandwidth), rel=0.05)
            assert float(planner.reading_seconds(np.array(mebibytes * 2.0**20))) == expected
        assert 0.8 * bandwidth < planner.bandwidth < bandwidth


def test_pass_costs_of_few_tokens_are_not_those_of_a_line_through_a_prompt():
    def reading(tokens: float) -> float:
        return 0.01 + 0.05 * (1 - 0.9**tokens)

    def truth(tokens: float) -> float:
        return 1.2 * reading(tokens) + 0.004 * tokens

    cost = PassCost()
    assert cost.seconds(4, reading(4)) == reading(4)  # the assumption, until something ran
    cost.observe(250, reading(250), truth(250))
    assert cost.seconds(4, reading(4)) < 1.2 * truth(4)
    for _ in range(20):
        for tokens in (4, 8, 250):
            cost.observe(tokens, reading(tokens), truth(tokens))
    for tokens in (1, 4, 16, 100):
        assert cost.seconds(tokens, reading(tokens)) == pytest.approx(truth(tokens), rel=0.06)
    flat = PassCost()
    for tokens in (1, 50):  # dearer by less than what is read: no negative part
        flat.observe(tokens, reading(tokens), 0.1)
    assert flat.seconds(500, reading(500)) >= 0


def test_what_passes_of_one_size_take_beside_reading_counts_as_fixed():
    cost = PassCost()
    for _ in range(50):
        cost.observe(250, 0.01, 0.133)
        cost.observe(2, 0.001, 0.004)
    assert cost.seconds(2, 0.001) == pytest.approx(0.004, rel=0.01)
    assert cost.seconds(6, 0.0025) == pytest.approx(0.0075, rel=0.05)  # in proportion to what is read, 0.01
    for _ in range(100):
        cost.observe(6, 0.0025, 0.009)
    assert cost.seconds(6, 0.0025) == pytest.approx(0.009, rel=0.05)


def test_who_drafts_goes_on_unless_plain_decoding_promises_more():
    drafting, plain = Planner(SHAPE), Planner(SHAPE)
    points = []
    for acceptance in np.linspace(0.2, 0.9, 36):
        for planner in (drafting, plain):
            planner.acceptance = AcceptanceCurve(top=acceptance, spread=0.0)
            planner.observe(True, 1.0, 1.0)
            planner.observe(False, 1.0, 1.0)
            planner.point = OperatingPoint(24, 24, 4 if planner is drafting else 0, 1.0)
        points.append((choose(drafting, 0.5, 4).draft_length > 0, choose(plain, 0.5, 4).draft_length > 0))
    assert (True, False) in points and (False, True) not in points


def test_the_acceptance_curve_learns_its_scale():
    curve = AcceptanceCurve()
    assert curve(1.0) == pytest.approx(curve.top) and curve(0.5) < curve(0.9)
    for _ in range(200):
        curve.observe(0.8, 98, 100)
    assert curve(0.8) == pytest.approx(0.98, abs=0.002)


def test_popularity_is_a_ranked_probability():
    hotness = np.array([[4.0, 0, 2, 2], [1, 1, 1, 1]])
    assert popularity(hotness, 2).tolist() == [0.75, 0.5, 0.5, 0.25]
    assert popularity(np.full((2, 4), 1e-12), 2).sum() <= 2


def test_what_a_resting_mode_learned_fades_by_steps():
    """As much in 50 steps told at once as in 50 told singly."""
    at_once, singly = Planner(SHAPE), Planner(SHAPE)
    for planner in (at_once, singly):
        for _ in range(30):
            planner.observe(True, 2.0, 1.0)
        planner.observe(False, 1.0, 1.0)
    before = at_once.correction(True)
    at_once.observe(False, 1.0, 1.0, steps=50)
    for _ in range(50):
        singly.observe(False, 1.0, 1.0)
    assert at_once.correction(True) == pytest.approx(singly.correction(True))
    assert 1 < at_once.correction(True) < 0.9 * before


def test_bytes_that_recent_routing_tells_choose_between_the_modes():
    """Of a text whose neighbouring tokens use the same experts a draft's verification reads as much as one token."""
    repeating, independent = Planner(SHAPE), Planner(SHAPE)
    rng = np.random.default_rng(0)
    for planner in (repeating, independent):
        planner.observe_reads(int(1e9), 1.0)
        choose(planner, 0.3, 1)
        found = ResidentSet.empty(SHAPE.layers, SHAPE.experts)
        for token in range(60):
            if planner is independent or token % 8 == 0:
                experts = np.stack([rng.permutation(64)[:8] for _ in range(SHAPE.layers)]).astype(np.int32)
            planner.reads.observe({0: 1}, experts[:, None], found, planner.modelled)
    assert choose(repeating, 0.3, 1).draft_length > 0
    assert choose(independent, 0.3, 1).draft_length == 0
    assert repeating.needed(4) < 0.6 * independent.needed(4)
