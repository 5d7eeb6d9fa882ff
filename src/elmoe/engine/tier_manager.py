"""Keeps an enforced tier at its operating point: KV first, then as many slices, and as long drafts, as the planner says."""

from __future__ import annotations

from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from elmoe.engine.direct_tier import DirectTier
from elmoe.policy.budget import FastTierSizes, SlotPlan, plan_slots
from elmoe.policy.draft_length import DraftLengthController
from elmoe.policy.operating_point import OperatingPoint, Planner, popularity

if TYPE_CHECKING:
    from elmoe.engine.engine import EngineOptions

SETTLED_SLOTS = 0.95
"""Share of slots in use from which on a step's bytes tell of its mode, and not of slices just changed."""
ASSUMED_MEMORY_BANDWIDTH = 15e9
"""Bytes per second of memory, assumed for the cost of passes until some were measured."""
PLANNING = 0.01
"""Share of the time that planning may take: where steps take milliseconds, not each plans and is learned from."""
SETTLED_TOKENS = 50
"""Tokens counted (with their decay) from which on the popularity of experts, and what a step reads by it, can be told."""


class TierManager:
    """One run's decisions about an enforced tier; called between steps."""

    def __init__(
        self, options: EngineOptions, sizes: FastTierSizes, budget: int, tier: DirectTier, planner: Planner,
        controller: DraftLengthController, page_bytes: int,
    ) -> None:  # fmt: skip
        self._options, self._sizes, self._budget = options, sizes, budget
        self._tier, self._controller, self._page_bytes = tier, controller, page_bytes
        self.planner = planner
        planner.reads.end_run()
        self._read = tier.bytes_read, tier.reading_seconds
        self.point: OperatingPoint | None = None
        self._kv, self._sequences, self._plan_again, self._unobserved = -1, 0, 0.0, 0
        self._use = np.full(sizes.experts, sizes.top_k / sizes.experts)
        controller.step_seconds = self._step_seconds
        if options.split == "auto":
            controller.acceptance = lambda: planner.acceptance(self._covered())

    def plan(self, sequences: int, kv_bytes: int) -> int:
        """Fit the tier to the KV cache and the planner's choice; returns how many tokens to draft at most."""
        page = sequences * self._page_bytes
        grown = self._kv < min(self._sizes.kv, kv_bytes + page)
        if grown:  # in steps of a page per sequence, so that slices are not given up for every token
            self._kv = min(self._sizes.kv, kv_bytes + 2 * page)
        sizes = replace(self._sizes, kv=self._kv)
        capacity = self._budget - sizes.dense - sizes.kv
        if self._options.mode == "plain":
            if grown:
                self._tier.replan(None, sizes.staging)
            return 0
        if self._options.split != "auto":
            if grown:
                self._tier.replan(plan_slots(self._budget, sizes, self._options.split), capacity)
            return self._controller.limit(sequences)
        began = perf_counter()
        if self.point is not None and not grown and sequences == self._sequences and began < self._plan_again:
            return self.point.draft_length
        if self._tier.popularity.any():
            self._use = popularity(self._tier.popularity, sizes.top_k)
        old = self.point
        self.point = self.planner.choose(
            self._use, sequences, capacity, sizes.staging, self._draft_seconds, self._compute_seconds
        )
        if grown or old is None or (old.msb, old.lsb) != (self.point.msb, self.point.lsb):
            layers = len(sizes.msb)
            self._tier.replan(SlotPlan((self.point.msb,) * layers, (self.point.lsb,) * layers, 0), capacity)
        self._sequences = sequences
        self._plan_again = perf_counter() + (perf_counter() - began) / PLANNING
        return self.point.draft_length

    def observe_pass(self, tokens: int, seconds: float) -> None:
        """Learn from a target pass: its seconds but for waiting, and what was read since the last that read as much as an
        expert."""
        self.planner.pass_cost.observe(tokens, self._memory_seconds(tokens), seconds)
        read, reading = self._tier.bytes_read - self._read[0], self._tier.reading_seconds - self._read[1]
        if read >= max(self._sizes.msb) + max(self._sizes.lsb):
            self.planner.observe_reads(read, reading)
            self._read = self._tier.bytes_read, self._tier.reading_seconds

    def observe_routing(self, committed: dict[int, int], experts: NDArray[np.int32]) -> None:
        """Learn what drafts of other lengths would read: tokens committed by each sequence, and their (layers, tokens, k)
        experts."""
        if self.point is None:
            return
        counted = self._tier.popularity.sum() / (len(self._sizes.msb) * self._sizes.top_k)
        settled = counted >= SETTLED_TOKENS and self._tier.filled >= SETTLED_SLOTS
        self.planner.reads.observe(committed, experts, self._tier.found, self.planner.modelled if settled else None)

    def observe(self, sequences: int, drafted: int, accepted: int, judged: int, slow_bytes: int, seconds: float) -> None:
        """Learn from a decode step: tokens drafted in all, those accepted of those judged, bytes that were not resident, and
        its seconds."""
        self._unobserved += 1
        if self.point is None or (not drafted and perf_counter() < self._plan_again):
            return
        if drafted:
            self.planner.acceptance.observe(self._covered(), accepted, judged)
        modelled = self._seconds(round(drafted / sequences), sequences + drafted, sequences, slow_bytes)
        steps = 1 if drafted else self._unobserved  # only plain steps go unobserved
        self.planner.observe(drafted > 0, seconds, modelled, steps)
        self._unobserved = 0

    def _covered(self) -> float:
        """Share of the routing that the residents of the operating point cover."""
        return 1.0 if self.point is None else float(self._use[: self.point.msb].sum() / self._use.sum())

    def _draft_seconds(self, sequences: float) -> float:
        """Seconds of a draft step, which does part of a target pass's work."""
        cost = self._controller.draft_cost
        if cost.known:
            return min(cost.seconds(sequences), self._compute_seconds(sequences))
        return self._memory_seconds(sequences, draft=True)

    def _compute_seconds(self, tokens: float) -> float:
        """Seconds of a target pass but for waiting."""
        return self.planner.pass_cost.seconds(tokens, self._memory_seconds(tokens))

    def _memory_seconds(self, tokens: float, draft: bool = False) -> float:
        """Seconds of reading what a pass touches from memory, at an assumed bandwidth."""
        slice_bytes = max(self._sizes.msb) + (0 if draft else max(self._sizes.lsb))
        touched = float((1 - (1 - self._use) ** tokens).sum()) * len(self._sizes.msb)
        return (self._sizes.dense + touched * slice_bytes) / ASSUMED_MEMORY_BANDWIDTH

    def _step_seconds(self, depth: int, tokens: int, sequences: int) -> float:
        """Seconds of a step, for the stop of a draft."""
        return self._seconds(depth, tokens, sequences, self.planner.needed(tokens / sequences - 1))

    def _seconds(self, depth: int, tokens: int, sequences: int, needed: float) -> float:
        """Modelled seconds of a step of so many draft passes, verified tokens and bytes to read."""
        drafting = depth * self._draft_seconds(sequences) if depth else 0.0
        costs = drafting, self._compute_seconds(tokens), needed, self.planner.room
        return float(self.planner.step_seconds(*map(np.array, costs)))
