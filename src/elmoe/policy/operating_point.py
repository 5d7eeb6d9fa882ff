"""Where to run an enforced fast tier: how many MSB and LSB slices to keep, and how far to draft, by modelled tokens/s.

The model knows the popularity of experts (decayed hotness), the slices' bytes, measured costs of compute and the slow tier's
bandwidth, and an acceptance curve; one ratio per mode, measured seconds to modelled ones, corrects what it leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import FastTierSizes

DRAFT_LENGTHS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 14, 16)
SWITCH_GAIN = 1.1
"""A new point must promise this much more: changing slices costs reads."""
MEMORY = 0.8
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
    """Acceptance of a draft token when residents cover the share c of the natural routing: ``top - spread (1 - c)^2``.

    The shape and the defaults were fitted on the demo model at temperature 0.8 (MSB slots 4 to 64 of 64); what is observed
    scales the rejection rate, whatever the model.
    """

    top: float = 0.96
    spread: float = 0.72
    scale: float = 1.0

    def __call__(self, covered: float) -> float:
        """Probability that a draft token is accepted, given that its prefix was."""
        return min(0.995, max(0.02, 1 - self.scale * self._rejection(covered)))

    def observe(self, covered: float, accepted: int, judged: int) -> None:
        """Learn from one verification."""
        if judged:
            weight = 1 - MEMORY ** (judged / 16)
            ratio = (1 - accepted / judged) / self._rejection(covered)
            self.scale = min(3.0, max(0.2, (1 - weight) * self.scale + weight * ratio))

    def _rejection(self, covered: float) -> float:
        return 1 - self.top + self.spread * (1 - covered) ** 2


def popularity(hotness: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """(experts,) probability that a token uses a layer's hottest, second hottest ... expert, a mean over layers."""
    totals = np.maximum(hotness.sum(axis=1, keepdims=True), 1e-9)
    ranked: NDArray[np.float64] = np.minimum(np.sort(hotness / totals * top_k, axis=1)[:, ::-1], 1.0).mean(axis=0)
    return ranked


class Planner:
    """Chooses operating points and learns from what came of them. Costs are handed in as functions of tokens, seconds."""

    def __init__(self, shape: TierShape) -> None:
        self.shape = shape
        self.acceptance = AcceptanceCurve()
        self.bandwidth = 1e9
        self._correction = {False: 1.0, True: 1.0}
        self._measured = {False: False, True: False}
        self._point: OperatingPoint | None = None

    def slow_bytes(self, use: NDArray[np.float64], tokens: float, msb: int, lsb: int) -> float:
        """Expected bytes a target pass of ``tokens`` reads, tokens taken as independent; ``use``: see :func:`popularity`."""
        touched = 1 - (1 - use) ** tokens
        return self.shape.layers * float(touched[msb:].sum() * self.shape.msb + touched[lsb:].sum() * self.shape.lsb)

    def seconds(
        self, point: OperatingPoint, use: NDArray[np.float64], sequences: int, capacity: int,
        draft_seconds: Callable[[float], float], target_seconds: Callable[[float], float],
    ) -> float:  # fmt: skip
        """Modelled seconds of a step. Drafting reads ahead as much as fits beside the residents."""
        tokens = sequences * (1 + point.draft_length)
        drafting = point.draft_length * draft_seconds(sequences)
        spare = capacity - self.shape.layers * (point.msb * self.shape.msb + point.lsb * self.shape.lsb)
        needed = self.slow_bytes(use, tokens, point.msb, point.lsb)
        ahead = min(max(0, spare), drafting * self.bandwidth, needed)
        step = drafting + max(target_seconds(tokens), (needed - ahead) / self.bandwidth)
        return step * self._correction[point.draft_length > 0]

    def choose(
        self, use: NDArray[np.float64], sequences: int, capacity: int, staging: int,
        draft_seconds: Callable[[float], float], target_seconds: Callable[[float], float],
        lengths: Sequence[int],
    ) -> OperatingPoint:  # fmt: skip
        """The point of the highest modelled rate.

        :param use: see :func:`popularity`. :param capacity: bytes for slices, of which ``staging`` are not for residents.
        :param lengths: draft lengths to choose from.
        """
        points = []
        for msb, lsb in self._splits(capacity - staging):
            acceptance = self.acceptance(float(use[:msb].sum() / use.sum()))
            for length in lengths:
                bare = OperatingPoint(msb, lsb, length, 0.0)
                seconds = self.seconds(bare, use, sequences, capacity, draft_seconds, target_seconds)
                tokens = sequences * (1 - acceptance ** (length + 1)) / (1 - acceptance)
                points.append(OperatingPoint(msb, lsb, length, tokens / seconds))
        best = max(points, key=lambda point: point.rate)
        old = self._point
        if old is not None:
            same = [point for point in points if (point.msb, point.lsb) == (old.msb, old.lsb)]
            kept = max(same, key=lambda point: point.rate, default=None)
            if kept is not None and best.rate < SWITCH_GAIN * kept.rate:
                best = kept
        self._point = best
        return best

    def observe(self, drafted: bool, seconds: float, modelled: float) -> None:
        """Correct the model of a mode by a step's measured and modelled seconds."""
        ratio = min(4.0, max(0.25, seconds / modelled)) * self._correction[drafted]
        keep = MEMORY if self._measured[drafted] else 0.0
        self._correction[drafted] = keep * self._correction[drafted] + (1 - keep) * ratio
        if not self._measured[True]:  # until a draft has run, both modes share what is known
            self._correction[True] = self._correction[drafted]
        self._measured[drafted] = True

    def observe_reads(self, read_bytes: int, seconds: float) -> None:
        """Learn the slow tier's bandwidth from a span in which reads were always in flight."""
        if read_bytes and seconds > 0:
            rate = read_bytes / seconds
            self.bandwidth = rate if self.bandwidth == 1e9 else MEMORY * self.bandwidth + (1 - MEMORY) * rate

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
