"""The fast tier enforced: expert slices live in a fixed arena and come from disk by asynchronous reads past the page cache.

Every (layer, expert, slice) is in one of four states: absent, in flight, staged (readable until its layer is computed) or
resident. A target pass asks for a layer's missing slices in ascending order of experts, computes whatever stretch of experts
is readable, and lets go of staged slices as it goes; meanwhile reads for later layers, planned from the draft's natural
routing, fill the staging slots that are free. What is computed when depends on the completion of reads, its bits do not.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Routing
from elmoe.engine.arena import LSB, MSB, ExpertArena
from elmoe.engine.observe import Timeline
from elmoe.engine.statistics import Phase, Statistics
from elmoe.engine.tier import ExpertTier
from elmoe.errors import StoreError
from elmoe.kernels.reads import ReadPool
from elmoe.models.decoder import Stretch, WeightReader
from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import ResidencyParameters, ResidentSet, refill
from elmoe.store.direct import DirectReader

DEMAND, PLANNED = 0, 1
"""Priorities of reads: what a layer waits for goes before what a later layer will need."""
RESERVE = 2
"""Whole experts that planned reads leave room for, so that demands never wait for a planned slice to be used."""
Key = tuple[int, int, int]
"""(MoE layer row, expert, slice class)."""


class DirectTier(ExpertTier):
    """An ``ExpertTier`` over a ``direct`` reader. It holds nothing until :meth:`replan` gives it slots and memory."""

    label = "enforced budget, direct reads"

    def __init__(
        self,
        reader: DirectReader,
        parameters: ResidencyParameters,
        pool: ReadPool,
        prefetch: bool = True,
    ) -> None:
        super().__init__(reader, parameters)
        schema = reader.schema
        self._reader, self._pool, self._prefetch = reader, pool, prefetch
        layout = reader.expert_layout(self._layers[0])
        count = len(self._layers) * schema.experts
        self._arena = ExpertArena((layout.msb_bytes, layout.lsb_bytes), (count, count), 0)
        self._reserve = RESERVE * (layout.msb_bytes + layout.lsb_bytes)
        self._slot = np.full((len(self._layers), schema.experts, 2), -1, np.int32)
        self._tickets: dict[Key, int] = {}
        self._plan: list[deque[Key]] = [deque() for _ in self._layers]
        self._planned: set[Key] = set()
        self._before = self.resident

    def _address_tables(self, reader: WeightReader) -> tuple[NDArray[np.int64], ...]:
        return tuple(np.zeros((reader.schema.experts, 2), np.int64) for _ in reader.schema.moe_layers)

    def tables(self, draft: bool) -> tuple[NDArray[np.int64], ...] | None:
        """See ``ExpertSource``: a draft uses what is resident; a target pass's slices come and go."""
        return self._addresses if draft else None

    def note(self, ranked: NDArray[np.int32], experts: NDArray[np.int32], draft: bool) -> None:
        """See ``ExpertTier.note``; a draft's natural routing tells what verification will need."""
        super().note(ranked, experts, draft)
        for row, layer in enumerate(ranked):
            self._foresee(row, layer)

    def begin_run(self, statistics: Statistics, timeline: Timeline | None = None) -> None:
        """See ``ExpertTier.begin_run``."""
        super().begin_run(statistics, timeline)
        self._pool.record(timeline is not None)

    def end_run(self) -> None:
        """Wait for reads in flight: their memory must not go before. A tier whose run failed is not used again."""
        self._pool.wait(list(self._tickets.values()))
        self._tickets.clear()
        if self._timeline is not None:
            self._timeline.add_reads(self._pool.take_events())

    def begin_step(self, sure: list[int]) -> None:
        """A target pass begins: hits count against what is resident now."""
        super().begin_step(sure)
        self._before = ResidentSet(self.resident.msb.copy(), self.resident.lsb.copy())

    def stretches(self, layer: int, routing: Routing, draft: bool) -> Iterator[Stretch]:
        """See ``ExpertTier.stretches``; a draft never waits and never reads what it computes with."""
        row, experts = self._rows[layer], routing.experts
        self._note(row, experts, draft)
        if draft:
            self._foresee(row, routing.ranked)
            yield Stretch(experts, self._addresses[row], whole=True)
            return
        active = np.flatnonzero(self._active[row])
        self._plan[row].clear()  # what is not on its way by now is demanded
        demands = deque((row, int(e), kind) for e in active for kind in (MSB, LSB) if self._slot[row, e, kind] < 0)
        if self._planned:
            needed = [(row, int(e), kind) for e in active for kind in (MSB, LSB)]
            self._statistics.foreseen_hits += sum(key in self._planned for key in needed)
            self._hasten(needed)
        self._choose_residents(row, active)
        waiting = deque(int(e) for e in active)
        while waiting:
            self._issue(demands)
            while demands and demands[0][1] == waiting[0]:
                self._make_room(row, waiting[0], demands)
                self._issue(demands)
            self._arrive((row, waiting[0]))
            ready = [waiting.popleft()]
            while waiting and self._readable(row, waiting[0]):
                ready.append(waiting.popleft())
            if len(ready) == len(active):
                yield Stretch(experts, self._addresses[row], whole=True)
            else:
                readable = np.zeros(self._active.shape[1], bool)
                readable[ready] = True
                yield Stretch(np.where(readable[experts], experts, np.int32(-1)), self._addresses[row], whole=False)
            for expert in ready:
                self._let_go(row, expert)
            self._issue(demands)
            self._pump()
        if self._planned:
            staged = (self._slot[row] >= 0) & ~np.stack([self.resident.msb[row], self.resident.lsb[row]], axis=-1)
            for unused in np.flatnonzero(staged.any(axis=1) & ~self._active[row]).tolist():  # read ahead in vain
                self._arrive((row, unused))
                self._let_go(row, unused)

    def end_step(self, phase: Phase, committed: NDArray[np.int32] | None) -> None:
        """Account the pass and learn; residency has changed layer by layer already."""
        self._account(phase, self.resident if phase == "draft" else self._before)
        if phase != "draft":
            for plan in self._plan:
                plan.clear()
            self._planned.clear()
            if committed is not None and self._slots is not None:
                self._residency.learn(committed)
                self.allowed = self.resident.msb.astype(np.uint8)
        self._active[:] = False

    def _choose_residents(self, row: int, active: NDArray[np.int64]) -> None:
        """Decide which of the layer's slices stay, before they are read; evicted ones that are not needed go at once."""
        if self._slots is None or (self.resident.msb[row, active] & self.resident.lsb[row, active]).all():
            return  # what stays changes only by what is read
        slots = SlotPlan((self._slots.msb[row],), (self._slots.lsb[row],), 0)
        here = ResidentSet(self.resident.msb[row : row + 1], self.resident.lsb[row : row + 1])
        scores = self._residency.layer_scores(row, self._sure_routing[row])
        after = refill(here, scores, self._active[row : row + 1], slots, self._parameters)
        evicted = (here.msb & ~after.msb)[0], (here.lsb & ~after.lsb)[0]
        self.resident.msb[row], self.resident.lsb[row] = after.msb[0], after.lsb[0]
        for kind in (MSB, LSB):
            for expert in np.flatnonzero(evicted[kind]):
                if not self._active[row, expert]:
                    self._release((row, int(expert), kind))

    @property
    def popularity(self) -> NDArray[np.float64]:
        """(layers, experts) counts of verified routing."""
        return self._residency.popularity

    @property
    def bytes_read(self) -> int:
        """See ``ExpertTier.bytes_read``."""
        return self._pool.bytes_read()

    def replan(self, slots: SlotPlan | None, capacity: int) -> None:
        """See ``ExpertTier.replan``."""
        before = self.resident
        super().replan(slots, capacity)
        for kind, old, new in ((MSB, before.msb, self.resident.msb), (LSB, before.lsb, self.resident.lsb)):
            for row, expert in np.argwhere(old & ~new).tolist():
                self._release((row, expert, kind))
        self._arena.resize(capacity)

    def _foresee(self, row: int, ranked: NDArray[np.int32]) -> None:
        """Plan reads of what verification will need of a layer by its (tokens, ranks) routing, and start what fits."""
        if not self._prefetch:
            return
        for expert in np.unique(ranked[:, : self._reader.schema.top_k]).tolist():
            for kind in (MSB, LSB):
                key = (row, expert, kind)
                if self._slot[key] < 0 and key not in self._planned:
                    self._planned.add(key)
                    self._plan[row].append(key)
        self._pump()

    def _pump(self) -> None:
        """Start planned reads, earliest layer first, while there is room."""
        for plan in self._plan:
            while plan:
                key = plan[0]
                if not self._arena.has_room(key[2], self._reserve):
                    return
                plan.popleft()
                self._read(key, PLANNED)

    def _issue(self, demands: deque[Key]) -> None:
        """Start demanded reads while there is room."""
        while demands and self._arena.has_room(demands[0][2]):
            key = demands.popleft()
            if self._slot[key] < 0:
                self._read(key, DEMAND)

    def _make_room(self, row: int, expert: int, demands: deque[Key]) -> None:
        """Drop the staged slice that is needed last, not of ``expert``; if this layer needs it, it is read again in turn."""
        staged = (self._slot >= 0) & ~np.stack([self.resident.msb, self.resident.lsb], axis=-1)
        staged[row, expert] = False
        key: Key = tuple(np.argwhere(staged)[-1].tolist())
        self._arrive(key[:2])
        self._release(key)
        if key[0] == row and self._active[row, key[1]]:
            demands.insert(bisect_left(demands, key), key)

    def _read(self, key: Key, priority: int) -> None:
        row, expert, kind = key
        slot = self._arena.take(kind)
        handle, offset = self._reader.extent(self._layers[row], expert)
        if kind == LSB:
            offset += self._arena.sizes[MSB]
        self._slot[key] = slot
        (self._tickets[key],) = self._pool.submit(
            [handle], [offset], [self._arena.sizes[kind]], [self._arena.address(kind, slot)], priority
        )
        self._statistics.slow_reads += 1

    def _hasten(self, keys: list[Key]) -> None:
        late = [self._tickets[key] for key in keys if key in self._tickets]
        if late:
            self._pool.hasten(late, DEMAND)

    def _readable(self, row: int, expert: int) -> bool:
        """Whether both slices are there, without waiting for those in flight."""
        for kind in (MSB, LSB):
            key = (row, expert, kind)
            if self._slot[key] < 0 or (key in self._tickets and not self._pool.done(self._tickets[key])):
                return False
        self._arrive((row, expert))
        return True

    def _arrive(self, place: tuple[int, int]) -> None:
        """Wait for an expert's slices; StoreError names the file, the expert and what went wrong."""
        keys = [key for key in ((*place, MSB), (*place, LSB)) if key in self._tickets]
        if not keys:
            return
        began = perf_counter()
        failures = self._pool.wait([self._tickets[key] for key in keys])
        ended = perf_counter()
        self.waited += ended - began
        if self._timeline is not None:
            self._timeline.add("waits", f"expert {place[1]}", began, ended)
        failed = dict(failures)
        for key in keys:
            error = failed.get(self._tickets.pop(key))
            if error is None:
                self._addresses[key[0]][key[1], key[2]] = self._arena.address(key[2], int(self._slot[key]))
        if failed:
            name = self._reader.manifest.layers[place[0]].file
            reason = os.strerror(next(iter(failed.values())))
            raise StoreError(
                f"'{name}': expert {place[1]} cannot be read: {reason}", "check the disk, then `elmoe inspect --verify`"
            )

    def _let_go(self, row: int, expert: int) -> None:
        """Free the slots of an expert's slices that are not resident."""
        for kind, resident in ((MSB, self.resident.msb), (LSB, self.resident.lsb)):
            if self._slot[row, expert, kind] >= 0 and not resident[row, expert]:
                self._release((row, expert, kind))

    def _release(self, key: Key) -> None:
        row, expert, kind = key
        self._arena.give(kind, int(self._slot[key]))
        self._slot[key] = -1
        self._addresses[row][expert, kind] = 0
