"""Facts replayed under policies: which experts each pass uses, what the fast memory holds of them, what is accepted.

Nothing here knows of seconds or joules, so one workload is priced on many machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.policy.budget import PREFILL_CHUNK, SlotPlan
from elmoe.policy.planner import popularity
from elmoe.policy.residency import Residency, ResidencyParameters, ResidentSet
from elmoe.sim.trees import Tree, TreeShape, accepted_depth, tree_of
from elmoe.systems.passes import Passes
from elmoe.trace.facts import RoutingFacts, check_sequences
from elmoe.trace.residents import ReplayedResidents, best_residents, expert_counts, experts_used

ACCEPTANCE_SEED = 20260414
DraftKind = Literal["none", "external", "natural", "resident"]
"""What drafts: nothing; another network; the target's own experts by their natural routing (a 4-bit copy); or the resident
experts of the target alone (elastic)."""
Acceptance = Callable[[float, int], float]
"""Probability that a draft token is accepted, given that its prefix was: of (resident share of MSB slices, depth from 1)."""


@dataclass(frozen=True)
class TierPlan:
    """Slots of the fast memory for the facts' layers, the residency policy, and bytes of an expert's slices by layer.
    ``room``: bytes of the fast memory beside the residents, for slices on their way."""

    slots: SlotPlan
    parameters: ResidencyParameters
    msb_bytes: tuple[float, ...]
    lsb_bytes: tuple[float, ...]
    room: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Plan:
    """How to serve: ``batch`` sequences in lock-step, ``draft_length`` tokens drafted per step, ``context`` positions in
    every KV cache, ``token_rows`` of a PE, and at most ``steps``. ``tree``: drafts are trees of that shape, as deep as the
    draft length. ``siblings``: further candidates of another network's tree that a verification computes, by depth."""

    batch: int
    draft: DraftKind = "none"
    draft_length: int = 0
    context: int = 1024
    token_rows: int = 16
    steps: int = 24
    tier: TierPlan | None = None
    tree: TreeShape | None = None
    siblings: tuple[int, ...] = ()


@dataclass(frozen=True)
class Workload:
    """Passes of a run: one target pass per step, and the draft passes (None without drafts by the target's experts).

    ``committed`` (steps,): tokens kept. ``accepted``, ``judged``: draft tokens over the run. ``draft_passes``: per step.
    ``drafting``: share of the steps that drafted, where a planner decided; ``draft_passes`` is then their mean.
    """

    target: Passes
    draft: Passes | None
    committed: NDArray[np.int64]
    accepted: int
    judged: int
    draft_passes: int
    resident: float = field(default=0.0)
    drafting: float | None = None

    @property
    def steps(self) -> int:
        """Decode steps."""
        return len(self.committed)

    @property
    def msb_hit_rate(self) -> float:
        """Share of the target's expert uses whose MSB slice was in the fast memory."""
        return float(self.target.msb_hits.sum() / self.target.active.sum())


class RoutingReplay:
    """Facts prepared for replays: what does not depend on a plan is computed once. ``prices``: what was priced on them."""

    def __init__(self, facts: RoutingFacts, seed: int = ACCEPTANCE_SEED) -> None:
        self.facts = facts
        self.layers, self.experts = facts.ranked.shape[2], facts.experts
        self.luck = np.random.Generator(np.random.PCG64(seed)).random(facts.ranked.shape[:2])
        self.prices: dict[Any, Any] = {}
        self._workloads: dict[tuple[Plan, Acceptance | None], Workload] = {}
        self._counts: dict[int, NDArray[np.float64]] = {}

    def run(self, plan: Plan, acceptance: Acceptance | None = None) -> Workload:
        """Serve the first ``batch`` sequences from their prompts on, until one of them ends or ``steps`` are done.

        :raises TraceError: the facts hold fewer sequences, or end before the first step.
        """
        serving = Serving(self, plan, acceptance)
        while serving.steps < plan.steps and serving.has_room(plan.draft_length):
            serving.begin(plan.draft_length)
            serving.draft_all()
            serving.verify(plan.draft_length)
        return serving.workload()

    def kept(self, plan: Plan, acceptance: Acceptance | None = None) -> Workload:
        """As :meth:`run`; what was run once is kept."""
        key = plan, acceptance
        if key not in self._workloads:
            self._workloads[key] = self.run(plan, acceptance)
        return self._workloads[key]

    def check_batch(self, batch: int) -> None:
        """TraceError if the facts hold fewer sequences."""
        check_sequences(len(self.facts.prompts), batch)

    def longest_draft(self, batch: int) -> int:
        """Tokens that the first step of ``batch`` sequences can draft before the facts of one of them end."""
        return int((self.facts.lengths[:batch] - self.facts.prompts[:batch]).min())

    def popularity(self, batch: int) -> NDArray[np.float64]:
        """(experts,) how probably a token uses a layer's hottest, second hottest ... expert, as the engine knows it when the
        prompts of ``batch`` sequences are computed (``policy.planner.popularity``)."""
        return popularity(self.prompt_counts(batch), self.facts.top_k)

    def prompt_counts(self, batch: int) -> NDArray[np.float64]:
        """(layers, experts) uses in the prompts of ``batch`` sequences, decayed as the engine decays them."""
        if batch not in self._counts:
            residency = Residency(self.layers, self.experts, ResidencyParameters())
            for chunk in self.prompt_chunks(batch):
                residency.learn(chunk.transpose(1, 0, 2).astype(np.int32))
            self._counts[batch] = residency.popularity
        return self._counts[batch]

    def prompt_chunks(self, batch: int) -> Iterator[NDArray]:
        """(tokens, layers, k) routings of the prompts but for their last tokens, in the engine's least chunks."""
        facts = self.facts
        prompts = [facts.chosen[s, : int(facts.prompts[s]) - 1] for s in range(batch)]
        tokens = np.concatenate(prompts)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            yield tokens[start : start + PREFILL_CHUNK]


class Serving:
    """A run step by step: :meth:`begin`, :meth:`draft` for each depth from 0 on, :meth:`verify`.

    ``share``: of MSB slices resident when the step began. ``start``: positions behind the prompts at which to begin.
    """

    def __init__(self, replay: RoutingReplay, plan: Plan, acceptance: Acceptance | None, start: int = 0) -> None:
        facts, batch = replay.facts, plan.batch
        replay.check_batch(batch)
        if plan.draft != "none" and (acceptance is None or plan.draft_length < 1):
            raise TraceError("drafts need an acceptance and a draft length of 1 or more")
        self._replay, self._plan, self._acceptance, self._facts = replay, plan, acceptance, facts
        self.rows = _Rows(plan, replay.layers, replay.experts)
        self.tier = None if plan.tier is None else _Tier(plan.tier, replay.layers, replay.experts)
        if self.tier is not None:
            for chunk in replay.prompt_chunks(batch):
                self.tier.end_pass(chunk, chunk, experts_used(chunk, replay.experts))
        self._at, self._ends = facts.prompts[:batch] - 1 + start, facts.lengths[:batch]
        self._sequences = np.arange(batch)
        self._tree: Tree | None = None
        self._named = np.zeros((replay.layers, replay.experts), bool)
        self._committed: list[int] = []
        self._shares: list[float] = []
        self.accepted = self.judged = 0
        self.share = 0.0

    @property
    def steps(self) -> int:
        """Decode steps done."""
        return len(self._committed)

    def has_room(self, length: int) -> bool:
        """Whether the facts reach to the end of a step that drafts so many tokens."""
        return bool((self._at + length < self._ends).all())

    def begin(self, length: int) -> None:
        """A step begins that drafts at most so many tokens of each sequence, or so deep a tree."""
        tier, tree = self.tier, self._plan.tree
        self.share = 0.0 if tier is None else float(tier.resident.msb.mean())
        self._shares.append(self.share)
        self._positions = self._at[:, None] + np.arange(length + 1)
        self._chosen = self._facts.chosen[self._sequences[:, None], self._positions]
        self._named[:] = False
        if length:
            assert self._acceptance is not None
            self._odds = np.array([self._acceptance(self.share, depth) for depth in range(1, length + 1)])
            if tree is not None and self._tree is None:
                self._tree = tree_of(tree, tuple(self._odds.tolist()))

    def draft(self, depth: int) -> None:
        """A draft pass over the tokens at a depth from 0 on, one of each sequence or as many as the tree expands."""
        tier, facts = self.tier, self._facts
        positions, sequences = self._positions[:, depth], self._sequences
        if self._tree is not None:
            positions, sequences = self._with_stand_ins(positions, self._tree.expanded, depth)
        if self._plan.draft == "resident":
            assert tier is not None
            ranked = facts.ranked[sequences, positions]
            self._named |= experts_used(ranked[..., : facts.top_k], facts.experts)
            self.rows.draft(tier.masked(ranked, facts.top_k), tier.resident)

    def draft_all(self) -> None:
        """All draft passes of the step; those of chains at once."""
        depths = range(self._plan.draft_length)
        if self._tree is not None:
            for depth in depths:
                self.draft(depth)
            return
        resident = None if self.tier is None else self.tier.resident
        if self._plan.draft == "resident":
            assert self.tier is not None and resident is not None
            ranked = self._facts.ranked[self._sequences[:, None], self._positions[:, :-1]]
            flat = ranked.reshape(-1, *ranked.shape[2:])
            self._named |= experts_used(flat[..., : self._facts.top_k], self._facts.experts)
            chosen = self.tier.masked(flat, self._facts.top_k)
            chosen = chosen.reshape(*ranked.shape[:2], *chosen.shape[1:])
        elif self._plan.draft == "natural":
            chosen = self._chosen[:, :-1]
        else:
            return
        self.rows.draft_chain(chosen.swapaxes(0, 1), resident)

    def _with_stand_ins(self, positions: NDArray, counts: tuple[int, ...], depth: int) -> tuple[NDArray, NDArray]:
        """Positions and sequences of the tokens of a tree at a depth: that of the text itself, and for each further one a
        later position of the same sequence, whose routing stands for that of a token nobody wrote."""
        first = sum(count - 1 for count in counts[:depth])
        further = np.arange(first, first + counts[depth] - 1)
        begins = self._facts.prompts[self._sequences] - 1
        span = self._ends - begins
        behind = self._positions[:, -1] + 1 - begins
        stand_ins = begins[:, None] + (behind[:, None] + further) % span[:, None]
        found = np.concatenate([positions[:, None], stand_ins], axis=1)
        return found.ravel(), np.repeat(self._sequences, found.shape[1])

    def verify(self, length: int) -> tuple[NDArray[np.int64], NDArray, ResidentSet | None]:
        """The target pass over all that was drafted; (accepted tokens of each sequence, (tokens, layers, k) routing of those
        that stay, residents that the pass found)."""
        facts, tier = self._facts, self.tier
        batch = len(self._sequences)
        accepted = np.zeros(batch, np.int64)
        chosen = self._chosen[:, : length + 1]
        if length:
            luck = self._replay.luck[self._sequences[:, None], self._positions[:, 1 : length + 1]]
            if self._tree is None:
                accepted = np.cumprod(luck < self._odds[:length], axis=1).sum(axis=1)
            else:
                odds = tuple(self._odds.tolist())
                accepted = np.array([accepted_depth(self._tree, odds, row) for row in luck.tolist()])
            self.judged += int(np.minimum(accepted + 1, length).sum())
        verified = chosen.reshape(-1, self._replay.layers, facts.top_k)
        levels = tuple(1 + count for count in self._plan.siblings) if self._tree is None else self._tree.levels
        if levels:
            extra = [self._with_stand_ins(self._positions[:, depth + 1], levels, depth) for depth in range(length)]
            others = [
                facts.chosen[row.reshape(batch, -1)[:, 1:].ravel(), at.reshape(batch, -1)[:, 1:].ravel()]
                for at, row in extra
            ]
            verified = np.concatenate([verified, *others])
        found = None if tier is None else tier.resident
        use = self.rows.target(verified, tier, self._named)
        kept = chosen[np.arange(length + 1) <= accepted[:, None]]
        self.rows.captured(0.0 if tier is None else tier.capture(chosen[:, 0], kept, use))
        self._at = self._at + accepted + 1
        self._committed.append(int(accepted.sum()) + batch)
        self.accepted += int(accepted.sum())
        return accepted, kept, found

    def workload(self) -> Workload:
        """What was served. TraceError if that is nothing."""
        if not self._committed:
            raise TraceError("the trace ends before the first step", "record or synthesise more positions")
        rows = self.rows
        return Workload(
            rows.passes(rows.targets), rows.passes(rows.drafts) if rows.drafts else None, np.array(self._committed),
            self.accepted, self.judged, self._plan.draft_length, float(np.mean(self._shares)),
        )  # fmt: skip


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
        present = self.resident.msb[np.arange(ranked.shape[1])[:, None], ranked]
        taken = present & (present.cumsum(axis=2, dtype=np.int32) <= top_k)
        if taken.sum() == taken.shape[0] * taken.shape[1] * top_k:  # none has too few
            return ranked[taken].reshape(*ranked.shape[:2], top_k)
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

    def target(self, chosen: NDArray, tier: _Tier | None, named: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """A target pass of (tokens, layers, k) routings; returns which experts it used, (layers, experts).

        :param named: (layers, experts) to which the step's drafts were routed.
        """
        resident = None if tier is None else tier.resident
        used = self._add(self.targets, chosen, resident)
        if resident is not None and named.any():
            foreseen = used & named
            self.targets[-1]["msb_foreseen"] = (foreseen & ~resident.msb).sum(axis=1)
            self.targets[-1]["lsb_foreseen"] = (foreseen & ~resident.lsb).sum(axis=1)
        return used

    def draft(self, chosen: NDArray, resident: ResidentSet | None) -> None:
        """A draft pass."""
        self._add(self.drafts, chosen, resident)

    def draft_chain(self, chosen: NDArray, resident: ResidentSet | None) -> None:
        """Draft passes of (passes, tokens, layers, k) routings."""
        passes, tokens, layers, top_k = chosen.shape
        first = np.arange(passes)[:, None, None, None] * layers + np.arange(layers)[:, None]
        flat = chosen.astype(np.int64) + first * self._experts
        counts = np.bincount(flat.ravel(), minlength=passes * layers * self._experts).reshape(passes, layers, self._experts)
        used, zero = counts > 0, np.zeros((passes, layers))
        active, blocks = used.sum(axis=2), np.ceil(counts / self._plan.token_rows).sum(axis=2)
        msb, lsb = zero, zero
        if resident is not None:
            msb, lsb = (used & resident.msb).sum(axis=2), (used & resident.lsb).sum(axis=2)
        self.drafts += [self._row(tokens, top_k, active[i], blocks[i], msb[i], lsb[i]) for i in range(passes)]

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
        zero = np.zeros(self._layers)
        rows.append(
            self._row(
                tokens, chosen.shape[2], used.sum(axis=1), np.ceil(counts / self._plan.token_rows).sum(axis=1),
                zero if resident is None else (used & resident.msb).sum(axis=1),
                zero if resident is None else (used & resident.lsb).sum(axis=1),
            )
        )  # fmt: skip
        return used

    def _row(
        self, tokens: int, top_k: int, active: NDArray, blocks: NDArray, msb_hits: NDArray, lsb_hits: NDArray
    ) -> dict[str, NDArray | float]:
        context, zero = self._plan.context, np.zeros(self._layers)
        return {
            "tokens": tokens, "attended": tokens * context, "cached": self._plan.batch * context, "active": active,
            "pairs": np.full(self._layers, tokens * top_k), "blocks": blocks, "msb_hits": msb_hits, "lsb_hits": lsb_hits,
            "captured": 0.0, "sequences": self._plan.batch, "msb_foreseen": zero, "lsb_foreseen": zero,
        }  # fmt: skip
