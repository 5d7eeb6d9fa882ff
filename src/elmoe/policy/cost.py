"""What draft passes, target passes and reads cost, learned from those that ran."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import TierShape

Values = NDArray[np.float64]

ASSUMED_MEMORY_BANDWIDTH = 15e9
"""Assumed bytes per second of memory. Passes correct it."""
ASSUMED_BANDWIDTH = 1e9
"""Assumed bytes per second of the slow tier. Reads correct it."""
PRIOR = 0.1
"""Weight of an assumed bandwidth, in observations."""
DECAY = 0.98
"""Decay of a fit's past per observation."""
BANDWIDTH_DECAY = 0.9
"""Decay of the measured bandwidth's past per observation."""
EXPOSED = 0.5
"""Share of the shorter of compute and reading that a target pass does not hide behind the longer (measured: 0.2 to 0.8)."""
FIRST_DRAFTS = 1
"""Draft passes that are not learned from, because they set up what later ones use. The first one took 20 ms instead of 1 ms
on the demo model (docs/log.md, 2026-11-27)."""
FOLDED_TOGETHER = 8
"""Observations that wait at most until a fit that is asked takes them in: between two choices, a draft may be stopped by
what was known some passes before. A fold takes a tenth of a small model's step."""
MOST_WAITING = 512
"""Latest observations that wait where nobody asks; earlier ones would weigh less than 1/30,000."""
LEAST_DETERMINANT = 1e-9
"""Of products scaled to a diagonal of ones: below it their parts cannot be told from each other."""
CHOICES = [list(parts) for count in (3, 2, 1) for parts in combinations((1, 2, 0), count)]
"""Sets of the parts fixed (0), scale (1) and slope (2) to solve for, in the order of preference."""


class Fit:
    """Seconds as ``fixed + scale * assumed + slope * count``, none negative: least squares of relative errors over a past
    that decays.

    For passes, ``assumed`` is what reading the touched weights would take at an assumed bandwidth, and ``count`` is the
    tokens. The former grows ever more slowly with tokens, which share experts: a straight line through a prompt's pass
    misjudges one of few tokens. While decode steps of one size alone were seen beside prompts, what the assumed bandwidth
    and the prompts do not explain counts as fixed.

    :param features: (assumed seconds, count) of amounts; amounts are tokens or bytes.
    :param skip: first observations that do not count.
    """

    def __init__(self, features: Callable[[Values], tuple[Values, Values]], skip: int = 0) -> None:
        self._features, self._skip = features, skip
        self._products, self._sums = [[0.0] * 3 for _ in range(3)], [0.0] * 3
        self._products[1][1] = self._sums[1] = PRIOR
        self._waiting: deque[tuple[float, float]] = deque(maxlen=MOST_WAITING)
        self._observed = 0  # since the last fold
        self._cost: list[float] | None = None
        self.known = False
        """Whether anything was learned."""

    def observe(self, amount: float, seconds: float) -> None:
        """Learn from one pass or read; cheap."""
        if self._skip > 0:
            self._skip -= 1
        elif seconds > 0:
            self._waiting.append((amount, seconds))
            self._observed += 1
            if not self.known:
                self.known, self._cost = True, None

    def seconds(self, amount: Any) -> Values:
        """Predicted seconds of an amount or an array of amounts, by all but the last few observations."""
        if self._cost is None or len(self._waiting) >= FOLDED_TOGETHER:
            self.fold()
            self._cost = self._solve()
        fixed, scale, slope = self._cost
        assumed, count = self._features(np.asarray(amount, np.float64))
        predicted: Values = fixed + scale * assumed + slope * count
        return predicted

    def fold(self) -> None:
        """Take in what was observed."""
        if not self._waiting:
            return
        weight, weights = 1.0, dict[float, tuple[float, float]]()  # by amount: of 1 / seconds, and of its square
        for amount, seconds in reversed(self._waiting):
            one, squared = weights.get(amount, (0.0, 0.0))
            weights[amount] = one + weight / seconds, squared + weight / (seconds * seconds)
            weight *= DECAY
        left = DECAY**self._observed
        products = [[left * value for value in row] for row in self._products]
        sums = [left * value for value in self._sums]
        products[1][1] += PRIOR * (1 - left)  # the assumption does not fade
        sums[1] += PRIOR * (1 - left)
        assumed, counts = self._features(np.array(list(weights), np.float64))
        for a, n, (one, squared) in zip(assumed.tolist(), counts.tolist(), weights.values(), strict=True):
            row = (1.0, a, n)
            sums = [old + one * value for old, value in zip(sums, row, strict=True)]
            products = [
                [old + squared * value * other for old, other in zip(line, row, strict=True)]
                for line, value in zip(products, row, strict=True)
            ]
        self._products, self._sums, self._observed = products, sums, 0
        self._waiting.clear()
        self._cost = None

    def _solve(self) -> list[float]:
        """(fixed, scale, slope), without parts that would be negative or cannot be told."""
        unit = [max(self._products[part][part], 1e-30) ** 0.5 for part in range(3)]
        for parts in CHOICES:
            products = [[self._products[i][j] / (unit[i] * unit[j]) for j in parts] for i in parts]
            solved = solve(products, [self._sums[part] / unit[part] for part in parts])
            if solved is not None and all(value >= 0 for value in solved):
                cost = [0.0, 0.0, 0.0]
                for part, value in zip(parts, solved, strict=True):
                    cost[part] = value / unit[part]
                return cost
        return [0.0, 1.0, 0.0]


def solve(matrix: list[list[float]], values: list[float]) -> list[float] | None:
    """The solution of up to three equations, by Cramer's rule; None where the determinant is below
    ``LEAST_DETERMINANT``. Not NumPy's: code that runs once in a thousand steps has left the processor's caches by then, and
    so much of it takes milliseconds to come back."""
    whole = determinant(matrix)
    if whole < LEAST_DETERMINANT:
        return None
    return [
        determinant([[*row[:column], value, *row[column + 1 :]] for row, value in zip(matrix, values, strict=True)]) / whole
        for column in range(len(values))
    ]


def determinant(matrix: list[list[float]]) -> float:
    """The determinant of a small matrix, by its first row."""
    if len(matrix) == 1:
        return matrix[0][0]
    return sum(
        (-1) ** column * value * determinant([[*row[:column], *row[column + 1 :]] for row in matrix[1:]])
        for column, value in enumerate(matrix[0])
    )


class Costs:
    """Seconds of draft passes, target passes and reads of one model on one machine.

    ``use``: (experts,) probability that a token uses a layer's hottest, second hottest ... expert; uniform until it is set.
    """

    def __init__(self, shape: TierShape) -> None:
        self._shape = shape
        self.use = np.full(shape.experts, shape.top_k / max(1, shape.experts))
        self._drafts = Fit(lambda tokens: (self._memory_seconds(tokens, sum(shape.msb)), tokens), skip=FIRST_DRAFTS)
        self._targets = Fit(lambda tokens: (self._memory_seconds(tokens, shape.one_expert), tokens))
        self._reads = Fit(lambda read: (read / ASSUMED_BANDWIDTH, self._stalls(read)))
        self._read = 0.0, 0.0  # bytes and seconds, decayed

    def observe_draft(self, tokens: int, seconds: float) -> None:
        """Learn from a draft pass."""
        self._drafts.observe(tokens, seconds)

    def observe_target(self, tokens: int, seconds: float) -> None:
        """Learn from a target pass: its seconds but for waiting."""
        self._targets.observe(tokens, seconds)

    def observe_reads(self, read: int, seconds: float) -> None:
        """Learn from the bytes that a pass read, and the seconds in which some read was in flight."""
        self._reads.observe(read, seconds)
        self._read = BANDWIDTH_DECAY * self._read[0] + read, BANDWIDTH_DECAY * self._read[1] + seconds

    def fold(self) -> None:
        """Take in all that was observed."""
        for fit in (self._drafts, self._targets, self._reads):
            fit.fold()

    @property
    def draft_known(self) -> bool:
        """Whether a draft pass was learned from."""
        return self._drafts.known

    @property
    def bandwidth(self) -> float:
        """Bytes per second that recent reads got; assumed until some were seen."""
        read, seconds = self._read
        return read / seconds if seconds else ASSUMED_BANDWIDTH

    def draft_seconds(self, tokens: Any) -> Values:
        """Seconds of a draft pass, which does part of a target pass's work and so never costs more."""
        return np.minimum(self._drafts.seconds(tokens), self._targets.seconds(tokens))

    def target_seconds(self, tokens: Any) -> Values:
        """Seconds of a target pass but for waiting."""
        return self._targets.seconds(tokens)

    def reading_seconds(self, slow_bytes: Any) -> Values:
        """Seconds in which a pass that reads so many bytes has a read in flight. Few bytes pay more for each, because the
        layers wait one after the other."""
        return self._reads.seconds(slow_bytes)

    def step_seconds(self, drafting: Any, compute: Any, needed: Any, room: Any) -> Values:
        """Modelled seconds of steps: from seconds of their draft passes and of the target's kernels, bytes to read, and
        bytes of room beside the residents.

        Drafting reads ahead as much as there is room for. A target pass hides its reads behind compute only within a layer;
        hence the share of the shorter that is added to the longer. A step that reads nothing takes drafting and compute.
        """
        reading = self.reading_seconds(needed)
        ahead = np.minimum(np.minimum(1, np.maximum(room, 0) / np.maximum(needed, 1)) * reading, drafting)
        rest = reading - ahead
        seconds: Values = drafting + np.maximum(compute, rest) + EXPOSED * np.minimum(compute, rest)
        return seconds

    def _memory_seconds(self, tokens: Values, slices: int) -> Values:
        """Seconds of reading what a pass touches from memory. ``slices``: bytes of one expert in every layer."""
        different, which = np.unique(
            tokens, return_inverse=True
        )  # most passes of a run are of few sizes, and powers are dear
        touched: Values = (1 - (1 - self.use) ** different[:, None]).sum(axis=-1)[which].reshape(tokens.shape)
        return (self._shape.dense + touched * slices) / ASSUMED_MEMORY_BANDWIDTH

    def _stalls(self, slow_bytes: Values) -> Values:
        """How many layers miss an expert where the missing ones are spread at random."""
        layers: Values = self._shape.layers * -np.expm1(-slow_bytes / max(1, self._shape.one_expert))
        return layers
