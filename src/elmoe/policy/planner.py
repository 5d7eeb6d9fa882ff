"""The planner: which slices the fast tier keeps, whether to draft, how many tokens, and when to stop a draft.

One object decides, whether the tier is enforced or everything is in memory. In memory nothing is read, so reads cost nothing
and one set of slices is given; the formulas are the same. A plan is the choice of the highest modelled rate: expected tokens
(:mod:`elmoe.policy.acceptance`) per modelled second (:mod:`elmoe.policy.cost`). What the model does not know, steps correct:
bytes by draft length (:mod:`elmoe.policy.read_history`), and seconds by mode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.acceptance import Acceptance
from elmoe.policy.budget import FastTierSizes, SlotPlan, Split, TierShape, plan_slots
from elmoe.policy.cost import MOST_WAITING, Costs
from elmoe.policy.read_history import ReadHistory
from elmoe.policy.residency import ResidentSet

Mode = Literal["plain", "cache", "elastic"]
"""``plain``: nothing is kept, nothing drafted. ``cache``: slices are kept. ``elastic``: slices are kept and draft."""
Values = NDArray[np.float64]
_Step = tuple[int, int, int, float]
"""Tokens drafted, sequences, bytes that were not resident, seconds."""

DRAFT_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
"""Draft lengths to choose from."""
SWITCH_GAIN = 1.04
"""Minimum modelled speed-up to change the slices kept, which costs reads (docs/log.md, 2026-11-28: 1.04 instead of 1.10)."""
DRAFT_GAIN = 1.06
"""Minimum modelled speed-up to start drafting: the model of plain decoding errs less (docs/log.md, 2026-11-27: better than
1.04 and 1.08)."""
CLEAR_GAIN = 1.5
"""Modelled speed-up by drafting from which plain decoding is not measured: the measurement could not change the choice."""
SETTLED = 4
"""Plain steps before drafts start whose modelled speed-up is not clear."""
REMEASURE = 64
"""Steps with drafts between two measurements of plain decoding: at a speed-up of 1.5 they cost 0.5 %."""
TRIAL = 2
"""Tokens of a draft that only measures what drafts cost."""
RETRY, LONGEST_WAIT = 64, 1024
"""Plain steps before a trial of drafts after those that did not pay: the first time, and at most; each time doubles them."""
PROVEN = 16
"""Steps with drafts after which they count as having paid."""
FORGETTING = 0.01
"""Share of a resting mode's correction that fades per step of the other: a trial of it then costs under 2 %."""
CORRECTION_DECAY = 0.9
"""Decay of a mode's measured and modelled seconds per observed step."""
LEAST_CORRECTION, LARGEST_CORRECTION = 0.25, 4.0
"""Bounds of measured over modelled seconds."""
PLANNING = 0.01
"""Share of the time that planning may take. On the demo model it takes a tenth of a step, so not each step plans."""
SETTLED_SLOTS = 0.95
"""Share of slots in use from which a pass's bytes tell of its draft length, and not of slices just changed."""
SETTLED_TOKENS = 50
"""Counted tokens, decayed, from which the popularity of experts tells what a pass reads."""
SPLITS = 6
"""Steps between whole experts and as many MSB slices as fit, among the slices to choose from."""


@dataclass(frozen=True)
class Plan:
    """A step's plan. ``slots``: slices kept per layer, None to keep none. ``draft_length``: most tokens to draft for each
    sequence. ``rate``: modelled tokens per second of what the planner chose; None where it had no choice."""

    slots: SlotPlan | None
    draft_length: int
    rate: float | None

    @property
    def mode(self) -> Mode:
        """What the plan amounts to."""
        return "plain" if self.slots is None else "elastic" if self.draft_length else "cache"


def popularity(counts: NDArray[np.float64], top_k: int) -> Values:
    """(experts,) probability that a token uses a layer's hottest, second hottest ... expert, a mean over the layers of
    (layers, experts) counts."""
    totals = np.maximum(counts.sum(axis=1, keepdims=True), 1e-9)
    ranked: Values = np.minimum(np.sort(counts / totals * top_k, axis=1)[:, ::-1], 1.0).mean(axis=0)
    return ranked


def splits(shape: TierShape, room: int) -> list[SlotPlan]:
    """Slices to choose from in ``room`` bytes: from whole experts to all MSB slices, some with spare room.

    Every layer keeps equally many experts, however large its slices are: each layer's expert at a rank of popularity is used
    as often as another layer's. A layer without LSB slices keeps no bytes for them, so the expert axis is its only one.
    """
    msb_bytes, lsb_bytes = max(1, sum(shape.msb)), sum(shape.lsb)
    whole = min(shape.experts, room // (msb_bytes + lsb_bytes))
    most = min(shape.experts, room // msb_bytes)
    counts = sorted({max(shape.top_k, round(whole + (most - whole) * part / SPLITS)) for part in range(SPLITS + 1)})
    plans = []
    for msb in counts:
        lsb = min(msb, max(0, room - msb * msb_bytes) // lsb_bytes) if lsb_bytes else 0
        for kept in dict.fromkeys((lsb, lsb // 2, 0)):
            each = tuple(kept if slice_bytes else msb for slice_bytes in shape.lsb)  # no bytes: beside every MSB slice
            plans.append(SlotPlan((msb,) * shape.layers, each, msb * msb_bytes + kept * lsb_bytes))
    return plans


def best(rate: Values, lengths: NDArray[np.int64], same: NDArray[np.bool_], drafting: bool) -> tuple[int, int]:
    """Row and column of the best of the (draft lengths, slices) rates, with the gains that a change must promise.

    :param same: which slices are those kept now. :param drafting: whether drafts are under way; who drafts goes on unless
        plain decoding is modelled as faster.
    """
    promise = rate if drafting else np.where(lengths[:, None] > 0, rate / DRAFT_GAIN, rate)
    if same.any():
        promise = np.where(same, promise, promise / SWITCH_GAIN)
    row, column = np.unravel_index(promise.argmax(), promise.shape)
    return int(row), int(column)


class Planner:
    """Plans steps and learns from what came of them. No clock: seconds are handed in.

    Per step: :meth:`standing` and, where that is None, :meth:`plan`; :meth:`proceed` after each draft pass;
    :meth:`observe_draft` or :meth:`observe_target` after each pass; :meth:`observe_judged` for each judged draft token;
    :meth:`observe_step` at the end.
    """

    def __init__(
        self, shape: TierShape, mode: Mode = "elastic", split: Split | Literal["auto"] = "auto",
        draft_length: int | None = None, reads: bool = True,
    ) -> None:  # fmt: skip
        """:param split: how slices share the budget, ``auto`` to choose by rate. :param draft_length: tokens to draft, None
        to choose by rate. :param reads: whether missing slices are read from a slow tier; in memory they cost nothing.
        """
        self.shape, self._mode, self._split, self._has_reads = shape, mode, split, reads
        fixed = draft_length if mode == "elastic" else 0
        self._lengths = np.array(DRAFT_LENGTHS if fixed is None else (fixed,))
        self._chooses_length = fixed is None
        self._chooses = fixed is None or (split == "auto" and mode != "plain")
        self.acceptance, self.costs = Acceptance(), Costs(shape)
        self.reads = ReadHistory(self._lengths.tolist(), shape.msb, shape.lsb)
        self.chosen: Plan | None = None
        """The last choice; trials and measurements deviate from it for a step."""
        self._bytes = np.array([shape.msb, shape.lsb], np.float64)
        self._sizes: FastTierSizes | None = None
        self._candidates: tuple[Sequence[SlotPlan | None], NDArray[np.int64], NDArray[np.int64]]  # (plans, layers) slices
        self._sequences = 0
        self._modelled = self._needed = np.zeros(len(self._lengths))  # bytes of a target pass at the slices chosen
        self._room, self._covered, self._gain = 0, 1.0, 0.0
        self._seconds: dict[bool, tuple[float, float]] = {}  # measured and modelled, by mode, decayed
        self._stale, self._passed, self._due = True, 0.0, 0.0  # seconds since the last choice, and until the next
        self._popular = False  # whether the last choice knew the popularity of experts
        self._settled = 0.0, 0.0  # residents by kind of slice that count as all slots in use
        self._steps: deque[_Step] = deque(maxlen=MOST_WAITING)  # not learned from yet
        self._passes: deque[tuple[int, float]] = deque(maxlen=MOST_WAITING)  # tokens and seconds of passes that read nothing
        self._resting = self._drafting = self._since_plain = 0  # plain steps, steps with drafts; since a plain step
        self._wait, self._tried = SETTLED, False

    @property
    def chooses(self) -> bool:
        """Whether slices or draft lengths are chosen at all."""
        return self._chooses

    def begin_run(self) -> None:
        """Sequences of this run do not continue those before, and slots are new where slices have to be read."""
        self.reads.end_run()
        self._stale = self._stale or self._has_reads

    def plan(self, sequences: int, sizes: FastTierSizes, budget: int, counts: NDArray[np.float64]) -> Plan:
        """The plan of the next step.

        :param sizes: what competes for the ``budget`` bytes of the fast tier at present. :param counts: (layers, experts)
            uses of experts, decayed; all zero where none are known.
        :raises BudgetError: a given split does not fit the budget.
        """
        standing = self.standing(sequences, sizes)
        if standing is None:
            self._choose(sequences, sizes, budget, counts)
            standing = self._deviation()
        return standing

    def standing(self, sequences: int, sizes: FastTierSizes) -> Plan | None:
        """The plan of the next step where the last choice stands, None where :meth:`plan` would choose. Hot: a
        small model in memory takes 0.2 ms a step."""
        if self._stale or sizes is not self._sizes or sequences != self._sequences or self._choice_due():
            return None
        chosen = self.chosen
        if chosen is not None and chosen.draft_length == 0 and self._resting < self._wait:
            return chosen
        return self._deviation()

    def _deviation(self) -> Plan:
        """The last choice, or a trial or a measurement instead."""
        chosen = self.chosen
        assert chosen is not None
        if not self._chooses_length:
            return chosen
        length = chosen.draft_length
        if length == 0:
            length = TRIAL if self._resting >= self._wait else 0
        elif self._gain < CLEAR_GAIN and (self._since_plain >= REMEASURE if self._drafting else self._resting < SETTLED):
            length = 0
        elif not self.costs.draft_known:
            length = min(TRIAL, length)
        return chosen if length == chosen.draft_length else replace(chosen, draft_length=length)

    def _choice_due(self) -> bool:
        """Whether enough time has passed since the last choice, and there is a choice: of slices, or of drafts that are
        under way. A small model in memory rests for long, where a choice takes a tenth of a step."""
        return self._passed >= self._due and (self._drafting > 0 or self._has_reads or len(self._candidates[0]) > 1)

    def observe_planning(self, seconds: float) -> None:
        """Take note of the seconds that a choice took; the next one waits until they are a small share of the time."""
        self._due = seconds / PLANNING if self._chooses else np.inf

    def _choose(self, sequences: int, sizes: FastTierSizes, budget: int, counts: NDArray[np.float64]) -> None:
        """Choose the slices and the draft length of the highest modelled rate."""
        if sizes is not self._sizes:
            self._consider(sizes, budget)
        self._sequences, self._stale, self._passed = sequences, False, 0.0
        plans, msb, lsb = self._candidates
        shape, lengths, costs = self.shape, self._lengths, self.costs
        if not self._chooses:
            self.chosen = Plan(plans[0], int(lengths[0]), None)
            return
        for count, seconds in self._passes:
            costs.observe_target(count, seconds)
        self._passes.clear()
        costs.fold()
        self._learn_steps()
        if counts.any():
            costs.use = popularity(counts, shape.top_k)
        tokens = sequences * (1 + lengths)
        needed = modelled = np.zeros((len(lengths), len(plans)))
        if self._has_reads:
            beyond = np.zeros((len(lengths), shape.experts + 1))  # experts touched from a rank of popularity on
            beyond[:, :-1] = np.cumsum((1 - (1 - costs.use) ** tokens[:, None])[:, ::-1], axis=1)[:, ::-1]
            modelled = beyond[:, msb] @ self._bytes[0] + beyond[:, lsb] @ self._bytes[1]
            needed = self.reads.ratios[:, None] * modelled
        covered = np.append(0.0, np.cumsum(costs.use)) / max(1e-9, float(costs.use.sum()))
        shares = (covered[msb].sum(axis=1) / max(1, shape.layers)).tolist()
        acceptance = np.array([self.acceptance.expected(share) for share in shares])
        length = lengths[:, None]
        committed = sequences * (1 - acceptance ** (length + 1)) / (1 - acceptance)
        drafting = length * costs.draft_seconds(sequences)
        room = budget - sizes.dense - sizes.kv - (msb @ self._bytes[0] + lsb @ self._bytes[1])
        correction = np.where(length > 0, self.correction(True), self.correction(False))
        rate = committed / (correction * costs.step_seconds(drafting, costs.target_seconds(tokens)[:, None], needed, room))
        old = self.chosen
        same = np.array([old is not None and plan is not None and _alike(plan, old.slots) for plan in plans])
        row, column = best(rate, lengths, same, self._drafting > 0)
        self._gain = float(rate[lengths > 0].max(initial=0.0) / rate[lengths == 0].max(initial=1e-30))
        self._modelled, self._needed = modelled[:, column], needed[:, column]
        self._room, self._covered = int(room[column]), shares[column]
        self._popular = counts.sum() >= SETTLED_TOKENS * max(1, shape.layers * shape.top_k)
        self._settled = SETTLED_SLOTS * msb[column].sum(), SETTLED_SLOTS * lsb[column] @ (self._bytes[1] > 0)
        self.chosen = Plan(plans[column], int(lengths[row]), float(rate[row, column]))
        self._judge_drafts()

    def _judge_drafts(self) -> None:
        """After a choice: where drafts or a trial of them were given up, wait with the next trial."""
        if self.chosen is not None and self.chosen.draft_length == 0 and (self._drafting or self._tried):
            longer = min(max(RETRY, 2 * self._wait), LONGEST_WAIT)
            self._wait = RETRY if self._drafting >= PROVEN else longer
            self._drafting = self._resting = 0
        self._tried = False

    def _consider(self, sizes: FastTierSizes, budget: int) -> None:
        """Collect the slices to choose from."""
        plans: Sequence[SlotPlan | None] = [None]
        if self._mode != "plain":
            split, room = self._split, budget - sizes.fixed
            plans = splits(self.shape, room) if split == "auto" else [plan_slots(budget, sizes, split)]
        none = SlotPlan((0,) * self.shape.layers, (0,) * self.shape.layers, 0)
        msb, lsb = (np.array([getattr(plan or none, kind) for plan in plans], np.int64) for kind in ("msb", "lsb"))
        self._sizes, self._candidates = sizes, (plans, msb, lsb)

    def proceed(self, confidences: Sequence[Sequence[float]], plan: Plan) -> list[bool]:
        """For each sequence of the draft batch, whether to draft one more token after those of these confidences.

        A draft goes on while some number of further tokens pays at least the rate of the step so far: ``reach * expected
        tokens of those further / their seconds > expected tokens / seconds``. One token alone would often not pay where the
        next ones would: verification gets cheaper by the token, because tokens share experts.
        """
        limit, trial = plan.draft_length, self.chosen is not None and self.chosen.draft_length == 0
        if not self._chooses_length or not self.costs.draft_known or trial:
            return [len(row) < limit for row in confidences]
        depth = max((len(row) for row in confidences), default=0)
        if depth >= limit:
            return [False] * len(confidences)
        sequences, drafted = len(confidences), sum(len(row) for row in confidences)
        tokens, reaches = float(sequences), []
        for row in confidences:
            reach = 1.0
            for confidence in row:
                reach *= self.acceptance.of(confidence)
                tokens += reach
            reaches.append(reach)
        further = np.arange(limit - depth + 1)
        seconds = self._step_seconds(depth + further, sequences * (1 + further) + drafted, sequences)
        gained = sequences * np.cumsum(self.acceptance.expected(self._covered) ** further[1:])
        spent = float(seconds[0])
        worth = float((gained / np.maximum(seconds[1:] - spent, 1e-9)).max())
        return [reach * worth * spent > tokens for reach in reaches]

    def observe_draft(self, sequences: int, seconds: float) -> None:
        """Learn from a draft pass."""
        self.costs.observe_draft(sequences, seconds)
        self._passed += seconds

    def observe_target(self, tokens: int, seconds: float, waited: float) -> None:
        """Learn from a target pass: its seconds, and of these, those that waited for reads."""
        self.costs.observe_target(tokens, seconds - waited)
        self._passed += seconds

    def observe_routing(self, committed: dict[int, int], experts: NDArray[np.int32], found: ResidentSet) -> None:
        """Learn what drafts of other lengths would read, once slots and popularity have settled.

        :param committed: tokens that each sequence committed. :param experts: their (layers, tokens, k) experts.
        :param found: what the pass found resident; not changed afterwards.
        """
        if self._has_reads and self._chooses:
            self.reads.observe(committed, experts, found, self._modelled if self._popular else None, self._settled)

    def observe_judged(self, confidence: float, accepted: bool) -> None:
        """Learn from a judged draft token, one whose prefix was accepted."""
        self.acceptance.observe(confidence, accepted, self._covered)

    def observe_step(self, sequences: int, drafted: int, slow_bytes: int, seconds: float) -> None:
        """Learn from a whole decode step: tokens drafted in all, expert bytes of its target pass that were not resident, and
        its seconds. Cheap: the next choice learns from all steps before it."""
        if self.chosen is not None and self._chooses:
            self._count(drafted > 0, self.chosen)
            self._steps.append((drafted, sequences, slow_bytes, seconds))

    def observe_plain_step(self, sequences: int, compute: float, seconds: float) -> None:
        """Learn from a step of plain decoding that read nothing; instead of ``observe_target`` and ``observe_step``.

        As cheap as can be: drafts rest in most steps of a small model. :param compute: seconds of its target pass.
        """
        if self._chooses:
            self._passed += compute
            self._resting, self._since_plain = self._resting + 1, 0
            self._passes.append((sequences, compute))
            self._steps.append((0, sequences, 0, seconds))

    def _learn_steps(self) -> None:
        """Correct the modes by the steps since the last choice. Plain ones in a row count by their mean: the step that ends
        the wait for a choice is longer than most."""
        if not self._steps:
            return
        number, sequences, slow, seconds = np.array(self._steps).T
        modelled = self._step_seconds(np.rint(number / sequences), sequences + number, sequences, slow)
        start = 0
        for end in range(1, len(number) + 1):
            if end < len(number) and number[start] == 0 == number[end] and sequences[start] == sequences[end]:
                continue
            row = slice(start, end)
            self.correct(bool(number[start]), float(seconds[row].mean()), float(modelled[row].mean()), end - start)
            start = end
        self._steps.clear()

    def _count(self, drafted: bool, chosen: Plan) -> None:
        """Count steps for trials and measurements."""
        if not drafted:
            self._resting, self._since_plain = self._resting + 1, 0
        elif chosen.draft_length > 0:
            self._drafting, self._since_plain = self._drafting + 1, self._since_plain + 1
        else:  # a trial: what it measured may change the choice
            self._stale = self._tried = True

    def correction(self, drafts: bool) -> float:
        """Measured over modelled seconds of a mode; until it ran, what is believed of it."""
        if drafts not in self._seconds:
            return self._believed(drafts) if self._seconds else 1.0
        measured, modelled = self._seconds[drafts]
        return min(LARGEST_CORRECTION, max(LEAST_CORRECTION, measured / modelled))

    def _believed(self, drafts: bool) -> float:
        """A mode's correction as the other's tells it. In doubt for plain decoding: what slows drafts down, such as another
        load of the machine, need not slow it down."""
        other = self.correction(not drafts)
        return other if drafts else min(1.0, other)

    def correct(self, drafted: bool, seconds: float, modelled: float, steps: int = 1) -> None:
        """Correct the model of a mode by a step's measured and modelled seconds.

        :param steps: of this mode since the last one observed: what the other learned fades by them, so that one bad step
            does not rule it out for good.
        """
        if drafted not in self._seconds:
            seconds = self.correction(drafted) * modelled  # the first sets things up
        old, idle = self._seconds.get(drafted, (0.0, 0.0)), self._seconds.get(not drafted)
        self._seconds[drafted] = CORRECTION_DECAY * old[0] + seconds, CORRECTION_DECAY * old[1] + modelled
        if idle is not None:
            share = 1 - (1 - FORGETTING) ** steps
            believed = self._believed(not drafted) * idle[1]
            self._seconds[not drafted] = idle[0] + share * (believed - idle[0]), idle[1]

    def _step_seconds(self, depth: Any, tokens: Any, sequences: Any, needed: Any = None) -> Values:
        """Modelled seconds of steps of so many draft passes and verified tokens. ``needed``: bytes to read, by default what
        recent routing tells."""
        needed_bytes = np.interp(tokens / sequences - 1, self._lengths, self._needed) if needed is None else needed
        drafting = depth * self.costs.draft_seconds(sequences)
        return self.costs.step_seconds(drafting, self.costs.target_seconds(tokens), needed_bytes, self._room)


def _alike(one: SlotPlan, other: SlotPlan | None) -> bool:
    """Whether two plans keep the same slices."""
    return other is not None and (one.msb, one.lsb) == (other.msb, other.lsb)
