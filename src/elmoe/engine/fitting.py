"""What fits: the fast tier's bytes, the KV cache's ceiling, and the tier over a reader."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

from elmoe.engine.cache_layout import PAGE_POSITIONS, layout_of
from elmoe.engine.decoder import WeightReader
from elmoe.engine.direct_tier import DirectTier
from elmoe.engine.options import MAX_DRAFT, EngineOptions
from elmoe.engine.request import Request
from elmoe.engine.tier import ExpertTier, tier_sizes
from elmoe.errors import BudgetError
from elmoe.kernels.reads import ReadPool
from elmoe.policy.budget import FastTierSizes, SlotPlan, check_budget, plan_slots, prefill_chunk
from elmoe.store.direct import DirectReader
from elmoe.store.machine import available_memory
from elmoe.units import format_bytes

READ_THREADS = 4
"""Reads in flight: 1 or 2 saturate an NVMe disk with slices of megabytes; small slices want more."""
KV_SHARE = 0.5
"""Largest share of the memory available at load that the KV cache may come to take, where nothing else limits it."""
PREFIX_SHARE = 0.25
"""Share of the KV cache that prefixes may keep where experts are read: what they take, slices lack."""


class StoreReader(WeightReader, Protocol):
    """A weight reader that also tells how many bytes its dense parts take."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything but routed experts."""
        ...


def smallest_budget(reader: StoreReader, positions: int, options: EngineOptions | None = None) -> int:
    """The least fast memory, bytes, with which one sequence of so many positions is served in a mode that drafts."""
    fitting = Fitting(reader, options or EngineOptions())
    return fitting.sizes_beside(fitting.pages(positions) * fitting.page_bytes).minimum


class Fitting:
    """The bytes of a model on a reader under its options.

    ``cache_pages``: ceiling of the KV cache (see ``EngineOptions.kv_memory``), at least one page, so that what does not fit
    is a request, which an error can name. ``prefix_pages``: most of them that the prefix cache keeps.
    """

    def __init__(self, reader: StoreReader, options: EngineOptions) -> None:
        self._reader, self._options, self._spec = reader, options, reader.spec
        self.enforced = isinstance(reader, DirectReader)
        self._layout = layout_of(self._spec)
        self.page_bytes = self._layout.page_bytes
        least = self._layout.stretch_bytes
        if options.kv_memory is not None and options.kv_memory < least:
            raise BudgetError(
                f"kv_memory of {format_bytes(options.kv_memory)} does not hold one page of {PAGE_POSITIONS} positions, "
                f"{format_bytes(least)}",
                f"give at least --kv-memory {-(-least // 1024)}KiB",
            )
        layers = self._spec.moe_layers or self._spec.dense_layers
        widest = max(self._spec.layers[layer].feed_forward.width for layer in layers)
        self.chunk = options.prefill_chunk or prefill_chunk(max(1, self._spec.top_k), widest, reads=self.enforced)
        """Prompt positions of a step."""
        most = options.batch * self.pages(self._spec.max_positions)
        room = options.kv_memory if options.kv_memory is not None else int(KV_SHARE * available_memory())
        if options.kv_memory is None and isinstance(options.fast_memory, int):
            sizes = self.sizes_beside(0)
            room = options.fast_memory - (sizes.fixed if options.mode == "plain" else sizes.minimum)
        if options.prefix_cache and options.kv_memory is not None and not self._layout.windowed:
            most = room // self.page_bytes  # what running sequences cannot use, prefixes can
        self.cache_pages = max(self._layout.groups, min(most, room // self.page_bytes))
        self.prefix_pages = self._prefix_pages()

    def _prefix_pages(self) -> int:
        kept = self._options.prefix_cache
        if self._layout.windowed:
            if kept and kept is not True:
                raise BudgetError(
                    "prefix_cache has a size, and the model's attention has windows: their pages are not kept",
                    "leave it out",
                )
            return 0
        if kept is True:
            return max(1, int(self.cache_pages * (PREFIX_SHARE if self.enforced else 1)))
        if 0 < kept < self.page_bytes:
            raise BudgetError(
                f"prefix_cache of {kept} bytes does not hold one page of the KV cache, {self.page_bytes} bytes",
                f"give at least {-(-self.page_bytes // 1024)}KiB, or 0",
            )
        return min(int(kept) // self.page_bytes, self.cache_pages)

    def pages(self, positions: int) -> int:
        """Most pages that a sequence of so many positions holds."""
        return self._layout.pages(positions, max(self.chunk, MAX_DRAFT + 1))

    def positions(self, request: Request) -> int:
        """Cache positions a request can come to need: all its tokens, and none beyond the context."""
        return min(len(request.prompt) + request.max_tokens, self._spec.max_positions)

    def sizes(self, requests: Items[Request]) -> FastTierSizes:
        """What competes for the fast tier while these requests are served."""
        needs = sorted((self.pages(self.positions(r)) for r in requests for _ in range(r.copies)), reverse=True)
        pages = sum(needs[: self._options.batch]) + self.prefix_pages
        return self.sizes_beside(min(pages, self.cache_pages) * self.page_bytes)

    def sizes_beside(self, kv_bytes: int) -> FastTierSizes:
        """What competes for the fast tier beside a KV cache of so many bytes."""
        return tier_sizes(self._reader, self._reader.dense_bytes, kv_bytes, self._options.staging_experts)

    def budget(self, sizes: FastTierSizes) -> int:
        """The fast tier's bytes."""
        share = 1.0 if self._options.fast_memory is None else self._options.fast_memory
        return sizes.budget_of_share(share) if isinstance(share, float) else share

    def slots(self, sizes: FastTierSizes) -> SlotPlan | None:
        """The slot plan beside these sizes; None in plain mode. Raises BudgetError below the minimum."""
        if self._options.mode == "plain":
            if self.enforced:
                check_budget(self.budget(sizes), sizes, sizes.fixed)
            return None
        return plan_slots(self.budget(sizes), sizes, self._options.fixed_split)

    def make_tier(self) -> ExpertTier:
        """The fast tier: enforced over a ``direct`` reader, accounted over a ``memory`` one. It stays warm. A model without
        experts has nothing to read from a slow tier."""
        options = self._options
        if isinstance(self._reader, DirectReader) and self._spec.moe_layers:
            pool = ReadPool(READ_THREADS)
            pool.set_bandwidth(options.slow_bandwidth or 0.0)
            return DirectTier(self._reader, options.residency, pool, options.prefetch)
        return ExpertTier(self._reader, options.residency, everything=options.fast_memory is None)
