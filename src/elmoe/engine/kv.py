"""Paged fp16 KV cache: pages are taken from one pool as sequences grow and returned when they end or roll back."""

from __future__ import annotations

import hashlib

import numpy as np

from elmoe.bitslice import KVCache
from elmoe.engine.decoder import grouped_attention
from elmoe.errors import BudgetError
from elmoe.models.spec import ModelSpec

PAGE_POSITIONS = 64
"""Positions per page, a multiple of 16 (the kernels' block)."""


class KVPool:
    """``slots`` sequences of up to ``positions`` each, over ``pages`` pages. Memory is touched as pages are first used."""

    def __init__(self, spec: ModelSpec, slots: int, positions: int, pages: int | None = None) -> None:
        per_slot = pages_for(positions)
        pages = slots * per_slot if pages is None else pages
        attention = grouped_attention(spec)
        block = (pages, len(spec.layers), attention.kv_heads)
        self.page_bytes = PAGE_POSITIONS * spec.kv_bytes_per_position
        self.cache = KVCache(
            np.zeros((*block, PAGE_POSITIONS // 16, attention.head_dim, 16), np.float16),
            np.zeros((*block, PAGE_POSITIONS, attention.head_dim), np.float16),
            np.full((slots, per_slot), -1, np.int32),
        )
        self._free = list(range(pages - 1, -1, -1))
        self._held = [0] * slots
        self._pages_touched = 0

    @property
    def bytes_touched(self) -> int:
        """Bytes of the pages that were ever in use: memory the cache keeps."""
        return self._pages_touched * self.page_bytes

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that sequences hold."""
        return sum(self._held) * self.page_bytes

    def reserve(self, slot: int, positions: int) -> None:
        """Give a slot pages for ``positions`` positions; BudgetError if the pool has no page left."""
        while self._held[slot] * PAGE_POSITIONS < positions:
            if not self._free or self._held[slot] == self.cache.table.shape[1]:
                raise BudgetError("the KV cache has no page left", "lower the batch or the length of the requests")
            self.cache.table[slot, self._held[slot]] = self._free.pop()
            self._held[slot] += 1
        self._pages_touched = max(self._pages_touched, len(self.cache.keys) - len(self._free))

    def release(self, slot: int) -> None:
        """Return all pages of a slot."""
        for index in range(self._held[slot] - 1, -1, -1):
            self._free.append(int(self.cache.table[slot, index]))
            self.cache.table[slot, index] = -1
        self._held[slot] = 0

    def digest(self, slot: int, positions: int) -> str:
        """A hash of the first ``positions`` positions' key and value bytes over all layers."""
        state = hashlib.blake2b(digest_size=16)
        for layer in range(self.cache.keys.shape[1]):
            for array in self.cache.gather(layer, slot, positions):
                state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()


def pages_for(positions: int) -> int:
    """Pages that hold ``positions`` positions."""
    return -(-positions // PAGE_POSITIONS)
