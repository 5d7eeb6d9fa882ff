"""The fast tier of expert slices: what is resident, what a step found there, and the refill after it.

``ExpertTier`` lies over a ``memory`` reader: every byte is readable, so the budget is accounted, not enforced, and results
carry the label ``simulated tier``. ``DirectTier`` (direct_tier.py) enforces it; both take the same decisions from the same
facts, so they count the same hits and bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Routing
from elmoe.engine.observe import Timeline
from elmoe.engine.statistics import Phase, Statistics
from elmoe.errors import NumericsError
from elmoe.models.decoder import Stretch, WeightReader
from elmoe.policy.budget import FastTierSizes, SlotPlan
from elmoe.policy.residency import Residency, ResidencyParameters, ResidentSet, trimmed


class ExpertTier:
    """Residency and accounting; the decoder's source of experts. It lives as long as its engine, so a run finds warm what
    the run before left.

    Holds nothing until :meth:`replan` gives it slots; ``begin_run`` says where a run's counters are. ``everything``: no
    budget, so with slots all slices are resident from the start and nothing is learned.

    Per pass: ``begin_step`` (which token rows are sure to stay), the decoder's ``stretches`` layer by layer, ``end_step``.
    Newcomers are judged by the hotness up to the step before plus the step's sure rows, so that a layer can decide as soon
    as it is routed, before acceptance is known.
    """

    label = "simulated tier: budget accounted, not enforced"

    def __init__(self, reader: WeightReader, parameters: ResidencyParameters, everything: bool = False) -> None:
        schema = reader.schema
        self._layers = schema.moe_layers
        self._rows = {layer: row for row, layer in enumerate(self._layers)}
        layouts = [reader.expert_layout(layer) for layer in schema.moe_layers]
        self._msb_bytes = np.array([layout.msb_bytes for layout in layouts], np.int64)
        self._lsb_bytes = np.array([layout.lsb_bytes for layout in layouts], np.int64)
        shape = (len(layouts), schema.experts)
        self._addresses = self._address_tables(reader)
        self._active = np.zeros(shape, bool)
        self._slots: SlotPlan | None = None
        self._parameters, self._everything = parameters, everything
        self._residency = Residency(*shape, parameters)
        self._statistics = Statistics()
        self._timeline: Timeline | None = None
        self._sure = np.zeros(0, np.int64)
        self._sure_routing: list[NDArray[np.int32]] = []
        self.resident = ResidentSet.empty(*shape)
        self.allowed = np.zeros(shape, np.uint8)

    def _address_tables(self, reader: WeightReader) -> tuple[NDArray[np.int64], ...]:
        return tuple(reader.expert_addresses(layer) for layer in reader.schema.moe_layers)

    @property
    def tables(self) -> tuple[NDArray[np.int64], ...]:
        """See ``ExpertSource``."""
        return self._addresses

    def feed(self, draft: bool) -> Any:
        """See ``ExpertSource``: every expert stays where it is."""
        return None

    def begin_run(self, statistics: Statistics, timeline: Timeline | None = None) -> None:
        """Count into ``statistics`` from now on, and put waits and reads on ``timeline``."""
        self._statistics, self._timeline = statistics, timeline

    def end_run(self) -> None:
        """Nothing is in flight after this."""

    def replan(self, slots: SlotPlan | None, capacity: int) -> None:
        """Between steps: change how many slices may stay (None: none, plain decoding without a cache) and how many bytes
        they and those in flight may take; the coldest go first."""
        self._slots = slots
        none = np.zeros(len(self._layers), np.int64)
        most = (none, none) if slots is None else (np.array(slots.msb), np.array(slots.lsb))
        if self._everything and slots is not None:
            self.resident = ResidentSet(np.ones_like(self._active), np.ones_like(self._active))
        else:
            self.resident = trimmed(self.resident, self._residency.hotness, *most)
        self.allowed = self.resident.msb.astype(np.uint8)

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk since the tier began."""
        return 0

    @property
    def waited(self) -> float:
        """Seconds spent waiting for reads since the tier began."""
        return 0.0

    @property
    def can_draft(self) -> bool:
        """Whether every layer has a resident MSB slice to draft with."""
        return bool(self._slots is not None and self.resident.msb.any(axis=1).all())

    @property
    def learns(self) -> bool:
        """Whether what is resident depends on what is routed."""
        return self._slots is not None and not self._everything

    def begin_step(self, sure: list[int]) -> None:
        """A target pass begins; the token rows ``sure`` stay whatever is accepted."""
        self._sure, self._sure_routing = np.array(sure, np.int64), []

    def stretches(self, layer: int, routing: Routing, draft: bool) -> Iterator[Stretch]:
        """The experts of a layer in ascending stretches as they become readable; what a stretch needed may go after it."""
        row, experts = self._rows[layer], routing.experts
        self._note(row, experts[None], draft)
        yield Stretch(experts, self._addresses[row], whole=True)

    def note(self, ranked: NDArray[np.int32], experts: NDArray[np.int32], draft: bool) -> None:
        """See ``ExpertSource``."""
        self._note(0, experts, draft)

    def _note(self, row: int, experts: NDArray[np.int32], draft: bool) -> None:
        """Remember which experts the layers from ``row`` on used, (layers, tokens, k)."""
        layers = np.arange(row, row + len(experts))[:, None]
        used = experts.reshape(len(experts), -1)
        if draft and not self.allowed[layers, used].all():
            self._statistics.draft_slow_reads += 1
            raise NumericsError("a draft asked for an expert that is not resident")
        self._active[layers, used] = True
        if not draft and self.learns:
            self._sure_routing.extend(experts[:, self._sure])

    def end_step(self, phase: Phase, committed: NDArray[np.int32] | None) -> None:
        """Account the step's active experts; after a target step also refill and learn.

        :param committed: (layers, tokens, k) routing of the tokens that stay, None after a draft step or where nothing
            ``learns`` of it.
        """
        self._account(phase, self.resident)
        if committed is not None and self._slots is not None and not self._everything:
            sure = np.stack(self._sure_routing)
            self.resident = self._residency.end_step(self.resident, sure, committed, self._active, self._slots)
            self.allowed = self.resident.msb.astype(np.uint8)
        self._active[:] = False

    def _account(self, phase: Phase, resident: ResidentSet) -> None:
        """Count hits and bytes of the step against what was resident when it began."""
        counters = self._statistics.phases[phase]
        used = self._active.sum(axis=1)
        holds = self._slots is not None
        slices = [(resident.msb, self._msb_bytes, "msb")] + (
            [(resident.lsb, self._lsb_bytes, "lsb")] if phase != "draft" else []
        )
        for present, sizes, name in slices:
            hits = (self._active & present).sum(axis=1) if holds else np.zeros_like(used)
            misses = used - hits
            setattr(counters, f"{name}_hits", getattr(counters, f"{name}_hits") + int(hits.sum()))
            setattr(counters, f"{name}_misses", getattr(counters, f"{name}_misses") + int(misses.sum()))
            counters.fast_bytes += int(hits @ sizes)
            counters.slow_bytes += int(misses @ sizes)
            counters.layer_hits[name] = counters.layer_hits.get(name, 0) + hits
            counters.layer_misses[name] = counters.layer_misses.get(name, 0) + misses


def tier_sizes(reader: WeightReader, dense_bytes: int, kv_bytes: int, staging_experts: int = 2) -> FastTierSizes:
    """What competes for the fast tier; staging is room for ``staging_experts`` whole experts of the largest layer."""
    schema = reader.schema
    layouts = [reader.expert_layout(layer) for layer in schema.moe_layers]
    msb = tuple(layout.msb_bytes for layout in layouts)
    lsb = tuple(layout.lsb_bytes for layout in layouts)
    staging = staging_experts * max((m + x for m, x in zip(msb, lsb, strict=True)), default=0)
    return FastTierSizes(dense_bytes, kv_bytes, staging, msb, lsb, schema.experts, schema.top_k)
