"""The cost model: passes and reads, from the assumption to what was measured, and how a step hides its reads."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe.policy.budget import TierShape
from elmoe.policy.cost import ASSUMED_BANDWIDTH, Costs, Fit

SHAPE = TierShape((3_538_944,) * 16, (3_145_728,) * 16, 64, 8, dense=15_000_000)


def test_pass_costs_of_few_tokens_are_not_those_of_a_line_through_a_prompt():
    def reading(tokens):
        return 0.01 + 0.05 * (1 - 0.9**tokens)

    def truth(tokens: float) -> float:
        return 1.2 * reading(tokens) + 0.004 * tokens

    cost = Fit(lambda tokens: (reading(tokens), tokens))
    assert not cost.known and cost.seconds(4) == reading(4)  # the assumption, until something ran
    cost.observe(250, truth(250))
    assert cost.known and cost.seconds(4) < 1.2 * truth(4)
    for _ in range(20):
        for tokens in (4, 8, 250):
            cost.observe(tokens, truth(tokens))
    for tokens in (1, 4, 16, 100):
        assert cost.seconds(tokens) == pytest.approx(truth(tokens), rel=0.06)
    flat = Fit(lambda tokens: (reading(tokens), tokens))
    for tokens in (1, 50):  # dearer by less than what is read: no negative part
        flat.observe(tokens, 0.1)
    assert flat.seconds(500) >= 0


def test_what_passes_of_one_size_take_beside_reading_counts_as_fixed():
    cost = Fit(lambda tokens: (np.interp(tokens, (2, 6, 250), (0.001, 0.0025, 0.01)), tokens))
    for _ in range(50):
        cost.observe(250, 0.133)
        cost.observe(2, 0.004)
    assert cost.seconds(2) == pytest.approx(0.004, rel=0.01)
    assert cost.seconds(6) == pytest.approx(0.0075, rel=0.05)  # in proportion to what is read, 0.01
    for _ in range(100):
        cost.observe(6, 0.009)
    assert cost.seconds(6) == pytest.approx(0.009, rel=0.05)


def test_a_fit_is_the_decayed_least_squares_of_relative_errors():
    """The assumption weighs a tenth of an observation and does not fade; by NumPy, where no part is negative."""
    cost, rows, weights = Fit(lambda n: (0.01 * np.sqrt(n), n)), [[0.0, 1.0, 0.0]], [0.1]
    for tokens, seconds in ((1, 0.032), (4, 0.05), (9, 0.08), (30, 0.16), (4, 0.045)):
        cost.observe(tokens, seconds)
        weights = [0.1, *(0.98 * weight for weight in weights[1:]), 1.0]
        rows.append([1 / seconds, 0.01 * np.sqrt(tokens) / seconds, tokens / seconds])
    root = np.sqrt(weights)
    fixed, scale, slope = np.linalg.lstsq(np.array(rows) * root[:, None], root, rcond=None)[0]
    assert min(fixed, scale, slope) > 0
    assert cost.seconds([2, 20]) == pytest.approx([fixed + 0.01 * np.sqrt(n) * scale + n * slope for n in (2, 20)])


def test_it_makes_no_difference_when_observations_are_folded():
    late, at_once = Fit(lambda n: (0.01 * np.sqrt(n), n)), Fit(lambda n: (0.01 * np.sqrt(n), n))
    rng = np.random.default_rng(0)
    for tokens in rng.integers(1, 40, 600):
        for fit in (late, at_once):
            fit.observe(int(tokens), 0.02 + 0.003 * tokens)
        at_once.seconds(1)
        assert len(late._waiting) <= 512 and len(at_once._waiting) < 8
    late.fold()
    at_once.fold()
    assert late.seconds([1, 5, 100]) == pytest.approx(at_once.seconds([1, 5, 100]), rel=1e-4)


@pytest.mark.parametrize(("waiting", "taken_in"), [(7, False), (8, True)])
def test_a_fit_takes_in_what_it_was_told_by_eights_or_when_a_choice_is_made(waiting, taken_in):
    cost = Fit(lambda n: (0.01 * n, n))
    cost.observe(1, 0.01)
    before = float(cost.seconds(1))  # the first observation counts at once
    assert before == pytest.approx(0.01)
    for _ in range(waiting):
        cost.observe(1, 0.005)
    assert (cost.seconds(1) != before) == taken_in
    cost.fold()
    assert cost.seconds(1) < 0.9 * before


def test_the_first_draft_pass_sets_things_up_and_does_not_count():
    costs = Costs(SHAPE)
    costs.observe_draft(1, 20.0)
    assert not costs.draft_known
    for _ in range(50):
        costs.observe_target(1, 1.0)
    before = float(costs.draft_seconds(1))
    costs.observe_draft(1, 0.5)
    assert costs.draft_known and before < 0.1
    assert costs.draft_seconds(1) == pytest.approx(0.5, rel=0.01)


def test_a_draft_pass_never_costs_more_than_a_target_pass():
    costs = Costs(SHAPE)
    for _ in range(20):
        costs.observe_draft(1, 2.0)
        costs.observe_target(1, 1.0)
    assert costs.draft_seconds(1) == costs.target_seconds(1) == pytest.approx(1.0, rel=0.05)


def test_a_pass_is_assumed_to_read_what_it_touches_from_memory():
    costs = Costs(SHAPE)
    whole, msb = 16 * (3_538_944 + 3_145_728), 16 * 3_538_944
    assert costs.target_seconds(1) == pytest.approx((15_000_000 + 8 * whole) / 15e9)
    assert costs.draft_seconds(1) == pytest.approx((15_000_000 + 8 * msb) / 15e9)
    costs.use = np.array([1.0] + [0.0] * 63)
    assert costs.target_seconds([1, 9]) == pytest.approx([(15_000_000 + whole) / 15e9] * 2)


def test_layers_of_different_sizes_count_each_by_its_own():
    uneven = Costs(TierShape((10, 30), (8, 0), 4, 2, dense=100))
    assert uneven.target_seconds(1) == pytest.approx((100 + 2 * 48) / 15e9)
    assert uneven.draft_seconds(1) == pytest.approx((100 + 2 * 40) / 15e9)


def test_reads_of_few_bytes_pay_for_their_layers_and_a_device_that_changes_is_followed():
    def truth(mebibytes: float, bandwidth: float) -> float:
        stalls = 16 * (1 - np.exp(-mebibytes * 2**20 / SHAPE.one_expert))
        return stalls * 0.001 + mebibytes * 2**20 / bandwidth

    costs = Costs(SHAPE)
    assert costs.bandwidth == ASSUMED_BANDWIDTH == 1e9
    for bandwidth in (2e9, 5e8):
        for _ in range(150):
            for mebibytes in (20, 100, 400):
                costs.observe_reads(mebibytes << 20, truth(mebibytes, bandwidth))
        for mebibytes in (10, 50, 1000):
            assert costs.reading_seconds(mebibytes * 2.0**20) == pytest.approx(truth(mebibytes, bandwidth), rel=0.05)
        assert 0.8 * bandwidth < costs.bandwidth < bandwidth


def test_the_bandwidth_is_that_of_recent_reads():
    costs = Costs(SHAPE)
    costs.observe_reads(100, 1.0)
    costs.observe_reads(300, 1.0)
    assert costs.bandwidth == pytest.approx((0.9 * 100 + 300) / 1.9)


@pytest.mark.parametrize(
    ("drafting", "compute", "reading", "room", "seconds"),
    [
        (0.0, 1.0, 2.0, 0.0, 2.5),  # half of the shorter is exposed
        (0.0, 3.0, 2.0, 0.0, 4.0),
        (0.0, 3.0, 0.0, 0.0, 3.0),  # in memory a step takes what it computes
        (2.0, 3.0, 0.0, 0.0, 5.0),
        (1.0, 1.0, 2.0, 1.0, 2.5),  # drafting reads ahead for its whole time,
        (1.0, 1.0, 2.0, 0.25, 3.0),  # or as much as there is room for,
        (3.0, 1.0, 2.0, 9.0, 4.0),  # or all there is,
        (1.0, 1.0, 2.0, -1.0, 3.5),  # or nothing
    ],
)
def test_a_step_hides_reads_behind_drafts_and_kernels_but_for_a_share(drafting, compute, reading, room, seconds):
    """Room as a share of the bytes needed."""
    costs = Costs(SHAPE)
    costs.reading_seconds = lambda needed: needed / 1e9
    assert costs.step_seconds(drafting, compute, reading * 1e9, room * reading * 1e9) == pytest.approx(seconds)
