"""What a target pass costs to compute, learned from passes of very different sizes: decode steps and prompts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

PRIOR = 0.1
"""Weight, in passes, of the belief that weights are read at the assumed bandwidth."""
CHOICES = [list(parts) for count in (3, 2, 1) for parts in combinations((1, 2, 0), count)]
"""Of the parts fixed, scale and slope: those to solve for, in the order of preference."""


class PassCost:
    """Seconds of a pass as ``fixed + scale * reading + slope * tokens``, none negative: least squares of relative errors
    over a past that decays.

    ``reading`` is what reading the weights that the pass touches would take at an assumed bandwidth: it grows ever more
    slowly with tokens, which share experts, and a straight line through a prompt's pass misjudges one of few tokens.
    While decode steps of one size alone were seen beside prompts, what the assumed bandwidth and the prompts do not explain
    counts as fixed.
    """

    def __init__(self, decay: float = 0.98) -> None:
        self._decay = decay
        self._products, self._sums = np.zeros((3, 3)), np.zeros(3)
        self._products[1, 1] = self._sums[1] = PRIOR
        self._cost: list[float] | None = None

    def observe(self, tokens: float, reading: float, seconds: float) -> None:
        """Learn from one pass."""
        row = np.array((1.0, reading, tokens)) / seconds
        self._products *= self._decay
        self._sums *= self._decay
        self._products += np.outer(row, row)
        self._sums += row
        self._products[1, 1] += PRIOR * (1 - self._decay)  # the belief does not fade
        self._sums[1] += PRIOR * (1 - self._decay)
        self._cost = None

    def seconds(self, tokens: Any, reading: Any) -> Any:
        """Predicted seconds, of numbers or arrays."""
        if self._cost is None:
            self._cost = self._solve()
        fixed, scale, slope = self._cost
        return fixed + scale * reading + slope * tokens

    def _solve(self) -> list[float]:
        """(fixed, scale, slope), without parts that would be negative or cannot be told."""
        unit = np.sqrt(np.maximum(np.diagonal(self._products), 1e-30))
        for parts in CHOICES:
            products = self._products[np.ix_(parts, parts)] / np.outer(unit[parts], unit[parts])
            if np.linalg.det(products) < 1e-9:
                continue
            solved = np.linalg.solve(products, self._sums[parts] / unit[parts]) / unit[parts]
            if (solved >= 0).all():
                cost = [0.0, 0.0, 0.0]
                for part, value in zip(parts, solved.tolist(), strict=True):
                    cost[part] = value
                return cost
        return [0.0, 1.0, 0.0]
