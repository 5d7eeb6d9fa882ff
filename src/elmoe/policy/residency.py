"""Which expert slices stay in the fast tier: hotness, refill from what was streamed, hysteresis and a swap cap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import SlotPlan


@dataclass(frozen=True)
class ResidencyParameters:
    """``decay``: what a committed token leaves of the older counts. ``hysteresis``: how much hotter than a resident a
    newcomer must be. ``swap_cap``: newcomers per layer and step once the slots are full."""

    decay: float = 0.97
    hysteresis: float = 0.1
    swap_cap: int = 4


@dataclass(frozen=True)
class ResidentSet:
    """Resident slices as boolean (layers, experts) arrays; ``lsb`` implies ``msb``."""

    msb: NDArray[np.bool_]
    lsb: NDArray[np.bool_]

    @classmethod
    def empty(cls, layers: int, experts: int) -> ResidentSet:
        """Nothing resident."""
        return cls(np.zeros((layers, experts), bool), np.zeros((layers, experts), bool))


def updated_hotness(
    hotness: NDArray[np.float64], routed: NDArray[np.int32], parameters: ResidencyParameters
) -> NDArray[np.float64]:
    """Exponentially decayed counts of verified routing.

    :param hotness: (layers, experts) counts so far.
    :param routed: (layers, tokens, k) expert ids of committed tokens, oldest first; all weigh the same within a step.
    """
    layers, experts = hotness.shape
    flat = (routed.reshape(layers, -1) + np.arange(layers)[:, None] * experts).ravel()
    counts = np.bincount(flat, minlength=layers * experts).reshape(layers, experts)
    # decay ** tokens as repeated products: pow() differs between libraries
    factor = 1.0
    for _ in range(routed.shape[1]):
        factor *= parameters.decay
    return hotness * factor + counts


def refill(
    resident: ResidentSet,
    hotness: NDArray[np.float64],
    streamed: NDArray[np.bool_],
    slots: SlotPlan,
    parameters: ResidencyParameters,
) -> ResidentSet:
    """The resident set after a step: swaps in only slices that the step streamed anyway.

    :param streamed: (layers, experts), experts whose missing slices the step read from the slow tier.
    """
    msb_slots, lsb_slots = np.array(slots.msb), np.array(slots.lsb)
    msb = _keep_hottest(resident.msb, hotness, streamed & ~resident.msb, msb_slots, parameters)
    kept_lsb = resident.lsb & msb
    lsb = _keep_hottest(kept_lsb, hotness, streamed & msb & ~kept_lsb, lsb_slots, parameters)
    return ResidentSet(msb, lsb)


def _keep_hottest(
    resident: NDArray[np.bool_],
    hotness: NDArray[np.float64],
    candidates: NDArray[np.bool_],
    slots: NDArray[np.int64],
    parameters: ResidencyParameters,
) -> NDArray[np.bool_]:
    """Per layer the hottest ``slots`` of residents (favoured by the hysteresis) and the best few candidates."""
    if not candidates.any():
        return resident
    empty = slots - resident.sum(axis=1)
    newcomers = np.minimum(empty + parameters.swap_cap, slots)
    order = np.argsort(np.where(candidates, -hotness, np.inf), axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    admitted = candidates & (rank < newcomers[:, None])
    score = np.where(resident, hotness * (1 + parameters.hysteresis), np.where(admitted, hotness, -1.0))
    order = np.argsort(-score, axis=1, kind="stable")
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(order.shape[1]), order.shape), axis=1)
    return (rank < slots[:, None]) & (resident | admitted)
