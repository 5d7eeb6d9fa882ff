"""Planners for tests: sizes, costs that are given, and reads of a given bandwidth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from elmoe.policy.budget import FastTierSizes, TierShape
from elmoe.policy.planner import Plan, Planner

MSB, LSB, LAYERS, EXPERTS = 3_538_944, 3_145_728, 16, 64
SIZES = FastTierSizes(0, 0, 16 * (MSB + LSB), (MSB,) * LAYERS, (LSB,) * LAYERS, EXPERTS, 8)
SHAPE = TierShape.of(SIZES)
SKEWED = np.linspace(1.9, 0.1, 64) / 8
"""Probability that a token uses the hottest, ..., coldest expert: 8 in all."""
LITTLE = FastTierSizes(0, 0, 0, (9,), (8,), 16, 2)
"""One layer whose experts are all in memory."""


def choose(planner: Planner, share: float, sequences: int, draft: float = 0.05, token: float = 0.01, use=SKEWED) -> Plan:
    """A new choice by given costs, ``share`` of the experts fitting beside the staging."""
    planner.costs.draft_seconds = lambda tokens: draft + 0.001 * tokens
    planner.costs.target_seconds = lambda tokens: 0.05 + token * np.asarray(tokens)
    budget = int(share * SIZES.all_experts) + SIZES.staging
    planner.begin_run()
    planner.plan(sequences, replace(SIZES), budget, np.tile(use, (LAYERS, 1)))
    return planner.chosen


def with_reads(bandwidth: float) -> Planner:
    planner = Planner(SHAPE)
    planner.costs.observe_reads(int(bandwidth), 1.0)
    return planner
