"""The fast tier enforced: expert slices live in a fixed arena and come from disk by asynchronous reads past the page cache.

Every (layer, expert, slice) is in one of four states: absent, in flight, staged (readable until its layer is computed) or
resident. A target pass asks for a layer's missing slices in ascending order of experts, computes whatever stretch of experts
is readable, and lets go of staged slices as it goes; meanwhile reads for later layers, planned from the draft's natural
routing, fill the staging slots that are free. What is computed when depends on the completion of reads, its bits do not.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Routing
from elmoe.engine.arena import LSB, MSB, ExpertArena
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
"""Staging slots per class that planned reads leave to demands."""
Key = tuple[int, int, int]
"""(MoE layer row, expert, slice class)."""


class DirectTier(ExpertTier):
    """An ``ExpertTier`` over a ``direct`` reader; ``slots`` None keeps nothing between passes."""

    label = "enforced budget, direct reads"

    def __init__(
        self,
        reader: DirectReader,
        slots: SlotPlan | None,
        parameters: ResidencyParameters,
        statistics: Statistics,
        pool: ReadPool,
        staging_experts: int,
        prefetch: bool = True,
    ) -> None:
        super().__init__(reader, slots, parameters, statistics)
        schema = reader.schema
        self._reader, self._pool, self._prefetch = reader, pool, prefetch
        self._layers = schema.moe_layers
        layout = reader.expert_layout(self._layers[0])
        kept = (sum(slots.msb), sum(slots.lsb)) if slots is not None else (0, 0)
        staging = max(staging_experts, RESERVE)
        self._arena = ExpertArena(
            (layout.msb_bytes, layout.lsb_bytes), (kept[MSB] + staging, kept[LSB] + staging)
        )  # fmt: skip
        self._slot = np.full((len(self._layers), schema.experts, 2), -1, np.int32)
        self._tickets: dict[Key, int] = {}
        self._plan: deque[Key] = deque()
        self._planned: set[Key] = set()
        self._before = self.resident

    def _address_tables(self, reader: WeightReader) -> list[NDArray[np.int64]]:
        return [np.zeros((reader.schema.experts, 2), np.int64) for _ in reader.schema.moe_layers]

    def close(self) -> None:
        """Wait for reads in flight, whose memory is about to go."""
        self._pool.wait(list(self._tickets.values()))
        self._tickets.clear()

    def begin_step(self, sure: list[int]) -> None:
        """A target pass begins: hits count against what is resident now."""
        super().begin_step(sure)
        self._before = ResidentSet(self.resident.msb.copy(), self.resident.lsb.copy())

    def stretches(self, layer: int, routing: Routing, draft: bool) -> Iterator[Stretch]:
        """See ``ExpertTier.stretches``; a draft never waits and never reads what it computes with."""
        row, experts = self._rows[layer], routing.experts
        self._note(row, experts, draft)
        if draft:
            if self._prefetch:
                self._foresee(row, np.unique(routing.ranked[:, : self._reader.schema.top_k]))
            yield Stretch(experts, self._addresses[row], whole=True)
            return
        active = np.flatnonzero(self._active[row])
        demands = deque((row, int(e), kind) for e in active for kind in (MSB, LSB) if self._slot[row, e, kind] < 0)
        self._statistics.foreseen_hits += sum((row, int(e), k) in self._planned for e in active for k in (MSB, LSB))
        self._hasten([(row, int(e), kind) for e in active for kind in (MSB, LSB)])
        self._choose_residents(row, active)
        waiting = deque(int(e) for e in active)
        while waiting:
            self._issue(demands)
            self._arrive((row, waiting[0]))
            ready = [waiting.popleft()]
            while waiting and self._readable(row, waiting[0]):
                ready.append(waiting.popleft())
            if len(ready) == len(active):
                yield Stretch(experts, self._addresses[row], whole=True)
            else:
                yield Stretch(np.where(np.isin(experts, ready), experts, np.int32(-1)), self._addresses[row], whole=False)
            for expert in ready:
                self._let_go(row, expert)
            self._issue(demands)
            self._pump()
        for unused in np.flatnonzero((self._slot[row] >= 0).any(axis=1)):  # read ahead in vain, or evicted
            if unused not in active:
                self._arrive((row, int(unused)))
                self._let_go(row, int(unused))

    def end_step(self, phase: Phase, committed: NDArray[np.int32] | None) -> None:
        """Account the pass and learn; residency has changed layer by layer already."""
        self._account(phase, self.resident if phase == "draft" else self._before)
        if phase != "draft":
            self._plan.clear()
            self._planned.clear()
            if committed is not None and self._slots is not None:
                self._residency.learn(committed)
                self.allowed = self.resident.msb.astype(np.uint8)
        self._active[:] = False

    def _choose_residents(self, row: int, active: NDArray[np.int64]) -> None:
        """Decide which of the layer's slices stay, before they are read; evicted ones that are not needed go at once."""
        if self._slots is None:
            return
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

    def _foresee(self, row: int, experts: NDArray[np.int32]) -> None:
        """Plan reads of what verification will need of a layer, in order of layers, and start what fits."""
        for expert in experts.tolist():
            for kind in (MSB, LSB):
                key = (row, expert, kind)
                if self._slot[key] < 0 and key not in self._planned:
                    self._planned.add(key)
                    self._plan.append(key)
        self._pump()

    def _pump(self) -> None:
        """Start planned reads while staging slots are free."""
        while self._plan:
            key = self._plan[0]
            if self._slot[key] >= 0 or (self._active[key[0]].any() and not self._active[key[0], key[1]]):
                self._plan.popleft()  # there already, or its layer was routed and does not need it
                continue
            if len(self._arena.free[key[2]]) <= RESERVE:
                return
            self._plan.popleft()
            self._read(key, PLANNED)

    def _issue(self, demands: deque[Key]) -> None:
        """Start demanded reads while slots are free."""
        while demands and self._arena.free[demands[0][2]]:
            key = demands.popleft()
            if self._slot[key] < 0:
                self._read(key, DEMAND)

    def _read(self, key: Key, priority: int) -> None:
        row, expert, kind = key
        slot = self._arena.free[kind].pop()
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
        failures = self._pool.wait([self._tickets[key] for key in keys]) if keys else []
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
        self._arena.free[kind].append(int(self._slot[key]))
        self._slot[key] = -1
        self._addresses[row][expert, kind] = 0
