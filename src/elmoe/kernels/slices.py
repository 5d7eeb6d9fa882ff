"""The door to the enforced tier's native mechanism (declared in native/expert_slices.hpp)."""

import numpy as np
from numpy.typing import NDArray

from elmoe import _native  # noqa: TID251 - this package is the door
from elmoe._native import ExpertArena, ExpertSlices, SliceReadFailure  # noqa: TID251 - this package is the door
from elmoe.errors import StoreError

MSB, LSB = 0, 1
"""Kinds of slices."""

__all__ = ["LSB", "MSB", "ExpertArena", "ExpertSlices", "SliceReadFailure", "read_failed", "refill_layer"]


def read_failed(failure: SliceReadFailure) -> StoreError:
    """The error of a slice that cannot be read: it names the file, the expert and the reason."""
    return StoreError(str(failure), "check the disk, then `elmoe inspect --verify`")


def refill_layer(
    resident: tuple[NDArray[np.bool_], NDArray[np.bool_]],
    hotness: NDArray[np.float64],
    streamed: NDArray[np.bool_],
    slots: tuple[int, int],
    hysteresis: float,
    swap_cap: int,
) -> None:
    """``policy.residency.refill`` of one layer, in place: (experts,) arrays; ``resident`` and ``slots`` of (MSB, LSB)."""
    _native.refill(*resident, hotness, streamed, *slots, hysteresis, swap_cap)
