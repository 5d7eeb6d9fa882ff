"""The fast tier's memory for expert slices: page-aligned slots of two sizes in one anonymous mapping."""

from __future__ import annotations

import mmap

import numpy as np

MSB, LSB = 0, 1
"""Index of a slice class."""


class ExpertArena:
    """``slots`` (msb, lsb) slots of ``sizes`` (msb, lsb) bytes. Memory is touched when a slot is first filled."""

    def __init__(self, sizes: tuple[int, int], slots: tuple[int, int]) -> None:
        self.sizes = sizes
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, sizes[MSB] * slots[MSB] + sizes[LSB] * slots[LSB]))
        first = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._first = (first, first + sizes[MSB] * slots[MSB])
        self.free = ([*range(slots[MSB] - 1, -1, -1)], [*range(slots[LSB] - 1, -1, -1)])

    def address(self, kind: int, slot: int) -> int:
        """Address of a slot's first byte."""
        return self._first[kind] + slot * self.sizes[kind]
