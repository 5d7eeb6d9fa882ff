"""Where to run an enforced fast tier: how many MSB and LSB slices to keep, and how far to draft, by modelled tokens/s.

The model knows the popularity of experts (decayed hotness), the slices' bytes, measured costs of compute and the slow tier's
bandwidth, and an acceptance curve; ratios of measured to modelled bytes, by draft length, and seconds, by mode, correct the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import FastTierSizes
from elmoe.policy.pass_cost import PassCost
from elmoe.policy.read_history import ReadHistory

DRAFT_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
SWITCH_GAIN = 1.04
"""Other slices must promise this much more: changing them costs reads."""
DRAFT_GAIN = 1.06
"""Where it is not drafted, drafting must promise this much more than plain decoding, whose model errs less."""
ASSUMED_BANDWIDTH = 1e9
"""Of the slow tier, bytes per second, until it was measured."""
EXPOSED = 0.5
"""Share of the shorter of compute and reading that a target pass does not hide behind the longer (measured: 0.2 to 0.8)."""
FORGETTING = 0.01
"""Per step that a mode does not run: rarely enough tried again to cost under 2 %."""
MEMORY = 0.9
"""What one observation leaves of the older ones in the corrections."""


@dataclass(frozen=True)
class OperatingPoint:
    """Slices kept per layer and tokens drafted per step (0: plain decoding); ``rate``: modelled tokens/s."""

    msb: int
    lsb: int
    draft_length: int
    rate: float


@dataclass(frozen=True)
class TierShape:
    """The routed experts of a model: ``layers`` with ``experts`` each, of which a token uses ``top_k``; bytes of a slice."""

    layers: int
    experts: int
    top_k: int
    msb: int
    lsb: int

    @classmethod
    def of(cls, sizes: FastTierSizes) -> TierShape:
        """The shape behind a budget's sizes; layers of different sizes count as the largest."""
        return cls(len(sizes.msb), sizes.experts, sizes.top_k, max(sizes.msb), max(sizes.lsb))


@dataclass
class AcceptanceCurve:
    """Acceptance of a draft token when residents cover the share c of the natural routing: ``top - spread (1 - c)``.

    The shape and the defaults were fitted on the demo model at temperature 0.8 (25, 50 and 100 % of experts resident,
    prompts of the paper's four kinds); what is observed scales the rejection rate, whatever the model.
    """

    top: float = 0.95
    spread: float = 0.6
    scale: float = 1.0

    def __call__(self, covered: float) -> float:
        """Probability that a draft token is accepted, given that its prefix was."""
        return min(0.995, max(0.02, 1 - self.scale * self._rejection(covered)))

    def observe(self, covered: float, accepted: int, judged: int) -> None:
        """Learn from one verification."""
        if judged:
            weight = 1 - MEMORY ** (judged / 32)
            ratio = (1 - accepted / judged) / self._rejection(covered)
            self.scale = min(20.0, max(0.1, (1 - weight) * self.scale + weight * ratio))

    def _rejection(self, covered: float) -> float:
        return 1 - self.top + self.spread * (1 - covered)


def popularity(hotness: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """(experts,) probability that a token uses a layer's hottest, second hottest ... expert, a mean over layers."""
    totals = np.maximum(hotness.sum(axis=1, keepdims=True), 1e-9)
    ranked: NDArray[np.float64] = np.minimum(np.sort(hotness / totals * top_k, axis=1)[:, ::-1], 1.0).mean(axis=0)
    return ranked


Seconds = Callable[[float], float]
"""Seconds of a pass of so many tokens."""
Values = NDArray[np.float64]


class Planner:
    """Chooses operating points and learns from what came of them. Costs are handed in as functions of tokens, seconds."""

    def __init__(self, shape: TierShape, lengths: Sequence[int] = DRAFT_LENGTHS) -> None:
        """:param lengths: draft lengths to choose from, ascending."""
        self.shape, self.lengths = shape, lengths
        self.acceptance = AcceptanceCurve()
        self.reads = ReadHistory(lengths, shape.msb, shape.lsb)
        self.modelled = self._needed = np.zeros(len(lengths))
        """(lengths,) bytes of a target pass at the point chosen, tokens taken as independent."""
        self.room = 0
        """Bytes beside the residents of the point chosen."""
        self.pass_cost = PassCost()
        self._read_cost = PassCost()
        self._read = 0.0, 0.0  # bytes and seconds, decayed
        self._seconds: dict[bool, tuple[float, float]] = {}  # measured and modelled, by mode, decayed
        self.point: OperatingPoint | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second that reads got of late, assumed until some were."""
        read, seconds = self._read
        return read / seconds if seconds else ASSUMED_BANDWIDTH

    def reading_seconds(self, slow_bytes: Values) -> Values:
        """Seconds in which a pass that reads so many bytes has a read in flight: few bytes pay more for each, because the
        layers wait one after the other."""
        seconds: Values = self._read_cost.seconds(self._stalls(slow_bytes), slow_bytes / ASSUMED_BANDWIDTH)
        return seconds

    def _stalls(self, slow_bytes: Values) -> Values:
        """How many layers miss an expert, as many as are missed being spread at random."""
        layers: Values = self.shape.layers * -np.expm1(-slow_bytes / (self.shape.layers * (self.shape.msb + self.shape.lsb)))
        return layers

    def correction(self, drafts: bool) -> float:
        """Measured over modelled seconds of a mode, 1 until it ran."""
        measured, modelled = self._seconds.get(drafts, (1.0, 1.0))
        return min(4.0, max(0.25, measured / modelled))

    def needed(self, draft_length: float) -> float:
        """Bytes that a step's target pass reads at the point chosen, as recent routing tells."""
        return float(np.interp(draft_length, self.lengths, self._needed))

    def step_seconds(self, drafting: Values, compute: Values, needed: Values, room: Values) -> Values:
        """Modelled seconds of steps but for their mode's correction: from seconds of their drafts and of the target's
        kernels, bytes they read, and bytes of room beside the residents.

        Drafting reads ahead as much as there is room for. A target pass hides its reads behind compute only within a layer,
        hence the share of the shorter that is added to the longer.
        """
        reading = self.reading_seconds(needed)
        ahead = np.minimum(np.minimum(1, np.maximum(room, 0) / np.maximum(needed, 1)) * reading, drafting)
        rest = reading - ahead
        seconds: Values = drafting + np.maximum(compute, rest) + EXPOSED * np.minimum(compute, rest)
        return seconds

    def choose(
        self, use: NDArray[np.float64], sequences: int, capacity: int, staging: int, draft: Seconds, target: Seconds
    ) -> OperatingPoint:
        """The point of the highest modelled rate.

        :param use: see :func:`popularity`. :param capacity: bytes for slices, of which ``staging`` are not for residents.
        """
        shape, lengths = self.shape, self.lengths
        msb, lsb = np.array(self._splits(capacity - staging)).T  # columns; draft lengths are rows
        length = np.array(lengths)[:, None]
        touched = 1 - (1 - use) ** (sequences * (1 + length))
        beyond = np.pad(np.cumsum(touched[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))  # of the experts from a rank on
        modelled = shape.layers * (beyond[:, msb] * shape.msb + beyond[:, lsb] * shape.lsb)
        needed = self.reads.ratios[:, None] * modelled
        covered = np.concatenate(([0.0], np.cumsum(use))) / use.sum()
        acceptance = np.array([self.acceptance(share) for share in covered[msb].tolist()])
        tokens = sequences * (1 - acceptance ** (length + 1)) / (1 - acceptance)
        drafting = length * (draft(sequences) if any(lengths) else 0.0)
        compute = np.array([[target(sequences * (1 + n))] for n in lengths])
        room = capacity - shape.layers * (msb * shape.msb + lsb * shape.lsb)
        correction = np.where(length > 0, self.correction(True), self.correction(False))
        rate = tokens / (correction * self.step_seconds(drafting, compute, needed, room))
        drafts = self.point is not None and self.point.draft_length > 0
        promise = rate if drafts else np.where(length > 0, rate / DRAFT_GAIN, rate)
        if self.point is not None:
            promise = np.where((msb == self.point.msb) & (lsb == self.point.lsb), promise, promise / SWITCH_GAIN)
        row, column = np.unravel_index(promise.argmax(), promise.shape)
        self.modelled, self._needed, self.room = modelled[:, column], needed[:, column], int(room[column])
        self.point = OperatingPoint(int(msb[column]), int(lsb[column]), lengths[row], float(rate[row, column]))
        return self.point

    def observe(self, drafted: bool, seconds: float, modelled: float, steps: int = 1) -> None:
        """Correct the model of a mode by a step's measured and modelled seconds.

        :param steps: of this mode since the last one observed: what the other learned fades by them, so that one bad step
            does not rule it out for good.
        """
        if drafted not in self._seconds:
            seconds = modelled  # the first sets things up
        old, idle = self._seconds.get(drafted, (0.0, 0.0)), self._seconds.get(not drafted)
        self._seconds[drafted] = MEMORY * old[0] + seconds, MEMORY * old[1] + modelled
        if idle is not None:
            share = 1 - (1 - FORGETTING) ** steps
            believed = min(1.0, self.correction(drafted)) * idle[1]
            self._seconds[not drafted] = idle[0] + share * (believed - idle[0]), idle[1]

    def observe_reads(self, read_bytes: int, seconds: float) -> None:
        """Learn from what a pass read and the seconds in which some read was in flight."""
        self._read_cost.observe(float(self._stalls(np.array(read_bytes))), read_bytes / ASSUMED_BANDWIDTH, seconds)
        self._read = MEMORY * self._read[0] + read_bytes, MEMORY * self._read[1] + seconds

    def _splits(self, room: int) -> list[tuple[int, int]]:
        """(MSB, LSB) slices per layer in ``room`` bytes: from whole experts to all MSB slices, some with spare room."""
        shape = self.shape
        per_layer = room // shape.layers
        whole = min(shape.experts, per_layer // (shape.msb + shape.lsb))
        most = min(shape.experts, per_layer // shape.msb)
        counts = sorted({max(shape.top_k, round(whole + (most - whole) * part / 6)) for part in range(7)})
        splits = []
        for msb in counts:
            lsb = min(msb, max(0, per_layer - msb * shape.msb) // shape.lsb)
            splits += [(msb, lsb)] if lsb == 0 else [(msb, lsb), (msb, lsb // 2), (msb, 0)]
        return splits
