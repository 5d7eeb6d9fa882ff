"""The planner: what measurements correct, and how long it waits before it tries another mode."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elmoe.policy.acceptance import Acceptance
from elmoe.policy.budget import TierShape
from elmoe.policy.planner import Planner
from tests.planning import EXPERTS, LAYERS, LITTLE, SHAPE, SIZES, choose, with_reads

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


def test_a_plain_step_that_read_nothing_teaches_the_same_by_either_way():
    """The short way of the steps in memory, where drafts rest."""
    told = []
    for short in (False, True):
        planner = Planner(TierShape.of(LITTLE), reads=False)
        for step in range(9):
            planner.plan(2, LITTLE, LITTLE.all_experts, np.zeros((1, 16)))
            planner.observe_planning(1e-7)
            seconds = 0.001 * (1 + step % 3)
            if short:
                planner.observe_plain_step(2, 0.9 * seconds, seconds)
            else:
                planner.observe_target(2, 0.9 * seconds, 0.0)
                planner.observe_step(2, 0, 0, seconds)
        planner.begin_run()
        planner.plan(1, LITTLE, LITTLE.all_experts, np.zeros((1, 16)))
        told.append((planner.correction(False), float(planner.costs.target_seconds(2)), planner.chosen))
    assert told[0] == told[1]


def test_draft_passes_of_several_sequences_are_counted_once():
    """Six draft tokens of two sequences are three passes: their seconds are as modelled, so nothing is corrected."""
    planner = Planner(TierShape.of(LITTLE), draft_length=3, reads=False)
    planner.costs.draft_seconds = lambda tokens: 1.0
    planner.costs.target_seconds = lambda tokens: 0.0 * np.asarray(tokens)
    for _ in range(20):
        planner.plan(2, LITTLE, LITTLE.all_experts, np.zeros((1, 16)))
        planner.observe_planning(1e-9)
        planner.observe_step(2, 6, 0, 3.0)
        planner.begin_run()
    planner.plan(2, replace(LITTLE), LITTLE.all_experts, np.zeros((1, 16)))
    assert planner.correction(True) == pytest.approx(1.0)
