"""Perplexity of the target and of a draft on a text, teacher-forced in windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.arithmetic import exp, lane_sum, log
from elmoe.engine.decoder import AllExperts, Draft, Places, Routings
from elmoe.engine.kv_cache import CacheEntry, PagedCache
from elmoe.errors import RequestError
from elmoe.llm import Model
from elmoe.store.direct import DirectReader
from elmoe.store.machine import private_memory

CHUNK = 128
"""Tokens computed in one pass."""
STRETCH = 8
"""Experts in memory at a time, where a store is read past the page cache."""


@dataclass(frozen=True)
class Perplexity:
    """``nats``: mean cross-entropy per token of the target and of the draft; ``agreement``: share of positions at which
    both have the same most likely token; ``tokens``: positions scored."""

    target_nats: float
    draft_nats: float
    agreement: float
    tokens: int

    @property
    def target(self) -> float:
        """exp(nats) of the target."""
        return float(np.exp(self.target_nats))

    @property
    def draft(self) -> float:
        """exp(nats) of the draft."""
        return float(np.exp(self.draft_nats))


class ReadExperts:
    """The source of a store that is read past the page cache: a pass reads the experts it uses, ``STRETCH`` at a time, and
    keeps none. A draft reads their MSB slices alone."""

    def __init__(self, reader: DirectReader) -> None:
        self._reader, self._rows, self._draft = reader, reader.spec.moe_layers, False
        self.tables = tuple(np.zeros((reader.spec.experts, 2), np.int64) for _ in self._rows)
        self._room = max(reader.expert_extent(layer, 0)[1] for layer in self._rows)
        self._memory = private_memory(STRETCH * self._room)
        self._address = np.frombuffer(self._memory, np.uint8).ctypes.data
        self._row, self._left = 0, list[int]()

    def feed(self, draft: bool) -> ReadExperts:
        """See ``ExpertSource``."""
        self._draft = draft
        return self

    def note(self, routings: Routings, draft: bool) -> None:
        """See ``ExpertSource``; a pass with a feed is not noted."""

    def begin(self, row: int, experts: NDArray[np.int32]) -> None:
        """See ``ExpertFeed``."""
        self._row, self._left = row, np.unique(experts[experts >= 0]).tolist()

    def next(self) -> list[int]:
        """See ``ExpertFeed``. StoreError names a file that cannot be read."""
        ready, self._left = self._left[:STRETCH], self._left[STRETCH:]
        layer, table = self._rows[self._row], self.tables[self._row]
        layout = self._reader.expert_layout(layer)
        size = layout.msb_bytes if self._draft else layout.msb_bytes + layout.lsb_bytes
        table[:] = 0
        for place, expert in enumerate(ready):
            start = place * self._room
            self._reader.read_expert(layer, expert, memoryview(self._memory)[start : start + size])
            table[expert] = self._address + start, self._address + start + layout.msb_bytes
        return ready


class TeacherForcing:
    """Logits of given tokens, in passes of ``CHUNK`` tokens; a store that is not in memory is read anew in each.

    ``counts`` (MoE layers, experts): how often the target used each expert since it was last set to 0.
    """

    def __init__(self, model: Model, window: int) -> None:
        spec = model.reader.spec
        self._decoder = model.engine.decoder
        self._decoder.reserve_positions(window)
        self._cache, entry = PagedCache(spec, 1, window), CacheEntry()
        self._cache.bind(entry)
        self._cache.reserve(entry, window)
        reader = model.reader
        reader.check_sizes()
        self._source = ReadExperts(reader) if isinstance(reader, DirectReader) else AllExperts(reader)
        self.counts = np.zeros((len(spec.moe_layers), spec.experts), np.int64)

    def logits(self, tokens: NDArray[np.int32], draft: Draft | None = None) -> Iterator[NDArray[np.float32]]:
        """(up to ``CHUNK``, vocabulary) logits behind each of at most ``window`` tokens, which start at position 0."""
        for start in range(0, len(tokens), CHUNK):
            positions = np.arange(start, min(start + CHUNK, len(tokens)), dtype=np.int32)
            places = Places(np.zeros_like(positions), positions)
            logits, routings = self._decoder.forward(tokens[positions], places, self._cache.kernels, self._source, draft)
            if draft is None:
                for counts, experts in zip(self.counts, routings.experts, strict=True):
                    counts += np.bincount(experts.ravel(), minlength=len(counts))
            yield logits


def evaluate(
    model: Model,
    text: str,
    window: int = 256,
    windows: int | None = None,
    share: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score a text in windows of ``window`` tokens that do not overlap.

    :param share: share of each layer's experts the draft may use: those the target used most in the window before
        (all of them in the first).
    :raises RequestError: the text is shorter than one window, or the window is longer than the context.
    """
    spec = model.reader.spec
    if not 2 <= window <= spec.max_positions:
        raise RequestError(f"a window of {window} tokens does not fit the context of {spec.max_positions}")
    ids = np.array(model.encode(text), np.int32)
    count = len(ids) // window if windows is None else min(windows, len(ids) // window)
    if count == 0:
        raise RequestError(f"the text has {len(ids)} tokens, a window needs {window}", "give a longer text or --window")
    source = TeacherForcing(model, window)
    keep = max(spec.top_k, round(share * spec.experts))
    allowed = np.ones((len(spec.moe_layers), spec.experts), np.uint8)
    sums = np.zeros(2)
    agreed = scored = 0
    for index in range(count):
        tokens = ids[index * window : (index + 1) * window]
        counts = np.zeros((len(spec.moe_layers), spec.experts), np.int64)
        best = []
        for which, draft in enumerate((None, Draft(allowed, spec.top_k))):
            parts = []
            for start, logits in zip(range(0, window - 1, CHUNK), source.logits(tokens[:-1], draft), strict=True):
                following = tokens[start + 1 : start + 1 + len(logits)]
                top = logits.max(axis=1, keepdims=True)
                total = log(lane_sum(exp(logits - top).astype(np.float64)))
                sums[which] += float((total - (logits - top)[np.arange(len(logits)), following]).sum())
                parts.append(logits.argmax(axis=1))
            best.append(np.concatenate(parts))
        agreed += int((best[0] == best[1]).sum())
        scored += window - 1
        order = np.argsort(-counts, axis=1, kind="stable")[:, :keep]
        allowed = np.zeros_like(allowed)
        np.put_along_axis(allowed, order, 1, axis=1)
        if progress is not None:
            progress(index + 1, count)
    return Perplexity(sums[0] / scored, sums[1] / scored, agreed / scored, scored)
