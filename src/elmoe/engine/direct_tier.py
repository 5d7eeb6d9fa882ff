"""The fast tier enforced: expert slices live in a fixed arena and come from disk by asynchronous reads past the page cache.

The mechanism is native (``kernels.slices``): a target pass asks for a layer's missing slices in ascending order of experts,
computes whatever stretch of experts is readable, and lets go of staged slices as it goes; meanwhile reads for later layers,
planned from the draft's natural routing, fill the room that is free. What stays is decided here. What is computed when
depends on the completion of reads, its bits do not.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import ExpertFeed, Routings
from elmoe.engine.decoder import AddressTables, WeightReader
from elmoe.engine.observe import Timeline
from elmoe.engine.statistics import Phase, Statistics
from elmoe.engine.tier import ExpertTier
from elmoe.kernels.reads import ReadPool
from elmoe.kernels.slices import ExpertArena, ExpertSlices, Refill, SlicesFeed
from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import ResidencyParameters, ResidentSet
from elmoe.store.direct import DirectReader

RESERVE = 2
"""Slots of each kind that planned reads leave free, so that demands never wait for a planned slice to be used."""


class DirectTier(ExpertTier):
    """An ``ExpertTier`` over a ``direct`` reader. It holds nothing until :meth:`replan` gives it slots and memory."""

    label = "enforced budget, direct reads"
    enforced = True

    def __init__(
        self,
        reader: DirectReader,
        parameters: ResidencyParameters,
        pool: ReadPool,
        prefetch: bool = True,
    ) -> None:
        super().__init__(reader, parameters)
        self._reader, self._pool, self._prefetch = reader, pool, prefetch
        sizes = list(zip(self._msb_bytes.tolist(), self._lsb_bytes.tolist(), strict=True))
        self._classes = sorted(set(sizes))
        self._class_of_row = np.array([self._classes.index(size) for size in sizes], np.int64)
        self._one_slice = self._lsb_bytes == 0
        files = {entry.layer: entry.file for entry in reader.manifest.layers}
        extents = [[reader.extent(layer, e) for e in range(reader.spec.experts)] for layer in self._layers]
        self._slices = ExpertSlices(
            pool, self._classes, self._class_of_row.tolist(), [files[layer] for layer in self._layers],
            [row[0][0] for row in extents],
            [[offset for _, offset in row] for row in extents], list(self._addresses),
            RESERVE,
        )  # fmt: skip
        self._counted = 0, 0

    def _address_tables(self, reader: WeightReader) -> AddressTables:
        return tuple(np.zeros((reader.spec.experts, 2), np.int64) for _ in reader.spec.moe_layers)

    def feed(self, draft: bool) -> ExpertFeed | None:
        """See ``ExpertSource``: a draft uses what is resident; a target pass's slices come and go."""
        if draft:
            return None
        return SlicesFeed(self._slices, self._begin)  # not kept: a cycle, and the memory would not go

    def note(self, routings: Routings, draft: bool) -> None:
        """See ``ExpertTier.note``; a draft's natural routing tells what verification will need: reads are planned, and those
        that fit are started."""
        super().note(routings, draft)
        if self._prefetch:
            self._slices.foresee(0, np.ascontiguousarray(routings.ranked), self._reader.spec.top_k)

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

    def _begin(self, row: int, experts: NDArray[np.int32]) -> Refill | None:
        """A layer of a target pass is routed: what it needs is demanded, what stays is decided before it is read."""
        self._note(row, experts[None], draft=False)
        msb, lsb = self.resident.msb[row], self.resident.lsb[row]
        if self._slots is None or (msb[experts].all() and (self._one_slice[row] or lsb[experts].all())):
            return None  # what stays changes only by what is read
        scores = self._residency.layer_scores(row, self._sure_routing[row])
        slots = self._slots.msb[row], self._slots.lsb[row]
        return Refill((msb, lsb), scores, slots, self._parameters.hysteresis, self._parameters.swap_cap)

    def end_step(self, phase: Phase, committed: NDArray[np.int32] | None) -> None:
        """Account the pass and learn; residency has changed layer by layer already."""
        self._account(phase, self.resident if phase == "draft" else self.found)
        if phase != "draft":
            self._slices.forget_plans()
            if committed is not None and self._slots is not None:
                self._residency.learn(committed)
                self.allowed = self.resident.msb.astype(np.uint8)
        self._active[:] = False

    def abandon_pass(self) -> None:
        """See ``ExpertTier.abandon_pass``. Reads are waited for; what was to stay, and could not be read, does not."""
        super().abandon_pass()
        self._slices.abandon()
        readable = np.stack(self._addresses) != 0
        msb = self.resident.msb & readable[:, :, 0]
        lsb = self.resident.lsb & msb & (readable[:, :, 1] | self._one_slice[:, None])
        self.resident = ResidentSet(msb, lsb)
        self.allowed = msb.astype(np.uint8)
        for row in range(len(msb)):
            self._slices.keep(row, msb[row], lsb[row])

    @property
    def bytes_read(self) -> int:
        """See ``ExpertTier.bytes_read``."""
        return self._pool.bytes_read()

    @property
    def reading_seconds(self) -> float:
        """See ``ExpertTier.reading_seconds``."""
        return self._pool.busy_seconds()

    @property
    def missed_bytes(self) -> int:
        """See ``ExpertTier.missed_bytes``."""
        return self._statistics.phases["plain"].slow_bytes + self._statistics.phases["verify"].slow_bytes

    def replan(self, slots: SlotPlan | None, capacity: int) -> None:
        """See ``ExpertTier.replan``."""
        super().replan(slots, capacity)
        for row, (msb, lsb) in enumerate(zip(self.resident.msb, self.resident.lsb, strict=True)):
            self._slices.keep(row, msb, lsb)
        kept = [(0, 0)] * len(self._layers) if slots is None else list(zip(slots.msb, slots.lsb, strict=True))
        self._slices.resize(slots_held(capacity, self._classes, self._class_of_row, kept, self._active.shape[1]))


def slots_held(
    capacity: int, classes: list[tuple[int, int]], class_of_row: NDArray[np.int64], kept: list[tuple[int, int]], experts: int
) -> list[tuple[int, int]]:
    """(MSB, LSB) slots of each size class that fit ``capacity`` bytes: those of residents, and room for slices on their way.

    :param classes: (MSB, LSB) bytes of a slice, 0 LSB bytes where an expert is one slice.
    :param class_of_row: (rows,) the size class of each layer's experts. :param kept: (MSB, LSB) residents of each layer.

    Each class gets room for one whole expert and a share of the rest by the bytes that may be missing. Within a class the
    slots of either kind are as many as may be missing, so that no kind waits for memory of the other.
    """
    rows = [np.flatnonzero(class_of_row == index).tolist() for index in range(len(classes))]
    held = [tuple(sum(kept[row][kind] for row in of_class) for kind in (0, 1)) for of_class in rows]
    missing = [
        tuple(len(of_class) * experts - slots if size else 0 for slots, size in zip(one, sizes, strict=True))
        for of_class, one, sizes in zip(rows, held, classes, strict=True)
    ]
    weights = [m * a + x * b for (m, x), (a, b) in zip(missing, classes, strict=True)]
    rest = capacity - sum(map(sum, classes)) - sum(m * a + x * b for (m, x), (a, b) in zip(held, classes, strict=True))
    result = []
    for (msb, lsb), (msb_bytes, lsb_bytes), (msb_missing, lsb_missing), weight in zip(
        held, classes, missing, weights, strict=True
    ):
        room = msb_bytes + lsb_bytes + rest * weight // max(1, sum(weights))
        if lsb_bytes == 0:
            result.append((msb + min(msb_missing, room // msb_bytes), 0))
            continue
        pairs = room // (msb_bytes + lsb_bytes)  # ever fewer MSB slices than LSB slices are missing
        coming = min(msb_missing, max(1, pairs * msb_missing // max(1, lsb_missing)))
        result.append((msb + coming, lsb + min(lsb_missing, (room - coming * msb_bytes) // lsb_bytes)))
    return result
