"""The fast tier of expert slices: what is resident, what a step found there, and the refill after it.

This tier lies over a ``memory`` reader: every byte is readable, so the budget is accounted, not enforced, and results carry
the label ``simulated tier``. Residency changes only at step boundaries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Routing
from elmoe.engine.statistics import Phase, Statistics
from elmoe.errors import NumericsError
from elmoe.models.decoder import WeightReader
from elmoe.policy.budget import FastTierSizes, SlotPlan
from elmoe.policy.residency import ResidencyParameters, ResidentSet, refill, updated_hotness


class ExpertTier:
    """Residency and accounting of one run; an ``ExpertSource`` of the decoder."""

    def __init__(
        self, reader: WeightReader, slots: SlotPlan | None, parameters: ResidencyParameters, statistics: Statistics
    ) -> None:
        """``slots`` None keeps nothing resident (plain decoding without a cache)."""
        schema = reader.schema
        self._rows = {layer: row for row, layer in enumerate(schema.moe_layers)}
        self._addresses = {layer: reader.expert_addresses(layer) for layer in schema.moe_layers}
        layouts = [reader.expert_layout(layer) for layer in schema.moe_layers]
        self._msb_bytes = np.array([layout.msb_bytes for layout in layouts], np.int64)
        self._lsb_bytes = np.array([layout.lsb_bytes for layout in layouts], np.int64)
        shape = (len(layouts), schema.experts)
        self._active = np.zeros(shape, bool)
        self._hotness = np.zeros(shape)
        self._slots = slots
        self._parameters = parameters
        self._statistics = statistics
        self.resident = ResidentSet.empty(*shape)
        self.allowed = np.zeros(shape, np.uint8)

    @property
    def can_draft(self) -> bool:
        """Whether every layer has a resident MSB slice to draft with."""
        return bool(self._slots is not None and self.resident.msb.any(axis=1).all())

    def fetch(self, layer: int, experts: NDArray[np.int32], draft: bool) -> NDArray[np.int64]:
        """Note the layer's active experts and return its address table."""
        row = self._rows[layer]
        if draft and not self.allowed[row][experts].all():
            self._statistics.draft_slow_reads += 1
            raise NumericsError(f"layer {layer}: a draft asked for an expert that is not resident")
        self._active[row, experts] = True
        return self._addresses[layer]

    def end_step(self, phase: Phase, committed: NDArray[np.int32] | None) -> NDArray[np.bool_]:
        """Account the step's active experts; after a target step also learn hotness and refill.

        :param committed: (layers, tokens, k) routing of the tokens that stay, None after a draft step.
        :returns: the (layers, experts) active set, valid until the next fetch.
        """
        active, counters = self._active, self._statistics.phases[phase]
        msb_hits = (active & self.resident.msb).sum(axis=1)
        used = active.sum(axis=1)
        counters.msb_hits += int(msb_hits.sum())
        counters.msb_misses += int((used - msb_hits).sum())
        counters.fast_bytes += int(msb_hits @ self._msb_bytes)
        counters.slow_bytes += int((used - msb_hits) @ self._msb_bytes)
        if phase != "draft":
            lsb_hits = (active & self.resident.lsb).sum(axis=1)
            counters.lsb_hits += int(lsb_hits.sum())
            counters.lsb_misses += int((used - lsb_hits).sum())
            counters.fast_bytes += int(lsb_hits @ self._lsb_bytes)
            counters.slow_bytes += int((used - lsb_hits) @ self._lsb_bytes)
        if committed is not None and self._slots is not None:
            self._hotness = updated_hotness(self._hotness, committed, self._parameters)
            self.resident = refill(self.resident, self._hotness, active, self._slots, self._parameters)
            self.allowed = self.resident.msb.astype(np.uint8)
        self._active = np.zeros_like(active)
        return active


def tier_sizes(reader: WeightReader, dense_bytes: int, kv_bytes: int) -> FastTierSizes:
    """What competes for the fast tier; staging is two whole experts of the largest layer (one read, one computed)."""
    schema = reader.schema
    layouts = [reader.expert_layout(layer) for layer in schema.moe_layers]
    msb = tuple(layout.msb_bytes for layout in layouts)
    lsb = tuple(layout.lsb_bytes for layout in layouts)
    staging = 2 * max((m + x for m, x in zip(msb, lsb, strict=True)), default=0)
    return FastTierSizes(dense_bytes, kv_bytes, staging, msb, lsb, schema.experts, schema.top_k)


def committed_routing(routings: list[Routing], rows: list[int]) -> NDArray[np.int32]:
    """(layers, rows, k) experts of the chosen token rows."""
    return np.stack([routing.experts[rows] for routing in routings]) if routings else np.zeros((0, len(rows), 0), np.int32)
