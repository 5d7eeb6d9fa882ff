"""Facts replayed under policies: which experts each pass uses, what the fast memory holds of them, what is accepted.

Nothing here knows of seconds or joules, so one workload is priced on many machines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.policy.budget import PREFILL_CHUNK, SlotPlan
from elmoe.policy.residency import ResidencyParameters, ResidentSet
from elmoe.systems.passes import Passes
from elmoe.trace.facts import RoutingFacts
from elmoe.trace.residents import ReplayedResidents, best_residents, expert_counts, experts_used

ACCEPTANCE_SEED = 20260414
DraftKind = Literal["none", "external", "natural", "resident"]
"""What drafts: nothing; another network; the target's own experts by their natural routing (a 4-bit copy); or the resident
experts of the target alone (elastic)."""
Acceptance = Callable[[float, int], float]
"""Probability that a draft token is accepted, given that its prefix was: of (resident share of MSB slices, depth from 1)."""


@dataclass(frozen=True)
class TierPlan:
    """Slots of the fast memory for the facts' layers, the residency policy, and bytes of an expert's slices by layer."""

    slots: SlotPlan
    parameters: ResidencyParameters
    msb_bytes: tuple[float, ...]
    lsb_bytes: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """How to serve: ``batch`` sequences in lock-step, ``draft_length`` tokens drafted per step, ``context`` positions in
    every KV cache, ``token_rows`` of a PE, and at most ``steps``. ``siblings``: further candidates that a verification
    computes per draft position, of a tree (none: a chain)."""

    batch: int
    draft: DraftKind = "none"
    draft_length: int = 0
    context: int = 1024
    token_rows: int = 16
    steps: int = 24
    tier: TierPlan | None = None
    siblings: tuple[int, ...] = ()


@dataclass(frozen=True)
class Workload:
    """Passes of a run: one target pass per step, and the draft passes (None without drafts by the target's experts).

    ``committed`` (steps,): tokens kept. ``accepted``, ``judged``: draft tokens over the run. ``draft_passes``: per step.
    """

    target: Passes
    draft: Passes | None
    committed: NDArray[np.int64]
    accepted: int
    judged: int
    draft_passes: int
    resident: float = field(default=0.0)

    @property
    def steps(self) -> int:
        """Decode steps."""
        return len(self.committed)

    @property
    def msb_hit_rate(self) -> float:
        """Share of the target's expert uses whose MSB slice was in the fast memory."""
        return float(self.target.msb_hits.sum() / self.target.active.sum())


class RoutingReplay:
    """Facts prepared for replays: what does not depend on a plan is computed once."""

    def __init__(self, facts: RoutingFacts, seed: int = ACCEPTANCE_SEED) -> None:
        self.facts = facts
        self._layers, self._experts = facts.ranked.shape[2], facts.experts
        self._luck = np.random.Generator(np.random.PCG64(seed)).random(facts.ranked.shape[:2])

    def run(self, plan: Plan, acceptance: Acceptance | None = None) -> Workload:
        """Serve the first ``batch`` sequences from their prompts on, until one of them ends or ``steps`` are done.

        :raises TraceError: the facts hold fewer sequences, or end before the first step.
        """
        facts, batch, length = self.facts, plan.batch, plan.draft_length
        if batch > len(facts.prompts):
            raise TraceError(f"the trace holds {len(facts.prompts)} sequences, the batch is {batch}", "use a smaller batch")
        if plan.draft != "none" and (acceptance is None or length < 1):
            raise TraceError("drafts need an acceptance and a draft length of 1 or more")
        rows = _Rows(plan, self._layers, self._experts)
        tier = None if plan.tier is None else _Tier(plan.tier, self._layers, self._experts)
        if tier is not None:
            self._prefill(tier, batch)
        at, ends = facts.prompts[:batch] - 1, facts.lengths[:batch]
        depths, sequences = np.arange(length + 1), np.arange(batch)
        committed: list[int] = []
        shares: list[float] = []
        accepted_sum = judged = 0
        while len(committed) < plan.steps and (at + length < ends).all():
            positions = at[:, None] + depths
            chosen = facts.chosen[sequences[:, None], positions]
            share = 0.0 if tier is None else float(tier.resident.msb.mean())
            shares.append(share)
            accepted = np.zeros(batch, np.int64)
            if length:
                assert acceptance is not None
                odds = np.array([acceptance(share, depth) for depth in range(1, length + 1)])
                agreed = self._luck[sequences[:, None], positions[:, 1:]] < odds
                accepted = np.cumprod(agreed, axis=1).sum(axis=1)
                judged += int(np.minimum(accepted + 1, length).sum())
                for depth in range(length):
                    if plan.draft == "resident":
                        assert tier is not None
                        tokens = tier.masked(facts.ranked[sequences, positions[:, depth]], facts.top_k)
                        rows.draft(tokens, tier.resident)
                    elif plan.draft == "natural":
                        rows.draft(chosen[:, depth], None if tier is None else tier.resident)
            verified = chosen.reshape(-1, self._layers, facts.top_k)
            if plan.siblings:
                verified = np.concatenate([verified, self._siblings(at, plan.siblings)])
            use = rows.target(verified, tier)
            if tier is not None:
                kept = depths <= accepted[:, None]
                rows.captured(tier.capture(chosen[:, 0], chosen[kept], use))
            else:
                rows.captured(0.0)
            at = at + accepted + 1
            committed.append(int(accepted.sum()) + batch)
            accepted_sum += int(accepted.sum())
        if not committed:
            raise TraceError("the trace ends before the first step", "record or synthesise more positions")
        return Workload(
            rows.passes(rows.targets), rows.passes(rows.drafts) if rows.drafts else None, np.array(committed), accepted_sum,
            judged, length, float(np.mean(shares)),
        )  # fmt: skip

    def _siblings(self, at: NDArray[np.integer], counts: tuple[int, ...]) -> NDArray:
        """(tokens, layers, k) routings of a tree's further candidates. A candidate beside another is another token of the
        same text: it is routed as an earlier position, each as a different one."""
        depths = [depth for depth, count in enumerate(counts, 1) for _ in range(count)]
        back = [number * (len(counts) + 1) for count in counts for number in range(1, count + 1)]
        positions = np.maximum(at[:, None] + np.array(depths) - np.array(back), 0)
        return self.facts.chosen[np.arange(len(at))[:, None], positions].reshape(-1, self._layers, self.facts.top_k)

    def _prefill(self, tier: _Tier, batch: int) -> None:
        """Run the prompts but for their last tokens through the tier, in the engine's least chunks."""
        facts = self.facts
        prompts = [facts.chosen[s, : int(facts.prompts[s]) - 1] for s in range(batch)]
        tokens = np.concatenate(prompts)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            tier.end_pass(chunk, chunk, experts_used(chunk, self._experts))


class _Tier(ReplayedResidents):
    """The fast memory: its residents, and bytes of their slices."""

    def __init__(self, plan: TierPlan, layers: int, experts: int) -> None:
        super().__init__(layers, experts, plan.slots, plan.parameters)
        self._plan = plan

    def capture(self, sure: NDArray, committed: NDArray, used: NDArray[np.bool_]) -> float:
        """End a target pass (see ``end_pass``); the bytes captured from what it read."""
        before = self.resident
        self.end_pass(sure, committed, used)
        new_msb, new_lsb = self.resident.msb & ~before.msb, self.resident.lsb & ~before.lsb
        return float(new_msb.sum(axis=1) @ self._plan.msb_bytes + new_lsb.sum(axis=1) @ self._plan.lsb_bytes)

    def masked(self, ranked: NDArray, top_k: int) -> NDArray:
        """(tokens, layers, k): the best resident experts of a (tokens, layers, ranks) ranking; where the ranking holds fewer
        than k residents, the layer's hottest residents stand in."""
        chosen, missing = best_residents(ranked, self.resident.msb, top_k)
        if missing.any():
            heat = np.where(self.resident.msb, self.hotness, -1.0)
            hottest = np.argsort(-heat, axis=1, kind="stable")[:, :top_k].astype(ranked.dtype)
            chosen = np.where(missing, hottest[None], chosen)
        return chosen


class _Rows:
    """Collects passes row by row."""

    def __init__(self, plan: Plan, layers: int, experts: int) -> None:
        self._plan, self._layers, self._experts = plan, layers, experts
        self.targets: list[dict[str, NDArray | float]] = []
        self.drafts: list[dict[str, NDArray | float]] = []

    def target(self, chosen: NDArray, tier: _Tier | None) -> NDArray[np.bool_]:
        """A target pass of (tokens, layers, k) routings; returns which experts it used, (layers, experts)."""
        return self._add(self.targets, chosen, None if tier is None else tier.resident)

    def draft(self, chosen: NDArray, resident: ResidentSet | None) -> None:
        """A draft pass."""
        self._add(self.drafts, chosen, resident)

    def captured(self, count: float) -> None:
        """Bytes kept from the last target pass."""
        self.targets[-1]["captured"] = count

    def passes(self, rows: list[dict[str, NDArray | float]]) -> Passes:
        """The rows as arrays."""
        return Passes(**{f.name: np.array([row[f.name] for row in rows], np.float64) for f in fields(Passes)})

    def _add(self, rows: list, chosen: NDArray, resident: ResidentSet | None) -> NDArray[np.bool_]:
        counts = expert_counts(chosen, self._experts)
        used = counts > 0
        tokens = len(chosen)
        context = self._plan.context
        zero = np.zeros(self._layers)
        rows.append(
            {
                "tokens": tokens, "attended": tokens * context, "cached": self._plan.batch * context,
                "active": used.sum(axis=1), "pairs": np.full(self._layers, tokens * chosen.shape[2]),
                "blocks": np.ceil(counts / self._plan.token_rows).sum(axis=1),
                "msb_hits": zero if resident is None else (used & resident.msb).sum(axis=1),
                "lsb_hits": zero if resident is None else (used & resident.lsb).sum(axis=1), "captured": 0.0,
            }
        )  # fmt: skip
        return used
