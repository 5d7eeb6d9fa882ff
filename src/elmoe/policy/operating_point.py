"""Where to run an enforced fast tier: how many MSB and LSB slices to keep, and how far to draft, by modelled tokens/s.

The model knows the popularity of experts (decayed hotness), the slices' bytes, measured costs of compute and the slow tier's
bandwidth, and an acceptance curve; two ratios per mode, of measured to modelled bytes and seconds, correct the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import FastTierSizes
from elmoe.policy.pass_cost import PassCost

DRAFT_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
SWITCH_GAIN = 1.1
"""Other slices must promise this much more: changing them costs reads."""
DRAFT_GAIN = 1.06
"""Where it is not drafted, drafting must promise this much more than plain decoding, whose model errs less."""
CURIOSITY = 1.5
"""How much more drafting is taken to promise until its bytes were measured: tokens are modelled as independent, but those of
a draft share experts."""
SHARING = 0.8
"""Bytes that draft tokens read over those of independent ones (measured: 0.75 to 0.9), for what is not known of a mode."""
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


@dataclass
class ModeCorrection:
    """Measured over modelled slow bytes and seconds of a mode; None until the mode ran."""

    slow_bytes: float | None = None
    seconds: float | None = None

    def observe(self, byte_ratio: float | None, second_ratio: float, expected: float) -> None:
        """Learn from a step; a step that modelled no bytes says nothing of them. ``expected``: the ratio of bytes before the
        first, because those of single steps scatter widely."""
        if byte_ratio is not None:
            self.slow_bytes = _blend(expected if self.slow_bytes is None else self.slow_bytes, byte_ratio)
        self.seconds = _blend(self.seconds, second_ratio)

    def forget(self, other: ModeCorrection, steps: int, relation: float) -> None:
        """The mode did not run for ``steps``: what it learned fades, so that one bad step does not rule it out for good.
        ``relation``: its ratio of bytes over the other's, where nothing else is known."""
        share = 1 - (1 - FORGETTING) ** steps
        if self.seconds is not None and other.seconds is not None:
            self.seconds += share * (min(1.0, other.seconds) - self.seconds)
        if self.slow_bytes is not None and other.slow_bytes is not None:
            self.slow_bytes += share * (relation * other.slow_bytes - self.slow_bytes)


def _blend(old: float | None, new: float) -> float:
    new = min(4.0, max(0.25, new))
    return new if old is None else MEMORY * old + (1 - MEMORY) * new


Seconds = Callable[[float], float]
"""Seconds of a pass of so many tokens."""
Values = NDArray[np.float64]


class Planner:
    """Chooses operating points and learns from what came of them. Costs are handed in as functions of tokens, seconds."""

    def __init__(self, shape: TierShape) -> None:
        self.shape = shape
        self.acceptance = AcceptanceCurve()
        self.pass_cost = PassCost()
        self._bandwidths: dict[bool | None, float] = {}
        self.corrections = {False: ModeCorrection(), True: ModeCorrection()}
        self.point: OperatingPoint | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second of the slow tier in the mode that reads it faster, assumed until some were read."""
        return max(self._bandwidths.values(), default=ASSUMED_BANDWIDTH)

    def bandwidth_of(self, drafts: bool) -> float:
        """Bytes per second that a mode's reads get; until it ran, the other's, then those of prompts."""
        known = (self._bandwidths[mode] for mode in (drafts, not drafts, None) if mode in self._bandwidths)
        return next(known, ASSUMED_BANDWIDTH)

    def correction(self, drafts: bool) -> tuple[float, float]:
        """(bytes, seconds) factors of a mode; until it ran, the other mode's bytes and no correction of seconds."""
        own, other = self.corrections[drafts], self.corrections[not drafts]
        return own.slow_bytes or other.slow_bytes or 1.0, own.seconds or 1.0

    def slow_bytes(self, use: NDArray[np.float64], tokens: float, msb: int, lsb: int) -> float:
        """Expected bytes a target pass of ``tokens`` reads, tokens taken as independent; ``use``: see :func:`popularity`."""
        touched = 1 - (1 - use) ** tokens
        return self.shape.layers * float(touched[msb:].sum() * self.shape.msb + touched[lsb:].sum() * self.shape.lsb)

    def seconds(
        self, point: OperatingPoint, needed: float, sequences: int, capacity: int, draft: Seconds, target: Seconds
    ) -> float:
        """Modelled seconds of a step that reads ``needed`` bytes, but for the mode's correction."""
        drafting = point.draft_length * draft(sequences) if point.draft_length else 0.0
        kept = self.shape.layers * (point.msb * self.shape.msb + point.lsb * self.shape.lsb)
        compute = target(sequences * (1 + point.draft_length))
        bandwidth = self.bandwidth_of(point.draft_length > 0)
        return float(_step_seconds(*map(np.array, (drafting, compute, needed, capacity - kept, bandwidth))))

    def choose(
        self, use: NDArray[np.float64], sequences: int, capacity: int, staging: int, draft: Seconds, target: Seconds,
        lengths: Sequence[int],
    ) -> OperatingPoint:  # fmt: skip
        """The point of the highest modelled rate.

        :param use: see :func:`popularity`. :param capacity: bytes for slices, of which ``staging`` are not for residents.
        :param lengths: draft lengths to choose from.
        """
        shape = self.shape
        msb, lsb = np.array(self._splits(capacity - staging)).T  # columns; draft lengths are rows
        length = np.array(lengths)[:, None]
        factors = np.array([self.correction(False), self.correction(True)])[(length[:, 0] > 0).astype(int)]
        touched = 1 - (1 - use) ** (sequences * (1 + length))
        beyond = np.pad(np.cumsum(touched[:, ::-1], axis=1)[:, ::-1], ((0, 0), (0, 1)))  # of the experts from a rank on
        needed = factors[:, :1] * shape.layers * (beyond[:, msb] * shape.msb + beyond[:, lsb] * shape.lsb)
        covered = np.concatenate(([0.0], np.cumsum(use))) / use.sum()
        acceptance = np.array([self.acceptance(share) for share in covered[msb].tolist()])
        tokens = sequences * (1 - acceptance ** (length + 1)) / (1 - acceptance)
        drafting = length * (draft(sequences) if any(lengths) else 0.0)
        compute = np.array([[target(sequences * (1 + n))] for n in lengths])
        room = capacity - shape.layers * (msb * shape.msb + lsb * shape.lsb)
        bandwidth = np.where(length > 0, self.bandwidth_of(True), self.bandwidth_of(False))
        rate = tokens / (factors[:, 1:] * _step_seconds(drafting, compute, needed, room, bandwidth))
        untried = self.corrections[True].slow_bytes is None and self.corrections[False].slow_bytes is not None
        drafts = self.point is not None and self.point.draft_length > 0
        promise = np.where(length > 0, rate * (CURIOSITY if untried else 1 if drafts else 1 / DRAFT_GAIN), rate)
        if self.point is not None:
            promise = np.where((msb == self.point.msb) & (lsb == self.point.lsb), promise, promise / SWITCH_GAIN)
        row, column = np.unravel_index(promise.argmax(), promise.shape)
        self.point = OperatingPoint(int(msb[column]), int(lsb[column]), lengths[row], float(rate[row, column]))
        return self.point

    def observe(self, drafted: bool, slow: tuple[float, float] | None, seconds: tuple[float, float], steps: int = 1) -> None:
        """Correct the model of a mode by a step's (measured, modelled) bytes and seconds.

        :param slow: None where the bytes say nothing, because too few tokens were seen. :param steps: of this mode since the
            last one observed.
        """
        ratio = slow[0] / slow[1] if slow is not None and slow[1] > self.shape.msb else None
        ran, idle = self.corrections[drafted], self.corrections[not drafted]
        relation = SHARING if drafted else 1 / SHARING
        ran.observe(ratio, seconds[0] / seconds[1], relation * (idle.slow_bytes or 1 / relation))
        idle.forget(ran, steps, 1 / relation)

    def observe_reads(self, drafted: bool | None, read_bytes: int, seconds: float) -> None:
        """Learn a mode's bandwidth (None: of prompts) from bytes and the seconds in which some read was in flight.

        The modes differ, because drafts leave little of the processor to the threads that read; a device that gets slower or
        faster does so for both.
        """
        old = self._bandwidths.get(drafted, read_bytes / seconds)
        new = self._bandwidths[drafted] = MEMORY * old + (1 - MEMORY) * read_bytes / seconds
        if drafted is not None and (not drafted) in self._bandwidths:
            self._bandwidths[not drafted] *= new / old

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


def _step_seconds(drafting: Values, compute: Values, needed: Values, room: Values, bandwidth: Values) -> Values:
    """Seconds of steps, from those of their drafts and of the target's kernels, the bytes they read, the bytes of room
    beside the residents, and bytes per second.

    Drafting reads ahead as much as there is room for. A target pass hides its reads behind compute only within a layer,
    hence the share of the shorter that is added to the longer.
    """
    ahead = np.minimum(np.minimum(np.maximum(room, 0), drafting * bandwidth), needed)
    reading = (needed - ahead) / bandwidth
    return drafting + np.maximum(compute, reading) + EXPOSED * np.minimum(compute, reading)
