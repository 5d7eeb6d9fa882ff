"""The fast tier enforced: expert slices live in a fixed arena and come from disk by asynchronous reads past the page cache.

The mechanism is native (``kernels.slices``): a target pass asks for a layer's missing slices in ascending order of experts,
computes whatever stretch of experts is readable, and lets go of staged slices as it goes; meanwhile reads for later layers,
planned from the draft's natural routing, fill the room that is free. What stays is decided here. What is computed when
depends on the completion of reads, its bits do not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Routing
from elmoe.engine.observe import Timeline
from elmoe.engine.statistics import Phase, Statistics
from elmoe.engine.tier import ExpertTier
from elmoe.kernels import ExpertFeed
from elmoe.kernels.reads import ReadPool
from elmoe.kernels.slices import LSB, MSB, ExpertArena, ExpertSlices, SliceReadFailure, read_failed, refill_layer
from elmoe.models.decoder import Stretch, WeightReader
from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import ResidencyParameters, ResidentSet
from elmoe.store.direct import DirectReader

RESERVE = 2
"""Slots of each kind that planned reads leave free, so that demands never wait for a planned slice to be used."""


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
        self._reader, self._pool, self._prefetch = reader, pool, prefetch
        layout = reader.expert_layout(self._layers[0])
        files = {entry.layer: entry.file for entry in reader.manifest.layers}
        extents = [[reader.extent(layer, e) for e in range(reader.spec.experts)] for layer in self._layers]
        self._slices = ExpertSlices(
            pool, layout.msb_bytes, layout.lsb_bytes, [files[layer] for layer in self._layers],
            [row[0][0] for row in extents],
            [[offset for _, offset in row] for row in extents], list(self._addresses),
            RESERVE,
        )  # fmt: skip
        self._counted = 0, 0
        self.found = self.resident
        """What the last target pass found resident."""

    def _address_tables(self, reader: WeightReader) -> tuple[NDArray[np.int64], ...]:
        return tuple(np.zeros((reader.spec.experts, 2), np.int64) for _ in reader.spec.moe_layers)

    def feed(self, draft: bool) -> ExpertFeed | None:
        """See ``ExpertSource``: a draft uses what is resident; a target pass's slices come and go."""
        return None if draft else (self._slices, self._begin)

    def note(self, ranked: NDArray[np.int32], experts: NDArray[np.int32], draft: bool) -> None:
        """See ``ExpertTier.note``; a draft's natural routing tells what verification will need."""
        super().note(ranked, experts, draft)
        self._foresee(0, ranked)

    @property
    def waited(self) -> float:
        """See ``ExpertTier.waited``."""
        return float(self._slices.waited)

    @property
    def arena(self) -> ExpertArena:
        """The memory behind the slices."""
        return self._slices.arena

    def begin_run(self, statistics: Statistics, timeline: Timeline | None = None) -> None:
        """See ``ExpertTier.begin_run``."""
        super().begin_run(statistics, timeline)
        self._pool.record(timeline is not None)
        self._slices.record(timeline is not None)
        self._counted = self._slices.reads, self._slices.foreseen_hits

    def end_run(self) -> None:
        """Wait for reads in flight: their memory must not go before. A tier whose run failed is not used again."""
        self._slices.finish()
        self._statistics.slow_reads += self._slices.reads - self._counted[0]
        self._statistics.foreseen_hits += self._slices.foreseen_hits - self._counted[1]
        if self._timeline is not None:
            self._timeline.add_reads(self._pool.take_events())
            for expert, began, ended in self._slices.take_waits():
                self._timeline.add("waits", f"expert {expert}", began, ended)

    def begin_step(self, sure: list[int]) -> None:
        """A target pass begins: hits count against what is resident now."""
        super().begin_step(sure)
        self.found = ResidentSet(self.resident.msb.copy(), self.resident.lsb.copy())

    def stretches(self, layer: int, routing: Routing, draft: bool) -> Iterator[Stretch]:
        """See ``ExpertTier.stretches``; a draft never waits and never reads what it computes with. StoreError where a read
        fails, with the file, the expert and the reason."""
        row, experts = self._rows[layer], routing.experts
        if draft:
            self._note(row, experts[None], draft)
            self._foresee(row, routing.ranked[None])
            yield Stretch(experts, self._addresses[row], whole=True)
            return
        self._begin(row, experts)
        active = np.count_nonzero(self._active[row])
        while ready := self._next():
            if len(ready) == active:
                yield Stretch(experts, self._addresses[row], whole=True)
            else:
                readable = np.zeros(self._active.shape[1], bool)
                readable[ready] = True
                yield Stretch(np.where(readable[experts], experts, np.int32(-1)), self._addresses[row], whole=False)

    def _next(self) -> list[int]:
        """The next readable experts of the layer, none at its end."""
        try:
            return self._slices.next()
        except SliceReadFailure as failure:
            raise read_failed(failure) from None

    def _begin(self, row: int, experts: NDArray[np.int32]) -> None:
        """A layer of a target pass is routed: demand what it needs, decide what stays."""
        self._note(row, experts[None], draft=False)
        active = np.flatnonzero(self._active[row]).astype(np.int32)
        self._slices.begin(row, active)
        self._choose_residents(row, active)

    def end_step(self, phase: Phase, committed: NDArray[np.int32] | None) -> None:
        """Account the pass and learn; residency has changed layer by layer already."""
        self._account(phase, self.resident if phase == "draft" else self.found)
        if phase != "draft":
            self._slices.forget_plans()
            if committed is not None and self._slots is not None:
                self._residency.learn(committed)
                self.allowed = self.resident.msb.astype(np.uint8)
        self._active[:] = False

    def _choose_residents(self, row: int, active: NDArray[np.int32]) -> None:
        """Decide which of the layer's slices stay, before they are read; evicted ones that are not needed go at once."""
        if self._slots is None or (self.resident.msb[row, active] & self.resident.lsb[row, active]).all():
            return  # what stays changes only by what is read
        resident = self.resident.msb[row], self.resident.lsb[row]
        scores = self._residency.layer_scores(row, self._sure_routing[row])
        refill_layer(
            resident, scores, self._active[row], (self._slots.msb[row], self._slots.lsb[row]), self._parameters.hysteresis,
            self._parameters.swap_cap,
        )  # fmt: skip
        self._slices.keep(row, *resident)

    @property
    def popularity(self) -> NDArray[np.float64]:
        """(layers, experts) counts of verified routing."""
        return self._residency.popularity

    @property
    def filled(self) -> float:
        """Share of the slots of the kind with more of them free that residents take."""
        if self._slots is None:
            return 1.0
        kinds = ((self._slots.msb, self.resident.msb), (self._slots.lsb, self.resident.lsb))
        return min((float(resident.sum()) / sum(slots) for slots, resident in kinds if any(slots)), default=1.0)

    @property
    def bytes_read(self) -> int:
        """See ``ExpertTier.bytes_read``."""
        return self._pool.bytes_read()

    @property
    def reading_seconds(self) -> float:
        """Seconds with a read in flight since the tier began."""
        return self._pool.busy_seconds()

    def replan(self, slots: SlotPlan | None, capacity: int) -> None:
        """See ``ExpertTier.replan``."""
        super().replan(slots, capacity)
        for row, (msb, lsb) in enumerate(zip(self.resident.msb, self.resident.lsb, strict=True)):
            self._slices.keep(row, msb, lsb)
        self._slices.resize(*self._slots_held(capacity))

    def _slots_held(self, capacity: int) -> tuple[int, int]:
        """(MSB, LSB) slices that fit ``capacity``: residents, and of either kind as many on their way as may be missing, so
        that no kind waits for memory of the other."""
        kept = (0, 0) if self._slots is None else (sum(self._slots.msb), sum(self._slots.lsb))
        msb_bytes, lsb_bytes = self.arena.size(MSB), self.arena.size(LSB)
        room = capacity - kept[0] * msb_bytes - kept[1] * lsb_bytes
        missing = self._active.size - kept[0], self._active.size - kept[1]  # ever fewer MSB slices than LSB slices
        msb = min(missing[0], max(1, room // (msb_bytes + lsb_bytes) * missing[0] // max(1, missing[1])))
        return kept[0] + msb, kept[1] + min(missing[1], (room - msb * msb_bytes) // lsb_bytes)

    def _foresee(self, row: int, ranked: NDArray[np.int32]) -> None:
        """Plan reads of what verification will need by the (layers, tokens, ranks) routing of layers from ``row`` on; start
        what fits."""
        if self._prefetch:
            self._slices.foresee(row, np.ascontiguousarray(ranked), self._reader.spec.top_k)
