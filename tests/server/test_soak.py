"""Some seconds of `make soak`; its slope of the memory needs more time."""

from __future__ import annotations

from tests.server.soak import soak


def test_nobody_is_lost_at_twice_the_capacity(store):
    run = soak(str(store), 15)
    assert not run.wrong, run.wrong[:5]
    assert run.counts["complete"] >= 10 and run.counts["429"] > 0 and run.counts["left early"] > 0
    assert run.counts["left"] == 0 and run.memory[-1][1] - run.memory[len(run.memory) // 3][1] < 40e6
