"""The door to the enforced tier's native mechanism (declared in native/expert_slices.hpp)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe import _native  # noqa: TID251 - this module is the door
from elmoe._native import ExpertArena, ExpertSlices, SliceReadFailure  # noqa: TID251 - this package is the door
from elmoe.errors import StoreError

MSB, LSB = 0, 1
"""Kinds of slices."""

__all__ = [
    "LSB",
    "MSB",
    "ExpertArena",
    "ExpertSlices",
    "Refill",
    "SliceReadFailure",
    "SlicesFeed",
    "read_failed",
    "refill_layer",
]


@dataclass(frozen=True)
class Refill:
    """How a layer's residents change by what it streams: ``resident`` flags (experts,) of (MSB, LSB), changed in place;
    ``scores`` (experts,) of its experts; ``slots`` for (MSB, LSB) slices. See ``policy.residency.refill``."""

    resident: tuple[NDArray[np.bool_], NDArray[np.bool_]]
    scores: NDArray[np.float64]
    slots: tuple[int, int]
    hysteresis: float
    swap_cap: int


@dataclass(frozen=True)
class SlicesFeed:
    """An ``ExpertFeed`` of slices. ``decide`` is told a row and its (tokens, k) experts and says what stays of it; None
    changes nothing. The native ``forward`` takes the slices' stretches without a call into Python."""

    slices: ExpertSlices
    decide: Callable[[int, NDArray[np.int32]], Refill | None]

    def begin(self, row: int, experts: NDArray[np.int32]) -> None:
        """See ``ExpertFeed``: one native call demands what is missing, refills and lets go."""
        change = self.decide(row, experts)
        if change is None:
            self.slices.begin(row, experts)
        else:
            self.slices.begin_and_refill(
                row, experts, *change.resident, change.scores, *change.slots, change.hysteresis, change.swap_cap
            )

    def next(self) -> list[int]:
        """See ``ExpertFeed``. StoreError where a read fails, with the file, the expert and the reason."""
        try:
            return list(self.slices.next())
        except SliceReadFailure as failure:
            raise read_failed(failure) from None


def read_failed(failure: SliceReadFailure) -> StoreError:
    """The error of a slice that cannot be read: it names the file, the expert and the reason."""
    refused = any(os.strerror(code) in str(failure) for code in (errno.EINVAL, errno.EOPNOTSUPP))
    if refused:  # a file system that took O_DIRECT at open, and at the first page
        hint = "its file system refuses direct reads: use --reader memory, or copy the store to another one"
        return StoreError(str(failure), hint)
    return StoreError(str(failure), "check the disk, then `elmoe inspect --verify`")


def refill_layer(change: Refill, streamed: NDArray[np.bool_]) -> None:
    """The native twin of ``policy.residency.refill``, of one layer; ``streamed``: (experts,).

    Changes ``change.resident`` in place."""
    _native.refill(
        *change.resident, change.scores, streamed, *change.slots, change.hysteresis, change.swap_cap
    )  # fmt: skip
