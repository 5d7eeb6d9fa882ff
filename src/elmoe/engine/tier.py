"""The fast tier of expert slices: what is resident, what a step found there, and the refill after it.

``ExpertTier`` lies over a ``memory`` reader: every byte is readable, so the budget is accounted, not enforced, and results
carry the label ``simulated tier``. ``DirectTier`` (direct_tier.py) enforces it; both take the same decisions from the same
facts, so they count the same hits and bytes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import ExpertFeed, Routings
from elmoe.engine.decoder import AddressTables, WeightReader
from elmoe.engine.observe import Timeline
from elmoe.engine.statistics import Phase, Statistics
from elmoe.policy.budget import FastTierSizes, SlotPlan
from elmoe.policy.residency import Residency, ResidencyParameters, ResidentSet, trimmed

ACCOUNTED_TOGETHER = 256
"""Passes whose accounts wait where nothing depends on them. NumPy's code leaves the cache while weights go through it:
counting each pass took a seventh of a small model's step."""


class ExpertTier:
    """Residency and accounting; the decoder's source of experts. It lives as long as its engine, so a run finds warm what
    the run before left.

    Holds nothing until :meth:`replan` gives it slots; ``begin_run`` says where a run's counters are. ``everything``: no
    budget, so with slots all slices are resident from the start and nothing is learned.

    Per pass: ``begin_step`` (which token rows are sure to stay), the decoder's pass, which ``note``s its routing or takes it
    to a ``feed`` layer by layer, ``end_step``.
    Newcomers are judged by the hotness up to the step before plus the step's sure rows, so that a layer can decide as soon
    as it is routed, before acceptance is known.
    """

    label = "simulated tier: budget accounted, not enforced"
    enforced = False
    """Whether slices that are not resident have to be read."""

    def __init__(self, reader: WeightReader, parameters: ResidencyParameters, everything: bool = False) -> None:
        spec = reader.spec
        self._layers = spec.moe_layers
        layouts = [reader.expert_layout(layer) for layer in spec.moe_layers]
        self._msb_bytes = np.array([layout.msb_bytes for layout in layouts], np.int64)
        self._lsb_bytes = np.array([layout.lsb_bytes for layout in layouts], np.int64)
        shape = (len(layouts), spec.experts)
        self._addresses = self._address_tables(reader)
        self._used = np.zeros((shape[0], shape[1] + 1), bool)  # the last column is marked by expert -1, which is none
        self._active = self._used[:, :-1]
        self._layer_column = np.arange(shape[0])[:, None]
        self._routed: NDArray[np.int32] | None = None  # by all layers of the pass, where nothing learns of it
        self._unaccounted: list[tuple[Phase, NDArray[np.int32]]] = []
        self._slots: SlotPlan | None = None
        self._parameters, self._everything = parameters, everything
        self._residency = Residency(*shape, parameters)
        self._statistics = Statistics()
        self._timeline: Timeline | None = None
        self._sure = np.zeros(0, np.int64)
        self._sure_routing: list[NDArray[np.int32]] = []
        self.resident = self.found = ResidentSet.empty(*shape)
        """What is resident, and what the last target pass of an enforced tier found so."""
        self.allowed = np.zeros(shape, np.uint8)

    def _address_tables(self, reader: WeightReader) -> AddressTables:
        return tuple(reader.expert_addresses(layer) for layer in reader.spec.moe_layers)

    @property
    def tables(self) -> AddressTables:
        """See ``ExpertSource``."""
        return self._addresses

    def feed(self, draft: bool) -> ExpertFeed | None:
        """See ``ExpertSource``: every expert stays where it is."""
        return None

    def begin_run(self, statistics: Statistics, timeline: Timeline | None = None) -> None:
        """Count into ``statistics`` from now on, and put waits and reads on ``timeline``."""
        self._statistics, self._timeline = statistics, timeline

    def end_run(self) -> None:
        """Nothing is in flight after this, and all steps are accounted."""
        self._account_together()

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
    def reading_seconds(self) -> float:
        """Seconds with a read in flight since the tier began."""
        return 0.0

    @property
    def missed_bytes(self) -> int:
        """Bytes of slices that decoding's target passes of this run had to read."""
        return 0

    @property
    def counts(self) -> NDArray[np.float64]:
        """(layers, experts) counts of verified routing."""
        return self._residency.popularity

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
        if self.learns:
            self._sure, self._sure_routing = np.array(sure, np.int64), []

    def note(self, routings: Routings, draft: bool) -> None:
        """See ``ExpertSource``."""
        if self.learns:
            self._note(0, routings.experts, draft)
        else:
            self._routed = routings.experts

    def _note(self, row: int, experts: NDArray[np.int32], draft: bool) -> None:
        """Remember which experts the layers from ``row`` on used, (layers, tokens, k); -1 is none."""
        layers = self._layer_column[row : row + len(experts)]
        used = experts.reshape(len(experts), -1)
        if draft and not self.allowed[layers, used].all() and not (self.allowed[layers, used] | (used < 0)).all():
            self._statistics.draft_slow_reads += 1
            raise AssertionError("a draft asked for an expert that is not resident")
        self._used[layers, used] = True
        if not draft and self.learns:
            self._sure_routing.extend(experts[:, self._sure])

    def end_step(self, phase: Phase, committed: NDArray[np.int32] | None) -> None:
        """Account the step's active experts; after a target step also refill and learn.

        :param committed: (layers, tokens, k) routing of the tokens that stay, None after a draft step or where nothing
            ``learns`` of it.
        """
        if self._routed is not None:
            self._unaccounted.append((phase, self._routed))
            self._routed = None
            if len(self._unaccounted) == ACCOUNTED_TOGETHER:
                self._account_together()
            return
        self._account(phase, self.resident)
        if committed is not None and self._slots is not None and not self._everything:
            sure = np.stack(self._sure_routing)
            self.resident = self._residency.end_step(self.resident, sure, committed, self._active, self._slots)
            self.allowed = self.resident.msb.astype(np.uint8)
        self._active[:] = False

    def abandon_pass(self) -> None:
        """A pass has failed: what it used and had read counts for nothing."""
        self._active[:] = False
        self._routed, self._sure_routing = None, []

    def _account(self, phase: Phase, resident: ResidentSet) -> None:
        """Count hits and bytes of the step against what was resident when it began."""
        used = self._active.sum(axis=1)
        present = [(self._active & slices).sum(axis=1) for slices in (resident.msb, resident.lsb)]
        self._count(phase, used, *([np.zeros_like(used)] * 2 if self._slots is None else present))

    def _account_together(self) -> None:
        """Count what steps used that found all experts resident, or none."""
        for phase in {phase for phase, _ in self._unaccounted}:
            passes = [experts for other, experts in self._unaccounted if other == phase]
            active = np.zeros((len(passes), *self._used.shape), bool)
            for one, experts in zip(active, passes, strict=True):
                one[self._layer_column, experts.reshape(len(experts), -1)] = True
            used = active[:, :, :-1].sum(axis=(0, 2))
            self._count(phase, used, *[np.zeros_like(used) if self._slots is None else used] * 2)
        self._unaccounted.clear()

    def _count(
        self, phase: Phase, used: NDArray[np.int64], msb_hits: NDArray[np.int64], lsb_hits: NDArray[np.int64]
    ) -> None:
        """Add numbers of experts used, and of those whose slices were resident, by layer."""
        counters = self._statistics.phases[phase]
        counters.count("msb", msb_hits, used - msb_hits, self._msb_bytes)
        if phase != "draft":
            counters.count("lsb", lsb_hits, used - lsb_hits, self._lsb_bytes)


def tier_sizes(reader: WeightReader, dense_bytes: int, kv_bytes: int, staging_experts: int = 2) -> FastTierSizes:
    """What competes for the fast tier; staging is room for ``staging_experts`` whole experts of the largest layer, and for
    one of every size at least."""
    spec = reader.spec
    layouts = [reader.expert_layout(layer) for layer in spec.moe_layers]
    msb = tuple(layout.msb_bytes for layout in layouts)
    lsb = tuple(layout.lsb_bytes for layout in layouts)
    sizes = set(zip(msb, lsb, strict=True))
    staging = max(staging_experts * max((m + x for m, x in sizes), default=0), sum(m + x for m, x in sizes))
    return FastTierSizes(dense_bytes, kv_bytes, staging, msb, lsb, spec.experts, spec.top_k)
