"""The planner: what it chooses, from which gains on, how long it waits, when a draft stops, and what all that costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmoe.errors import BudgetError
from elmoe.policy.acceptance import Acceptance
from elmoe.policy.budget import FastTierSizes, SlotPlan, TierShape, plan_slots
from elmoe.policy.planner import DRAFT_GAIN, DRAFT_LENGTHS, Plan, Planner, best, popularity, splits
from elmoe.policy.residency import ResidentSet

MSB, LSB, LAYERS, EXPERTS = 3_538_944, 3_145_728, 16, 64
SIZES = FastTierSizes(0, 0, 16 * (MSB + LSB), (MSB,) * LAYERS, (LSB,) * LAYERS, EXPERTS, 8)
SHAPE = TierShape.of(SIZES)
SKEWED = np.linspace(1.9, 0.1, 64) / 8
"""Probability that a token uses the hottest, ..., coldest expert: 8 in all."""


def choose(
    planner: Planner, share: float, sequences: int, draft: float = 0.05, token: float = 0.01, use=SKEWED, counted=1.0
) -> Plan:
    """A new choice by given costs, ``share`` of the experts fitting beside the staging, behind so many counted tokens."""
    planner.costs.draft_seconds = lambda tokens: draft + 0.001 * tokens
    planner.costs.target_seconds = lambda tokens: 0.05 + token * np.asarray(tokens)
    budget = int(share * SIZES.all_experts) + SIZES.staging
    planner.begin_run()
    planner.plan(sequences, replace(SIZES), budget, np.tile(counted * use, (LAYERS, 1)))
    return planner.chosen


def with_reads(bandwidth: float) -> Planner:
    planner = Planner(SHAPE)
    planner.costs.observe_reads(int(bandwidth), 1.0)
    return planner


def filled(planner: Planner, msb: int, lsb: int) -> ResidentSet:
    """Residents of all slots chosen, but for one in twenty and so many more of either kind."""
    found = ResidentSet.empty(LAYERS, EXPERTS)
    for slices, slots, free in ((found.msb, planner.chosen.slots.msb, msb), (found.lsb, planner.chosen.slots.lsb, lsb)):
        rows = np.arange(sum(slots) - sum(slots) // 20 - free)
        slices[rows % LAYERS, rows // LAYERS] = True
    return found


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


# --- corrections


def test_measurements_correct_the_model_of_their_mode():
    planner = with_reads(1e9)
    before = choose(planner, 0.5, 8)
    planner.correct(True, 1.0, 1.0)
    for _ in range(60):  # whatever drafts is twice as slow as modelled
        planner.correct(True, 2.0, 1.0)
        planner.correct(False, 1.0, 1.0)
    assert planner.correction(True) == pytest.approx(2.0, abs=0.1)
    assert planner.correction(False) == pytest.approx(1.0, abs=0.15)
    assert choose(planner, 0.5, 8).rate < before.rate


def test_one_bad_step_does_not_rule_a_mode_out_for_good():
    planner = with_reads(1e9)
    assert choose(planner, 0.5, 16, draft=0.7).draft_length > 0
    planner.correct(True, 1.0, 1.0)
    planner.correct(True, 20.0, 1.0)  # the disk had other things to do
    assert choose(planner, 0.5, 16, draft=0.7).draft_length == 0
    steps = 0
    while choose(planner, 0.5, 16, draft=0.7).draft_length == 0:
        planner.correct(False, 1.0, 1.0)
        steps += 1
        assert steps < 500
    assert steps > 20  # and a mode that is worse is not tried all the time


def test_a_correction_is_a_decayed_ratio_that_fades_to_the_other_modes():
    planner = Planner(SHAPE)
    assert planner.correction(True) == planner.correction(False) == 1
    planner.correct(False, 7.0, 2.0)  # the first sets things up
    assert planner.correction(False) == 1
    planner.correct(False, 3.0, 1.0)
    assert planner.correction(False) == pytest.approx((0.9 * 2 + 3) / (0.9 * 2 + 1)) == planner.correction(True)
    plain = planner.correction(False)
    planner.correct(True, 5.0, 1.0)  # the first again: as the other
    planner.correct(True, 1.0, 1.0)
    drafts = planner.correction(True)
    assert drafts == pytest.approx((0.9 * plain + 1) / 1.9)
    first = plain + 0.01 * (1 - plain)  # plain decoding is believed to be as modelled, whatever slows drafts down
    assert planner.correction(False) == pytest.approx(first + 0.01 * (min(1.0, drafts) - first))
    idle = planner.correction(True)
    planner.correct(False, 2.0, 1.0)
    assert planner.correction(True) == pytest.approx(idle + 0.01 * (planner.correction(False) - idle))


def test_a_mode_that_never_ran_is_believed_to_be_like_the_other_but_plain_decoding_no_slower_than_modelled():
    for drafted, seconds, other in ((False, 3.0, 3.0), (False, 0.5, 0.5), (True, 3.0, 1.0), (True, 0.5, 0.5)):
        planner = Planner(SHAPE)
        for _ in range(200):
            planner.correct(drafted, seconds, 1.0)
        assert planner.correction(not drafted) == pytest.approx(other)


@pytest.mark.parametrize(("seconds", "bound"), [(100.0, 4.0), (0.001, 0.25)])
def test_corrections_are_bounded(seconds, bound):
    planner = Planner(SHAPE)
    for _ in range(100):
        planner.correct(True, seconds, 1.0)
    assert planner.correction(True) == bound


def test_what_a_resting_mode_learned_fades_by_steps():
    """As much in 50 steps told at once as in 50 told singly."""
    at_once, singly = Planner(SHAPE), Planner(SHAPE)
    for planner in (at_once, singly):
        for _ in range(30):
            planner.correct(False, 1.0, 1.0)
            planner.correct(True, 2.0, 1.0)
    before = at_once.correction(True)
    at_once.correct(False, 1.0, 1.0, steps=50)
    for _ in range(50):
        singly.correct(False, 1.0, 1.0)
    assert at_once.correction(True) == pytest.approx(singly.correction(True), rel=0.02)
    assert 1 < at_once.correction(True) < 0.9 * before


# --- waiting: in memory, one sequence, costs that make the gain of drafts of one token what is asked for

LITTLE = FastTierSizes(0, 0, 0, (9,), (8,), 16, 2)


class Table:
    """A planner in memory whose drafts gain what ``gain`` says, and how many tokens its steps draft."""

    def __init__(self, gain: float, known: bool = True) -> None:
        self.planner, self.gain = Planner(TierShape.of(LITTLE), split="msb_first", reads=False), gain
        planner = self.planner
        planner.acceptance = Acceptance(0.95, 0.0)
        planner.costs.target_seconds = lambda tokens: np.where(np.asarray(tokens) <= 2, 1.0, 1000.0)
        planner.costs.draft_seconds = lambda tokens: 1.95 / self.gain - 1
        self.know(2 if known else 0)

    def know(self, drafts: int) -> None:
        for _ in range(drafts):
            self.planner.costs.observe_draft(1, 0.1)

    def step(self) -> int:
        """Tokens drafted in one step that costs what is modelled."""
        length = self.planner.plan(1, LITTLE, LITTLE.all_experts, np.zeros((1, 16))).draft_length
        self.planner.observe_step(1, length, 0, float(self.planner._step_seconds(np.array(length), np.array(1 + length), 1)))
        return length

    def plain_steps(self) -> int:
        """Steps until one drafts."""
        steps = 0
        while not self.step():
            steps += 1
            assert steps < 3000
        return steps


def test_drafts_start_after_four_plain_steps():
    table = Table(1.2)
    assert [table.step() for _ in range(6)] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(("gain", "at_once"), [(1.499, False), (1.501, True)])
def test_a_clear_gain_does_not_wait(gain, at_once):
    assert (Table(gain).step() == 1) == at_once


@pytest.mark.parametrize(("gain", "measured"), [(1.499, True), (1.501, False)])
def test_plain_decoding_is_measured_after_64_drafts_unless_the_gain_is_clear(gain, measured):
    table = Table(gain)
    table.plain_steps()
    assert [table.step() for _ in range(63)] == [1] * 63
    assert table.step() == (0 if measured else 1)
    assert table.step() == 1


def test_waits_for_trials_that_fail_double():
    """A trial drafts two tokens."""
    table = Table(0.9)
    assert [table.plain_steps() for _ in range(7)] == [4, 64, 128, 256, 512, 1024, 1024]
    assert Table(0.9).planner._wait == 4
    table = Table(0.9)
    assert [table.step() for _ in range(6)] == [0, 0, 0, 0, 2, 0]


def test_a_trial_that_shows_a_gain_starts_drafts_at_once():
    table = Table(0.9)
    table.plain_steps()
    table.gain = 1.2
    table.plain_steps()
    assert table.step() == table.step() == 1


@pytest.mark.parametrize(("drafts", "wait"), [(15, 128), (16, 64)])
def test_drafts_that_are_given_up_early_wait_longer(drafts, wait):
    table = Table(0.9)
    assert table.plain_steps() == 4
    table.gain = 1.2  # after the trial's own verdict
    table.planner.plan(1, LITTLE, LITTLE.all_experts, np.zeros((1, 16)))
    assert [table.step() for _ in range(drafts)] == [1] * drafts
    table.planner._wait = 64
    table.gain = 0.9
    assert table.step() == 0
    table.gain = 1.2
    assert table.plain_steps() == wait - 1


def test_slices_that_are_chosen_anew_let_drafts_start_again_after_four_plain_steps():
    table = Table(1.2)
    table.planner = Planner(TierShape.of(LITTLE))
    table.planner.costs.target_seconds = lambda tokens: np.ones_like(np.asarray(tokens, float))
    table.planner.costs.draft_seconds = lambda tokens: table.gain
    table.know(2)
    table.gain = 0.7
    assert table.plain_steps() == 4
    table.gain = 10.0
    assert table.step() == table.step() == 0
    table.gain = 0.7
    assert table.plain_steps() == 2


@pytest.mark.parametrize(("gain", "first"), [(2.0, [1, 1]), (1.2, [0, 0, 0, 0, 1])])
def test_drafts_of_unknown_cost_are_short(gain, first):
    table = Table(gain, known=False)
    table.planner.costs.target_seconds = lambda tokens: np.ones_like(np.asarray(tokens, float))
    table.planner.costs.draft_seconds = lambda tokens: 0.0001
    assert table.step() == 2 and table.planner.chosen.draft_length > 2
    assert table.planner.proceed([[0.1], [0.1]], replace(table.planner.chosen, draft_length=2)) == [True, True]
    table.know(2)
    assert table.step() > 2


@pytest.mark.parametrize(("passed", "again"), [(0.0999, False), (0.1001, True)])
def test_planning_takes_a_hundredth_of_the_time_at_most(passed, again):
    planner = Planner(SHAPE)
    arguments = 1, SIZES, SIZES.all_experts, np.zeros((LAYERS, EXPERTS))
    planner.plan(*arguments)
    planner.observe_planning(0.001)
    first = planner.chosen
    planner.observe_draft(1, passed / 4)
    planner.observe_target(1, 3 * passed / 4, 0.0)
    assert (planner.standing(*arguments[:2]) is None) == again
    planner.plan(*arguments)
    assert (planner.chosen is not first) == again


@pytest.mark.parametrize("change", ["sequences", "sizes", "run"])
def test_a_change_is_planned_for_at_once(change):
    planner = Planner(SHAPE)
    counts = np.zeros((LAYERS, EXPERTS))
    planner.plan(1, SIZES, SIZES.all_experts, counts)
    planner.observe_planning(1.0)
    first = planner.chosen
    if change == "run":
        planner.begin_run()
    sizes = replace(SIZES) if change == "sizes" else SIZES
    planner.plan(2 if change == "sequences" else 1, sizes, SIZES.all_experts, counts)
    assert planner.chosen is not first


def test_plain_steps_between_choices_are_learned_from_by_their_mean():
    """Not by the one that ended the wait, which is longer than most."""
    planner = Planner(SHAPE, draft_length=0)
    arguments = 1, SIZES, SIZES.minimum, np.zeros((LAYERS, EXPERTS))
    for _ in range(400):
        planner.plan(*arguments)
        planner.observe_planning(0.01)
        for seconds in (0.2, 0.2, 0.2, 1.0):
            planner.observe_target(1, seconds, 0.9 * seconds)
            planner.observe_step(1, 0, 10**8, seconds)
    modelled = float(planner._step_seconds(np.array(0), np.array(1), 1, 10**8))
    assert planner.correction(False) == pytest.approx(min(4.0, 0.4 / modelled), rel=0.05)


def test_plain_steps_are_learned_from_once(monkeypatch):
    """A step counts for the choice that follows it, not for later ones."""
    planner, learned = Planner(SHAPE, draft_length=0), []
    monkeypatch.setattr(planner, "correct", lambda drafted, seconds, modelled, steps: learned.append((seconds, steps)))
    for seconds in (0.2, 0.6):
        planner.plan(1, SIZES, SIZES.minimum, np.zeros((LAYERS, EXPERTS)))
        planner.observe_planning(0.025)  # the next choice is due after 2.5 seconds
        for _ in range(5):
            planner.observe_target(1, 0.5, 0.4)
            planner.observe_step(1, 0, 10**8, seconds)
    for _ in range(2):
        planner.begin_run()
        planner.plan(1, SIZES, SIZES.minimum, np.zeros((LAYERS, EXPERTS)))
    assert learned == [(pytest.approx(0.2), 5), (pytest.approx(0.6), 5)]


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
