"""Recorded routing under the engine's residency policies: which slices would be resident when a pass begins.

Routings are (tokens, layers, k) or (tokens, layers, ranks) expert ids, as traces hold them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import Residency, ResidencyParameters, ResidentSet, trimmed


class ReplayedResidents:
    """The resident slices of a run that goes by recorded routing; empty at first.

    ``resident``: now, (layers, experts). ``hotness``: (layers, experts) scores up to the last pass.
    """

    def __init__(self, layers: int, experts: int, slots: SlotPlan, parameters: ResidencyParameters) -> None:
        self.slots = slots
        self.resident = ResidentSet.empty(layers, experts)
        self._residency = Residency(layers, experts, parameters)

    @property
    def hotness(self) -> NDArray[np.float64]:
        """Scores by which residents are kept."""
        return self._residency.hotness

    @property
    def counts(self) -> NDArray[np.float64]:
        """(layers, experts) counts of verified routing, as the planner takes them."""
        return self._residency.popularity

    def resize(self, slots: SlotPlan) -> None:
        """Between steps: keep as many slices as these slots hold, the hottest, as the engine's tier does."""
        if slots != self.slots:
            self.slots = slots
            self.resident = trimmed(self.resident, self.hotness, np.array(slots.msb), np.array(slots.lsb))

    def end_pass(self, sure: NDArray, committed: NDArray, used: NDArray[np.bool_]) -> None:
        """Refill after a target pass, and learn from it.

        :param sure: routing that was sure to stay before acceptance was known. :param committed: that of tokens that stayed.
        :param used: (layers, experts) experts that the pass read.
        """
        self.resident = self._residency.end_step(self.resident, _by_layer(sure), _by_layer(committed), used, self.slots)


def experts_used(chosen: NDArray, experts: int) -> NDArray[np.bool_]:
    """(layers, experts): which experts a pass uses."""
    return expert_counts(chosen, experts) > 0


def expert_counts(chosen: NDArray, experts: int) -> NDArray[np.int64]:
    """(layers, experts): how many of the (tokens, layers, k) choices fell on each expert."""
    layers = chosen.shape[1]
    flat = chosen.astype(np.int64) + np.arange(layers)[:, None] * experts
    return np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts)


def best_residents(ranked: NDArray, resident: NDArray[np.bool_], count: int) -> tuple[NDArray, NDArray[np.bool_]]:
    """The first ``count`` residents of each ranking, best first: (tokens, layers, count) ids.

    Where a ranking holds fewer, its best other experts follow, and the second array marks them.
    """
    present = resident[np.arange(ranked.shape[1])[:, None], ranked]
    order = np.argsort(~present, axis=2, kind="stable")[..., :count]
    return np.take_along_axis(ranked, order, axis=2), ~np.take_along_axis(present, order, axis=2)


def _by_layer(tokens: NDArray) -> NDArray[np.int32]:
    """(tokens, layers, k) as the policies' (layers, tokens, k)."""
    return tokens.transpose(1, 0, 2).astype(np.int32)
