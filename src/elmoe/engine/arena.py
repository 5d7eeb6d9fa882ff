"""The fast tier's memory for expert slices: page-aligned slots of two sizes under one limit of bytes."""

from __future__ import annotations

import mmap

import numpy as np

MSB, LSB = 0, 1
"""Index of a slice class."""
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # in Python's mmap from 3.13 on
VIRTUAL = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE


class ExpertArena:
    """Slots of ``sizes`` (msb, lsb) bytes, at most ``slots`` of each class and ``capacity`` bytes in all.

    Addresses are reserved for every slot, memory is there only while a slot is used or kept warm for the next one: what the
    slots hold, warm ones included, never exceeds the capacity, so the classes trade memory with each other and with the KV
    cache.
    """

    def __init__(self, sizes: tuple[int, int], slots: tuple[int, int], capacity: int) -> None:
        self.sizes, self.capacity = sizes, capacity
        self.used = 0
        self._memory = mmap.mmap(-1, max(mmap.PAGESIZE, sizes[MSB] * slots[MSB] + sizes[LSB] * slots[LSB]), flags=VIRTUAL)
        self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._first = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._start = (0, sizes[MSB] * slots[MSB])
        self._cold = ([*range(slots[MSB] - 1, -1, -1)], [*range(slots[LSB] - 1, -1, -1)])
        self._warm: tuple[list[int], list[int]] = ([], [])

    @property
    def held(self) -> int:
        """Bytes of memory behind used and warm slots."""
        return self.used + sum(len(slots) * size for slots, size in zip(self._warm, self.sizes, strict=True))

    def has_room(self, kind: int, reserve: int = 0) -> bool:
        """Whether a slot can be taken and ``reserve`` bytes still be left."""
        return self.used + self.sizes[kind] + reserve <= self.capacity

    def take(self, kind: int) -> int:
        """A slot of a class; call only while there is room."""
        assert self.has_room(kind), "the arena is full"
        if self._warm[kind]:
            slot = self._warm[kind].pop()
        else:
            self._cool(self.capacity - self.sizes[kind])
            slot = self._cold[kind].pop()
        self.used += self.sizes[kind]
        return slot

    def give(self, kind: int, slot: int) -> None:
        """Return a slot; its memory stays warm."""
        self.used -= self.sizes[kind]
        self._warm[kind].append(slot)

    def resize(self, capacity: int) -> None:
        """Change the capacity; warm memory beyond it goes back to the system. Used slots must fit."""
        assert self.used <= capacity, "used slots do not fit the new capacity"
        self.capacity = capacity
        self._cool(capacity)

    def address(self, kind: int, slot: int) -> int:
        """Address of a slot's first byte."""
        return self._first + self._start[kind] + slot * self.sizes[kind]

    def _cool(self, limit: int) -> None:
        """Give warm memory back until at most ``limit`` bytes are held."""
        held = self.held
        for kind in (LSB, MSB):
            while held > limit and self._warm[kind]:
                slot = self._warm[kind].pop()
                self._memory.madvise(mmap.MADV_DONTNEED, self._start[kind] + slot * self.sizes[kind], self.sizes[kind])
                self._cold[kind].append(slot)
                held -= self.sizes[kind]
