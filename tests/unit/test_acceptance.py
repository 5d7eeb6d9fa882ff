"""Acceptance tables: counted from a recording as by hand, interpolated, and refused where they make no sense."""

from __future__ import annotations

import json

import numpy as np
import pytest

from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import TraceError
from elmoe.llm import load
from elmoe.measure.acceptance import profile_acceptance
from elmoe.trace import TraceRecorder, read_trace
from elmoe.trace.acceptance import (
    ENOUGH,
    AcceptanceRow,
    AcceptanceTable,
    acceptance_of_trace,
    load_acceptance,
    save_acceptance,
)
from tests.tiny import tiny_spec


def row(bits: int, share: float, judged, accepted) -> AcceptanceRow:
    return AcceptanceRow(bits=bits, share=share, judged=judged, accepted=accepted)


def table(*rows: AcceptanceRow) -> AcceptanceTable:
    return AcceptanceTable(status="measured", source="a test", edges=(0.0, 0.5, 1.0), rows=rows)


LOW = row(4, 0.25, ((100, 100), (40, 10)), ((20, 60), (10, 8)))
HIGH = row(4, 0.75, ((100, 100), (100, 100)), ((60, 80), (50, 90)))


def test_interpolation_in_share_and_pools_where_counts_are_few():
    both = table(HIGH, LOW, row(8, 1.0, ((50, 50),), ((50, 50),)))
    assert both.probability(4, 0.25, 1) == pytest.approx(80 / 200)
    assert both.probability(4, 0.5, 1) == pytest.approx((80 / 200 + 140 / 200) / 2)
    assert both.probability(4, 0.0, 1) == both.probability(4, 0.25, 1) and both.probability(4, 1, 1) == pytest.approx(0.7)
    assert both.probability(8, 0.3, 5, 0.9) == 1.0
    assert both.probability(4, 0.25, 2) == pytest.approx(18 / 50) == both.probability(4, 0.25, 9)
    assert both.probability(4, 0.25, 1, 0.49) == pytest.approx(0.2) and both.probability(4, 0.25, 1, 1.0) == pytest.approx(
        0.6
    )
    assert both.probability(4, 0.75, 2, 0.5) == pytest.approx(0.9)
    # the bucket has 10 < ENOUGH judged tokens at this depth: all depths of the bucket stand in
    assert both.probability(4, 0.25, 2, 0.7) == pytest.approx(68 / 110)
    few = table(row(4, 0.5, ((ENOUGH, 0), (1, 0)), ((5, 0), (1, 0))))
    assert few.probability(4, 0.5, 1, 0.9) == pytest.approx(5 / ENOUGH)
    assert few.probability(4, 0.5, 2) == pytest.approx(6 / (ENOUGH + 1)) == few.probability(4, 0.5, 2, 0.9)


def test_what_was_not_measured_is_refused():
    one = table(LOW)
    for arguments, message in (
        ((3, 0.5, 1), "3 bits were not measured"),
        ((4, 0.5, 0), "depth 0"),
        ((4, 1.5, 1), "share 1.5"),
        ((4, 0.5, 1, -0.1), "confidence -0.1"),
    ):
        with pytest.raises(TraceError, match=message):
            one.probability(*arguments)


def test_a_constant_is_labelled_assumed(tmp_path):
    constant = AcceptanceTable.constant_of(0.8, "a guess")
    assert constant.status == "assumed" and constant.source == "a guess"
    assert constant.probability(3, 0.1, 99) == 0.8
    save_acceptance(constant, tmp_path / "c.json")
    assert load_acceptance(tmp_path / "c.json") == constant
    with pytest.raises(TraceError, match="constant is"):
        AcceptanceTable.constant_of(1.2, "x")


def test_files(tmp_path):
    path = tmp_path / "a.json"
    save_acceptance(table(LOW, HIGH), path)
    assert load_acceptance(path) == table(LOW, HIGH) and len(path.read_text().splitlines()) > 4
    whole = json.loads(path.read_text())
    first = whole["rows"][0]

    def with_row(**changes: object) -> dict:
        return {"rows": [first | changes]}

    for changes, message in (
        ({"constant": 0.5}, "either"),
        ({"rows": []}, "either"),
        ({"rows": [], "constant": 0.5}, "assumed, not measured"),
        ({"status": "known"}, "status"),
        ({"edges": [0, 1]}, "buckets"),
        ({"edges": [0, 0.5, 0.5, 1]}, "ascend"),
        ({"edges": [0.1, 0.5, 1]}, "ascend"),
        ({"rows": [first, first]}, "same bits"),
        ({"extra": 0}, "unknown field"),
        ({"version": 2}, "version 2"),
        (with_row(share=2), "share in 0..1"),
        (with_row(bits=0), "1..16"),
        (with_row(judged=[[1, 1]]), "one list"),
        (with_row(judged=[], accepted=[]), "one list"),
        (with_row(judged=[[100, 100], [1]]), "depth 2"),
        (with_row(accepted=[[20, 101], [10, 8]]), "0..judged"),
        (with_row(accepted=[[20, -1], [10, 8]]), "0..judged"),
        (with_row(judged=[[0, 0]], accepted=[[0, 0]]), "nothing was judged"),
        (with_row(judged=[[0.5, 0]]), "no acceptance table"),
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(TraceError, match=message):
            load_acceptance(path)
    with pytest.raises(TraceError, match="there is no acceptance table"):
        load_acceptance("nothing")


def test_counts_of_a_recording(tmp_path):
    """Two drafts of three tokens: one fails at its second token, whose successor is judged no more."""
    model = tiny_spec()
    wide = [np.tile(np.arange(4, dtype=np.int32), (4, 1))] * 3
    scores = [np.full((4, 4), 0.25, np.float32)] * 3
    resident = np.zeros((3, 8), bool)
    resident[:, :4] = True
    with TraceRecorder(tmp_path / "t", model, {"commit_limit": 1}) as recorder:
        for step, targets in enumerate(([7, 7, 8, 1], [7, 8, 9, 1])):
            for phase in ("draft", "verify"):
                recorder.record(
                    phases=[phase] * 4, step=step, sequences=np.zeros(4, np.int32), tokens=np.zeros(4, np.int32),
                    positions=np.arange(5, 9, dtype=np.int32) + step, targets=targets, drafts=[7, 8, 9, None],
                    confidences=[0.2, 0.96, 1.0, None], draft_lengths=[3] * 4, ranked=wide, scores=scores, resident=resident,
                )  # fmt: skip
    counts = acceptance_of_trace(read_trace(tmp_path / "t"), 4)
    assert counts.share == 0.5 and counts.bits == 4 and len(counts.judged) == 3
    judged, accepted = np.array(counts.judged), np.array(counts.accepted)
    assert judged.sum(axis=1).tolist() == [2, 2, 1] and accepted.sum(axis=1).tolist() == [2, 1, 1]
    assert judged[0, 0] == 2 and judged[1, 6] == 2 and judged[2, 7] == 1
    with TraceRecorder(tmp_path / "u", model) as recorder:
        pass
    with pytest.raises(TraceError, match="every position"):
        acceptance_of_trace(read_trace(tmp_path / "u"), 4)
    with TraceRecorder(tmp_path / "u", model, {"commit_limit": 1}) as recorder:
        pass
    with pytest.raises(TraceError, match="no verified draft"):
        acceptance_of_trace(read_trace(tmp_path / "u"), 4)


def test_a_profile_of_the_demo_model():
    """More resident experts, more acceptance; 8 bits and every expert that was ever used: nearly all."""
    with load("demo", EngineOptions(batch=2)) as model:
        requests = [Request(model.encode(text), 24, ignore_eos=True) for text in ("The whale", "In the morning")]
        rows = profile_acceptance(model, requests, depth=3)
    assert {row.bits for row in rows} == {4, 8} and len(rows[0].judged) == 3
    assert [row.share for row in rows[:3]] == pytest.approx([4 / 64, 0.25, 0.5], abs=0.1)
    found = AcceptanceTable(status="measured", source="demo", rows=rows)
    assert found.probability(4, 0, 1) < found.probability(4, 1, 1) and found.probability(8, 1, 1) > 0.9


def test_the_preset_is_measured_and_grows_with_the_resident_share():
    preset = load_acceptance("demo")
    assert preset.status == "measured" and {row.bits for row in preset.rows} == {4, 8} and len(preset.rows) == 10
    for bits in (4, 8):
        chances = [preset.probability(bits, share, 1) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
        assert chances == sorted(chances) and chances[0] < 0.5 and chances[-1] > 0.9
    assert preset.probability(4, 1.0, 1, 0.995) > preset.probability(4, 1.0, 1, 0.2)
    assert 0 < preset.probability(4, 0.33, 16, 0.6) < 1
