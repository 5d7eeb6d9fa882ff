"""The one cost type, and the two ways in which costs compose."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Parts = Mapping[str, Array]


@dataclass(frozen=True)
class Cost:
    """``latency`` in seconds, ``energy`` in joules by component, ``busy`` seconds by resource, ``traffic`` bytes by memory.

    All are arrays of one shape (whatever is costed at once: passes, or passes x layers). A resource works on one thing at a
    time, so a cost's busy seconds never exceed its latency; :meth:`beside` is therefore only for different resources.
    """

    latency: Array
    energy: Parts = field(default_factory=dict)
    busy: Parts = field(default_factory=dict)
    traffic: Parts = field(default_factory=dict)

    def then(self, other: Cost) -> Cost:
        """One after the other: everything adds."""
        return self._joined(other, self.latency + other.latency)

    def beside(self, other: Cost) -> Cost:
        """At the same time on different resources: the longer latency, everything else adds."""
        return self._joined(other, np.maximum(self.latency, other.latency))

    def or_faster(self, other: Cost) -> Cost:
        """Elementwise whichever is faster; ties go to the first."""
        first = self.latency <= other.latency

        def choose(mine: Parts, its: Parts) -> dict[str, Array]:
            zero = np.zeros_like(self.latency)
            return {
                name: np.where(first, mine.get(name, zero), its.get(name, zero)) for name in [*mine, *(its.keys() - mine)]
            }

        return Cost(
            np.where(first, self.latency, other.latency), choose(self.energy, other.energy), choose(self.busy, other.busy),
            choose(self.traffic, other.traffic),
        )  # fmt: skip

    def times(self, factor: float | Array) -> Cost:
        """Repeated ``factor`` times."""
        return self._mapped(lambda values: values * factor)

    def sum(self, axis: int) -> Cost:
        """Added up along an axis, one after the other."""
        return self._mapped(lambda values: values.sum(axis=axis))

    @property
    def joules(self) -> Array:
        """All components' energy."""
        return reduce(np.add, self.energy.values(), np.zeros_like(self.latency))

    def _joined(self, other: Cost, latency: Array) -> Cost:
        return Cost(
            latency, _added(self.energy, other.energy), _added(self.busy, other.busy), _added(self.traffic, other.traffic)
        )

    def _mapped(self, change: Any) -> Cost:
        def mapped(parts: Parts) -> dict[str, Array]:
            return {name: change(values) for name, values in parts.items()}

        return Cost(change(self.latency), mapped(self.energy), mapped(self.busy), mapped(self.traffic))


def in_order(costs: Iterable[Cost]) -> Cost:
    """Costs one after the other."""
    return reduce(Cost.then, costs)


def _added(mine: Parts, its: Parts) -> dict[str, Array]:
    result = dict(mine)
    for name, values in its.items():
        result[name] = result[name] + values if name in result else values
    return result
