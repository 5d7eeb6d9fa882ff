"""Planners for tests: sizes, costs that are given, and reads of a given bandwidth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from elmoe.policy.budget import FastTierSizes, TierShape
from elmoe.policy.planner import Plan, Planner
from elmoe.policy.residency import ResidentSet

MSB, LSB, LAYERS, EXPERTS = 3_538_944, 3_145_728, 16, 64
SIZES = FastTierSizes(0, 0, 16 * (MSB + LSB), (MSB,) * LAYERS, (LSB,) * LAYERS, EXPERTS, 8)
SHAPE = TierShape.of(SIZES)
SKEWED = np.linspace(1.9, 0.1, 64) / 8
"""Probability that a token uses the hottest, ..., coldest expert: 8 in all."""
LITTLE = FastTierSizes(0, 0, 0, (9,), (8,), 16, 2)
"""One layer whose experts are all in memory."""


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
