"""Workloads: what a replay of facts counts, against independent counts."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from elmoe.errors import TraceError
from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import ResidencyParameters
from elmoe.sim.workload import Plan, RoutingReplay, TierPlan
from tests.physics.machines import facts

FACTS = facts(sequences=4, positions=60, layers=3)


def slots(count: int, layers: int = 3) -> SlotPlan:
    return SlotPlan((count,) * layers, (count,) * layers, 0)


@pytest.mark.parametrize("count", [4, 6, 9, 16])
def test_lru_hits_of_one_sequence_equal_an_independent_cache(count):
    """A plain LRU over experts, one ordered dictionary per layer, uses of a step touched together."""
    tier = TierPlan(slots(count), ResidencyParameters("lru"), (1.0,) * 3, (1.0,) * 3)
    workload = RoutingReplay(FACTS).run(Plan(1, steps=40, tier=tier))
    prompt = int(FACTS.prompts[0])
    expected = np.zeros((40, 3), int)
    for layer in range(3):
        cache: OrderedDict[int, None] = OrderedDict()

        def touch(experts: list[int], cache: OrderedDict[int, None] = cache) -> int:
            hits = sum(expert in cache for expert in experts)
            # within a step the least recently used goes; of those used together, the lower id is kept longer
            for expert in sorted(experts, reverse=True):
                cache[expert] = None
                cache.move_to_end(expert)
            while len(cache) > count:
                cache.popitem(last=False)
            return hits

        # The prompt is one pass: what it used counts as used together.
        touch(sorted({int(e) for e in FACTS.chosen[0, : prompt - 1, layer].ravel()}))
        for step in range(40):
            expected[step, layer] = touch([int(e) for e in FACTS.chosen[0, prompt - 1 + step, layer]])
    np.testing.assert_array_equal(workload.target.msb_hits, expected)


def test_counts_without_a_tier_are_those_of_the_facts():
    workload = RoutingReplay(FACTS).run(Plan(4, steps=10))
    assert (workload.target.attended == 1024 * workload.target.tokens).all()  # the paper's context, unless said otherwise
    assert workload.committed.tolist() == [4] * 10
    for step in range(10):
        rows = [FACTS.chosen[s, FACTS.prompts[s] - 1 + step] for s in range(4)]
        for layer in range(3):
            distinct = {int(e) for row in rows for e in row[layer]}
            assert workload.target.active[step, layer] == len(distinct)
    assert (workload.target.pairs == 4 * FACTS.top_k).all()


def test_drafts_of_the_residents_use_residents_only():
    tier = TierPlan(slots(8), ResidencyParameters(), (1.0,) * 3, (1.0,) * 3)
    workload = RoutingReplay(FACTS).run(Plan(3, "resident", 3, steps=6, tier=tier), lambda share, depth: 0.5)
    assert workload.draft is not None
    np.testing.assert_array_equal(workload.draft.active, workload.draft.msb_hits)
    assert len(workload.draft.tokens) == 3 * workload.steps


def test_sure_drafts_commit_everything_and_hopeless_ones_one_token():
    replay = RoutingReplay(FACTS)
    assert replay.run(Plan(2, "external", 4, steps=5), lambda share, depth: 1.0).committed.tolist() == [10] * 5
    assert replay.run(Plan(2, "external", 4, steps=5), lambda share, depth: 0.0).committed.tolist() == [2] * 5


def test_impossible_plans_are_refused():
    with pytest.raises(TraceError, match="4 sequences, the batch is 5"):
        RoutingReplay(FACTS).run(Plan(5))
    with pytest.raises(TraceError, match="need an acceptance"):
        RoutingReplay(FACTS).run(Plan(1, "external", 2))
    with pytest.raises(TraceError, match="ends before the first step"):
        RoutingReplay(FACTS).run(Plan(1, "external", 60), lambda share, depth: 0.5)
