"""Carries plans out on the fast tier: KV cache first, slices in what is left; and tells the planner what passes showed."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from elmoe.engine.tier import ExpertTier
from elmoe.policy.budget import FastTierSizes
from elmoe.policy.planner import Plan, Planner


class TierManager:
    """One run's fast tier; called between steps."""

    def __init__(self, planner: Planner, tier: ExpertTier, sizes: FastTierSizes, budget: int, page_bytes: int) -> None:
        """:param sizes: what competes for the ``budget`` bytes; its KV cache is the largest that the run comes to need."""
        self.planner, self._tier, self._budget, self._page_bytes = planner, tier, budget, page_bytes
        self._most_kv = sizes.kv
        # An accounted tier holds the whole KV cache from the start; in an enforced one slices use its room until it grows.
        self._sizes = replace(sizes, kv=-1) if tier.enforced else sizes
        self._plan: Plan | None = None
        self._read = tier.bytes_read, tier.reading_seconds
        self._missed, self._learning = 0, 0.0
        planner.begin_run()

    def plan(self, sequences: int, kv_bytes: int) -> Plan:
        """The plan of the next step, carried out: the tier holds the KV cache and the plan's slices."""
        page = sequences * self._page_bytes
        grown = self._sizes.kv < min(self._most_kv, kv_bytes + page)
        if grown:  # in steps of a page per sequence, so that slices are not given up for every token
            self._sizes = replace(self._sizes, kv=min(self._most_kv, kv_bytes + 2 * page))
        began = perf_counter()
        plan = self.planner.plan(sequences, self._sizes, self._budget, self._tier.counts)
        self.planner.observe_planning(perf_counter() - began + self._learning)
        old, self._plan = self._plan, plan
        if grown or old is None or (plan.slots is not old.slots and plan.slots != old.slots):
            sizes = self._sizes
            capacity = sizes.staging if plan.slots is None else self._budget - sizes.dense - sizes.kv
            self._tier.replan(plan.slots, capacity)
        return plan

    def observe_target(self, tokens: int, seconds: float, waited: float) -> None:
        """Tell of a target pass, and of what was read since the last that read as much as an expert."""
        self.planner.observe_target(tokens, seconds, waited)
        read, reading = self._tier.bytes_read - self._read[0], self._tier.reading_seconds - self._read[1]
        shape = self.planner.shape
        if read * shape.layers >= shape.one_expert and read:
            self.planner.costs.observe_reads(read, reading)
            self._read = self._tier.bytes_read, self._tier.reading_seconds

    def observe_routing(self, committed: dict[int, int], experts: NDArray[np.int32]) -> None:
        """Tell of tokens committed by each sequence, and their (layers, tokens, k) experts."""
        tier = self._tier
        self.planner.observe_routing(committed, experts, tier.found, tier.counts, tier.filled)

    def observe_step(self, sequences: int, drafted: int, seconds: float) -> None:
        """Tell of a decode step: tokens drafted in all, and its seconds."""
        began, missed = perf_counter(), self._tier.missed_bytes
        self.planner.observe_step(sequences, drafted, missed - self._missed, seconds)
        self._missed, self._learning = missed, perf_counter() - began
