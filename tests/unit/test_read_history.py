"""Reads of draft lengths that did not run, told from the routing of passes that did."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe.policy.read_history import ReadHistory
from elmoe.policy.residency import ResidentSet

LAYERS, EXPERTS, TOP_K = 2, 13, 3
MSB, LSB = (10, 12), (7, 0)
LENGTHS = (0, 1, 2, 4, 9)
FLAT = np.full(len(LENGTHS), 100.0)


def stream(tokens: int, seed: int) -> np.ndarray:
    """(layers, tokens, k) experts of one sequence."""
    rng = np.random.default_rng(seed)
    return np.array([[rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)] for _ in range(LAYERS)], np.int32)


def residents(seed: int) -> ResidentSet:
    msb = np.random.default_rng(seed).random((LAYERS, EXPERTS)) < 0.5
    return ResidentSet(msb, msb & (np.arange(EXPERTS) % 2 == 0))


def missing(streams: list[np.ndarray], first: int, length: int, found: ResidentSet) -> int:
    """Bytes that a draft of so many tokens would have read, counted one by one."""
    read = 0
    for layer in range(LAYERS):
        used = {int(e) for one in streams for e in one[layer, first : first + 1 + length].ravel()}
        read += sum(MSB[layer] * (not found.msb[layer, e]) + LSB[layer] * (not found.lsb[layer, e]) for e in used)
    return read


@pytest.mark.parametrize("committed", [(1, 1), (3, 3), (1, 4), (7, 2)])
def test_every_length_is_measured_whatever_ran(committed):
    streams, found = [stream(84, 0), stream(84, 1)], residents(2)
    history = ReadHistory(LENGTHS, MSB, LSB)
    assert history.ratios.tolist() == [1.0] * len(LENGTHS)
    for step in range(12):
        rows = [one[:, step * n : (step + 1) * n] for one, n in zip(streams, committed, strict=True)]
        history.observe(dict(enumerate(committed)), np.concatenate(rows, axis=1), found, FLAT)
    measured, weight = 2.0 * FLAT, 2.0  # what it believed before
    starts = [n for n in range(12) if all((12 - n) * each > 4 for each in committed)]
    for step in starts:
        ahead = [one[:, step * n :] for one, n in zip(streams, committed, strict=True)]
        bytes_read = [missing(ahead, 0, length, found) for length in (0, 1, 2, 4)]
        measured, weight = 0.95 * measured + np.array([*bytes_read, bytes_read[-1]]), 0.95 * weight + 1
    assert history.ratios == pytest.approx(measured / weight / FLAT)


@pytest.mark.parametrize("another_run", [False, True])
def test_other_sequences_do_not_continue_those_before(another_run):
    history, again = ReadHistory(LENGTHS, MSB, LSB), ReadHistory(LENGTHS, MSB, LSB)
    one, other, found = stream(9, 3), stream(9, 4), residents(5)
    for token in range(4):  # too few to tell
        history.observe({0: 1}, one[:, token : token + 1], found, FLAT)
    if another_run:
        history.end_run()
    for token in range(9):
        for told in (history, again):
            told.observe({0 if another_run else 1: 1}, other[:, token : token + 1], found, FLAT)
    assert history.ratios.tolist() == again.ratios.tolist() != [1.0] * len(LENGTHS)


def test_passes_with_slices_just_changed_tell_nothing_but_continue_others():
    history, silent = ReadHistory(LENGTHS, MSB, LSB), ReadHistory(LENGTHS, MSB, LSB)
    tokens, found = stream(9, 6), residents(7)
    for token in range(9):
        history.observe({0: 1}, tokens[:, token : token + 1], found, FLAT if token == 0 else None)
        silent.observe({0: 1}, tokens[:, token : token + 1], found, None)
    assert silent.ratios.tolist() == [1.0] * len(LENGTHS)
    read = missing([tokens], 0, 2, found)
    assert history.ratios[2] == pytest.approx((0.95 * 200 + read) / (0.95 * 200 + 100))


def test_a_fixed_length_is_measured_over_all_its_tokens():
    history, tokens, found = ReadHistory((9,), MSB, LSB), stream(12, 8), residents(9)
    for token in range(12):
        history.observe({0: 1}, tokens[:, token : token + 1], found, np.array([100.0]))
    measured, weight = 200.0, 2.0
    for first in range(3):
        measured, weight = 0.95 * measured + missing([tokens], first, 9, found), 0.95 * weight + 1
    assert history.ratios[0] == pytest.approx(measured / weight / 100)


@pytest.mark.parametrize("settled", [True, False])
def test_what_waits_is_bounded_by_what_is_needed(settled):
    history, all_at_once, found = ReadHistory(LENGTHS, MSB, LSB), ReadHistory(LENGTHS, MSB, LSB), residents(0)
    tokens = stream(600, 1)
    for step in range(200):
        rows = np.concatenate([tokens[:, step : step + 1], tokens[:, 200 + 2 * step : 202 + 2 * step]], axis=1)
        for told in (history, all_at_once):
            told.observe({0: 1, 7: 2}, rows, found, FLAT if settled else None)
        assert np.isfinite(history.ratios).all()
        assert len(history._touched) <= 15
    assert history.ratios == pytest.approx(all_at_once.ratios)


@pytest.mark.parametrize(("length", "measured"), [(6, True), (7, False)])
def test_reads_are_measured_up_to_drafts_of_six_tokens(length, measured):
    """Of longer drafts, bytes stand to their model as those of the longest measured one."""
    history, tokens, found = ReadHistory((0, 5, length), MSB, LSB), stream(8, 10), residents(11)
    for token in range(8):
        history.observe({0: 1}, tokens[:, token : token + 1], found, np.array([100.0, 200.0, 400.0]))
    assert (history.ratios[2] == pytest.approx(history.ratios[1])) != measured


def test_what_nobody_asks_for_stays_bounded():
    """Choices may be rare: their wait is in proportion to what the last one took, and that to what it had to look at."""
    asked, silent = ReadHistory(LENGTHS, MSB, LSB), ReadHistory(LENGTHS, MSB, LSB)
    tokens, found = stream(2000, 12), residents(13)
    for token in range(2000):
        for history in (asked, silent):
            history.observe({0: 1}, tokens[:, token : token + 1], found, FLAT)
        assert len(silent._waiting) < 256 and len(silent._touched) < 300 and len(silent._passes) < 300
        assert np.isfinite(asked.ratios).all()
    assert silent.ratios == pytest.approx(asked.ratios)
