"""A sample of the schedules that ``make full-grid`` runs: see tests/schedules.py."""

from __future__ import annotations

import pytest

from tests.schedules import SPEC, Schedules, windowed_spec


@pytest.mark.parametrize("spec", [SPEC, windowed_spec()], ids=["all positions", "windows"])
def test_requests_that_come_and_go_get_what_they_get_alone(tmp_path, spec):
    schedules = Schedules(tmp_path, spec)
    try:
        for seed in range(40):
            schedules.run(seed)
    finally:
        schedules.close()
    for event in ("eos", "stop", "length", "aborted", "failed", "too long", "mixed passes", "drafts"):
        assert schedules.seen[event] > 0, event
