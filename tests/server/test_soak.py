"""Some seconds of `make soak`, in which no slope of the memory can be told; two minutes of it in the full tier."""

from __future__ import annotations

import pytest

from tests.server.soak import SLOPE, soak


@pytest.mark.parametrize("seconds", [15, pytest.param(120, marks=pytest.mark.full)])
def test_nobody_is_lost_at_twice_the_capacity(store, seconds):
    run = soak(str(store), seconds)
    assert not run.wrong, run.wrong[:5]
    assert run.counts["complete"] >= 10 and run.counts["429"] > 0 and run.counts["left early"] > 0
    assert run.counts["left"] == 0 and run.memory[-1][1] - run.memory[len(run.memory) // 3][1] < 40e6
    assert seconds < 60 or run.slope < 10 * SLOPE
