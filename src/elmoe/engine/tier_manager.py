"""Carries plans out on the fast tier: KV cache first, slices in what is left; and tells the planner what passes showed."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter

from elmoe.engine.kv_cache import PagedCache
from elmoe.engine.tier import ExpertTier
from elmoe.engine.verifying import Outcome
from elmoe.policy.budget import FastTierSizes
from elmoe.policy.planner import Plan, Planner


class TierManager:
    """Keeps the fast tier as the planner plans it; called between steps."""

    def __init__(self, planner: Planner, tier: ExpertTier, cache: PagedCache) -> None:
        self.planner, self._tier, self._cache = planner, tier, cache
        self._budget, self._most_kv = 0, 0
        self._sizes = FastTierSizes(0, -1, 0, (), (), 0, 0)  # of no run
        self._plan: Plan | None = None
        self._read = tier.bytes_read, tier.reading_seconds
        self._missed = 0

    def expect(self, sizes: FastTierSizes, budget: int) -> None:
        """Requests are about to come whose KV cache takes at most ``sizes.kv`` of the ``budget`` bytes."""
        self._budget, self._most_kv, self._plan = budget, sizes.kv, None
        # An accounted tier holds the whole KV cache from the start; in an enforced one slices use its room until it grows.
        if self._tier.enforced:
            self._sizes = replace(sizes, kv=-1)
        elif sizes != self._sizes:  # the same object where nothing changed, so that the planner's choice stands
            self._sizes = sizes
        self._read = self._tier.bytes_read, self._tier.reading_seconds
        self._missed = self._tier.missed_bytes
        if self._tier.enforced:
            self._cache.shrink()
        self.planner.begin_run()

    def plan(self, sequences: int) -> Plan:
        """The plan of the next step, carried out: the tier holds the KV cache and the plan's slices."""
        if self._plan is not None and not self.planner.chooses and not self._tier.enforced:
            return self._plan
        changed = self._fit_cache(sequences * self._cache.layout.stretch_bytes) if self._tier.enforced else False
        plan, old = self.planner.standing(sequences, self._sizes), self._plan
        if plan is None:
            began = perf_counter()
            plan = self.planner.plan(sequences, self._sizes, self._budget, self._tier.counts)
            self.planner.observe_planning(perf_counter() - began)
        self._plan = plan
        if changed or old is None or (plan.slots is not old.slots and plan.slots != old.slots):
            sizes = self._sizes
            capacity = sizes.staging if plan.slots is None else self._budget - sizes.dense - sizes.kv
            self._tier.replan(plan.slots, capacity)
        return plan

    def _fit_cache(self, stretch: int) -> bool:
        """Fit the KV cache's share to the pages in use, two stretches of every sequence ahead, each of ``stretch`` bytes in
        all: slices are not given up for every token. Pages that came free go back once they are more than half of the share.
        Returns whether it changed."""
        used, share = self._cache.bytes_in_use, self._sizes.kv
        grown = share < min(self._most_kv, max(used, self._cache.bytes_touched) + stretch)
        shrunk = not grown and used + 2 * stretch < share // 2
        if shrunk:
            self._cache.shrink()
        if grown or shrunk:
            held = max(used, self._cache.bytes_touched)
            self._sizes = replace(self._sizes, kv=min(self._most_kv, held + 2 * stretch))
        return grown or shrunk

    def learn(self, outcome: Outcome, seconds: float) -> None:
        """Tell the planner what a step showed: its passes, its routing, what came of drafts, and its seconds."""
        planner, tier = self.planner, self._tier
        if not planner.chooses and not tier.enforced:
            return
        passes = outcome.passes
        if len(passes) == 1 and passes[0].phase == "plain" and not tier.enforced:
            done = passes[0]
            planner.observe_plain_step(len(outcome.verdicts), done.ended - done.began, seconds)
            return
        for done in passes:
            planner.observe_target(len(done.rows), done.seconds, done.waited)
        if tier.enforced:
            self._learn_reads()
        verdicts, drafted = outcome.verdicts, outcome.drafted
        if drafted:
            for verdict in verdicts.values():
                for confidence, accepted in verdict.judged:
                    planner.observe_judged(confidence, accepted)
        if len(outcome.passes) != 1 or not verdicts or outcome.batch.chunks:
            return  # of no one kind: what it took and read says nothing of a decode step
        if outcome.routing is not None:
            counts = {sequence.index: len(verdict.rows) for sequence, verdict in verdicts.items()}
            planner.observe_routing(counts, outcome.routing, tier.found)
        missed = tier.missed_bytes
        planner.observe_step(len(verdicts), drafted, missed - self._missed, seconds)
        self._missed = missed

    def _learn_reads(self) -> None:
        """Tell of reads once they were as many as an expert has in every layer."""
        read, reading = self._tier.bytes_read - self._read[0], self._tier.reading_seconds - self._read[1]
        shape = self.planner.shape
        if read * shape.layers >= shape.one_expert and read:
            self.planner.costs.observe_reads(read, reading)
            self._read = self._tier.bytes_read, self._tier.reading_seconds
