"""Paged fp16 cache of keys and values: sequences hold pages of one pool, may share them, and give them back.

Capacity is a ceiling: memory is touched as pages are first used and returned to the system where :meth:`PagedCache.shrink`
is called. A prompt's pages can be shared: full pages are counted, the page that is still written is copied. With a prefix
cache, full pages stay when their sequence ends, for texts that begin alike, until their room is needed. Of layers with a
window, the pages behind it are let go (see ``cache_layout``), and no prefixes are kept.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from math import prod

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import KVCache
from elmoe.engine.cache_layout import PAGE_POSITIONS, layout_of, pages_for
from elmoe.engine.prefixes import NONE, Prefixes
from elmoe.errors import BudgetError
from elmoe.models.spec import GroupedAttention, ModelSpec

__all__ = ["PAGE_POSITIONS", "CacheEntry", "PagedCache", "pages_for"]

SYSTEM_PAGE = mmap.PAGESIZE
NO_PAGE = -1


@dataclass(eq=False)
class CacheEntry:
    """The pages of one sequence, by stretch of ``PAGE_POSITIONS`` positions and in it by group of layers, -1 where a window
    has let go of one; and its row in the kernels' table, -1: none, so that the sequence cannot be computed. ``known``: first
    pages that the prefix cache knows."""

    pages: list[int] = field(default_factory=list)
    row: int = -1
    known: int = 0


class PagedCache:
    """Pages for the layers of a model.

    :param rows: sequences that can be computed together. :param positions: longest sequence. :param pages: ceiling of pages,
        at most what all rows can hold. :param resting: most pages that the prefix cache keeps of sequences that ended.
    """

    def __init__(
        self, spec: ModelSpec, rows: int, positions: int, pages: int | None = None, resting: int = 0
    ) -> None:  # fmt: skip
        attention = spec.layers[0].attention
        assert isinstance(attention, GroupedAttention)
        self.layout = layout = layout_of(spec)
        per_row = pages_for(positions) * layout.groups
        count = rows * per_row if pages is None else pages
        block = (count, layout.layers, attention.kv_heads)
        self._keys_memory, keys = _lazy((*block, PAGE_POSITIONS // 16, attention.head_dim, 16))
        self._values_memory, values = _lazy((*block, PAGE_POSITIONS, attention.head_dim))
        self.page_bytes = layout.page_bytes
        self.kernels = KVCache(keys, values, np.full((rows, per_row), NO_PAGE, np.int32), layout.places)
        self.windowed = [group for group, window in enumerate(layout.windows) if window is not None]
        """Groups of layers whose pages are let go."""
        self._layer_windows = [
            layer.attention.window for layer in spec.layers if isinstance(layer.attention, GroupedAttention)
        ]
        self._free = list(range(count - 1, -1, -1))
        self._free_rows = list(range(rows - 1, -1, -1))
        self._holders = [0] * count
        self._touched = np.zeros(count, bool)
        self._prefixes = Prefixes(resting, PAGE_POSITIONS)
        self.keeps_prefixes = resting > 0
        assert not (self.keeps_prefixes and self.windowed), "pages behind a window are let go: no text can begin with them"

    @property
    def pages(self) -> int:
        """Ceiling of pages."""
        return len(self._holders)

    @property
    def free_pages(self) -> int:
        """Pages that can be had: those that nobody holds, or the prefix cache alone."""
        return len(self._free) + self._prefixes.resting

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages that sequences or the prefix cache hold; a shared page counts once."""
        return (self.pages - len(self._free)) * self.page_bytes

    @property
    def bytes_resting(self) -> int:
        """Bytes of the pages that the prefix cache alone holds."""
        return self._prefixes.resting * self.page_bytes

    @property
    def bytes_touched(self) -> int:
        """Bytes of the pages that occupy memory: those in use, and free ones that were not given back to the system."""
        return int(self._touched.sum()) * self.page_bytes

    @property
    def free_rows(self) -> int:
        """Sequences that can be bound beside those that are."""
        return len(self._free_rows)

    def bind(self, entry: CacheEntry) -> None:
        """Give an entry a row of the kernels' table; BudgetError if all are taken."""
        if entry.row >= 0:
            return
        if not self._free_rows:
            raise BudgetError("all rows of the KV cache are taken", "lower the number of sequences")
        entry.row = self._free_rows.pop()
        self.kernels.table[entry.row, : len(entry.pages)] = entry.pages

    def positions(self, entry: CacheEntry) -> int:
        """Up to which position an entry has pages."""
        return len(entry.pages) // self.layout.groups * PAGE_POSITIONS

    def missing(self, entry: CacheEntry, positions: int) -> int:
        """Pages that an entry lacks up to position ``positions``."""
        return 0 if positions <= self.positions(entry) else pages_for(positions) * self.layout.groups - len(entry.pages)

    def reserve(self, entry: CacheEntry, positions: int) -> None:
        """Give an entry pages for ``positions`` positions; BudgetError, and no page taken, if the pool has too few."""
        missing = self.missing(entry, positions)
        if missing > self.free_pages or len(entry.pages) + missing > self.kernels.table.shape[1]:
            raise BudgetError("the KV cache has no page left", "raise --kv-memory, or lower the batch or the lengths")
        for _ in range(missing):
            page = self._free.pop() if self._free else self._prefixes.give_up()
            self._holders[page] = 1
            self._touched[page] = True
            if entry.row >= 0:
                self.kernels.table[entry.row, len(entry.pages)] = page
            entry.pages.append(page)

    def trim(self, entry: CacheEntry, positions: int) -> None:
        """Give back the pages behind an entry's first ``positions`` positions."""
        keep = pages_for(positions) * self.layout.groups
        while len(entry.pages) > keep:
            page = entry.pages.pop()
            if entry.row >= 0:
                self.kernels.table[entry.row, len(entry.pages)] = NO_PAGE
            self._let_go(page)
        entry.known = min(entry.known, keep)

    def _let_go(self, page: int) -> None:
        """One holder less."""
        if page == NO_PAGE:
            return
        self._holders[page] -= 1
        if not self._holders[page]:
            if page not in self._prefixes:
                self._free.append(page)
                return
            self._prefixes.rest(page)
            if self._prefixes.resting > self._prefixes.most:
                self._free.append(self._prefixes.give_up())

    def _hold(self, page: int) -> None:
        """One holder more of a page that somebody holds, or that rests."""
        if page == NO_PAGE:
            return
        if not self._holders[page]:
            self._prefixes.wake(page)
        self._holders[page] += 1

    def adopt(self, entry: CacheEntry, tokens: Items[int], positions: int) -> int:
        """Give an entry, behind the full pages that it has, known pages of the text within the first ``positions``; returns
        positions that need not be computed now."""
        held = len(entry.pages)
        if not self.keeps_prefixes or entry.known < held:
            return 0
        found = self._prefixes.find(entry.pages[-1] if held else NONE, tokens, held, positions // PAGE_POSITIONS)
        for page in found:
            self._hold(page)
            if entry.row >= 0:
                self.kernels.table[entry.row, len(entry.pages)] = page
            entry.pages.append(page)
        entry.known = len(entry.pages)
        return len(found) * PAGE_POSITIONS

    def keep(self, entry: CacheEntry, tokens: Items[int], positions: int) -> None:
        """Let the prefix cache know the full pages among an entry's first ``positions`` positions, which the target has
        computed of ``tokens``. Where it knows such a page already, the entry takes that one."""
        if not self.keeps_prefixes:
            return
        for stretch in range(entry.known, positions // PAGE_POSITIONS):
            own = entry.pages[stretch]
            known = self._prefixes.add(entry.pages[stretch - 1] if stretch else NONE, tokens, stretch, own)
            if known != own:
                self._hold(known)
                entry.pages[stretch] = known
                if entry.row >= 0:
                    self.kernels.table[entry.row, stretch] = known
                self._let_go(own)
            entry.known = stretch + 1

    def forget_prefixes(self) -> None:
        """Give up all pages that the prefix cache alone holds."""
        while self._prefixes.resting:
            self._free.append(self._prefixes.give_up())

    def forget(self, entry: CacheEntry, computed: int) -> None:
        """Give back the pages of windowed layers that no token at position ``computed`` or later sees."""
        for group in self.windowed:
            last = self.layout.first_seen(group, computed) // PAGE_POSITIONS
            for index in range((last - 1) * self.layout.groups + group, -1, -self.layout.groups):
                page = entry.pages[index]
                if page == NO_PAGE:
                    break  # what is before it was let go earlier
                entry.pages[index] = NO_PAGE
                if entry.row >= 0:
                    self.kernels.table[entry.row, index] = NO_PAGE
                self._let_go(page)

    def release(self, entry: CacheEntry) -> None:
        """Give back all pages of an entry, and its row."""
        self.trim(entry, 0)
        if entry.row >= 0:
            self._free_rows.append(entry.row)
            entry.row = -1

    def fork(self, entry: CacheEntry, positions: int) -> CacheEntry:
        """An entry with the same first ``positions`` positions: full pages are shared, the last one is copied.

        :raises BudgetError: there is no page for the copy.
        """
        full = positions // PAGE_POSITIONS * self.layout.groups
        copy = CacheEntry(entry.pages[:full], known=min(entry.known, full))
        for page in copy.pages:
            self._hold(page)
        if positions % PAGE_POSITIONS:
            try:
                self.reserve(copy, positions)
            except BudgetError:
                self.release(copy)
                raise
            for array in (self.kernels.keys, self.kernels.values):
                for ours, theirs in zip(copy.pages[full:], entry.pages[full:], strict=False):
                    array[ours] = array[theirs]
        return copy

    def shrink(self) -> int:
        """Give the memory of free pages back to the system; returns bytes given back."""
        freed = 0
        for page in [page for page in self._free if self._touched[page]]:
            for memory, array in ((self._keys_memory, self.kernels.keys), (self._values_memory, self.kernels.values)):
                size = array[page].nbytes
                first = -(-page * size // SYSTEM_PAGE) * SYSTEM_PAGE
                length = (page + 1) * size // SYSTEM_PAGE * SYSTEM_PAGE - first
                if length > 0:  # what shares a system page with neighbours stays
                    memory.madvise(mmap.MADV_DONTNEED, first, length)
            self._touched[page] = False
            freed += self.page_bytes
        return freed

    def digest(self, entry: CacheEntry, positions: int) -> str:
        """A hash of the first ``positions`` positions' key and value bytes over all layers, of windowed ones those that the
        next token sees; the entry must be bound."""
        state = hashlib.blake2b(digest_size=16)
        for layer, window in enumerate(self._layer_windows):
            first = 0 if window is None else max(0, positions + 1 - window)
            for array in self.kernels.gather(layer, entry.row, positions, first):
                state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()


def _lazy(shape: tuple[int, ...]) -> tuple[mmap.mmap, NDArray[np.float16]]:
    """An fp16 array of zeros whose memory is taken page by page, at first use, and can be given back."""
    memory = mmap.mmap(-1, max(1, 2 * prod(shape)), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return memory, np.frombuffer(memory, np.float16, prod(shape)).reshape(shape)
