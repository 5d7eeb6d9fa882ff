"""How an engine serves."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import inf
from typing import Literal

from elmoe.errors import RequestError
from elmoe.models.spec import ModelSpec
from elmoe.policy.budget import Split
from elmoe.policy.planner import Mode
from elmoe.policy.residency import ResidencyParameters

MAX_BATCH, MAX_DRAFT = 64, 64


@dataclass(frozen=True)
class EngineOptions:
    """How to serve.

    ``fast_memory``: budget in bytes, a share of the expert bytes (float in 0..1), or None for all of them. ``split``: how
    slices share the budget; ``auto`` is chosen and changed by modelled tokens/s where the tier is enforced, else all MSB
    slices first. ``draft_length``: tokens to draft, None lets the planner choose. ``draft_bits`` 8 is an ablation (expert
    axis alone): it reads LSB slices whether resident or not. ``batch``: sequences served at once. ``kv_memory``: ceiling of
    the KV cache in bytes; None is what ``batch`` sequences of the full context need, where a budget leaves it beside the
    smallest set of slices. ``prefix_cache``: whether the KV cache keeps pages of texts that ended, for prompts that begin
    alike, until their room is needed; bytes are the most that it keeps, True is all of the KV cache, or a quarter of it
    where experts are read. ``prefill_chunk``: prompt positions of one step; None is 256 in memory, up to 1,024 where experts
    are read. ``staging_experts``: experts in flight or waiting to be computed. ``slow_bandwidth``: throttle of
    the slow tier, bytes per second. ``commit_limit``: tokens kept per sequence and step; 1 records a draft from every
    position, for a replay. ``all_ranks``: routings rank every expert, so that a trace tells what a draft runs whatever is
    resident.
    """

    mode: Mode = "elastic"
    fast_memory: int | float | None = None
    split: Split | Literal["auto"] = "auto"
    draft_length: int | None = None
    draft_top_k: int | None = None
    draft_rescale: bool = True
    draft_offset: float = 8.0
    draft_bits: Literal[4, 8] = 4
    batch: int = 1
    kv_memory: int | None = None
    prefix_cache: bool | int = False
    prefill_chunk: int | None = None
    residency: ResidencyParameters = field(default_factory=ResidencyParameters)
    keep_kv_digest: bool = False
    staging_experts: int = 16
    prefetch: bool = True
    slow_bandwidth: float | None = None
    commit_limit: int | None = None
    all_ranks: bool = False

    def checked(self, spec: ModelSpec, enforced: bool) -> EngineOptions:
        """These options for a model: one without experts has no slices to keep or to draft with, and decodes plainly.
        RequestError names an option that is out of range."""
        self.check(spec, enforced)
        return self if spec.moe_layers else replace(self, mode="plain")

    def check(self, spec: ModelSpec, enforced: bool) -> None:
        """RequestError naming an option that is out of range."""
        for name in ("draft_length", "draft_top_k") if not spec.moe_layers else ():
            if getattr(self, name):
                raise RequestError(f"{name} is {getattr(self, name)}, and the model has no experts to draft with")
        if not 1 <= self.batch <= MAX_BATCH:
            raise RequestError(f"batch is {self.batch}, allowed is 1..{MAX_BATCH}")
        if self.draft_length is not None and not 0 <= self.draft_length <= MAX_DRAFT:
            raise RequestError(f"draft_length is {self.draft_length}, allowed is 0..{MAX_DRAFT}")
        if self.draft_top_k is not None and not 1 <= self.draft_top_k <= spec.top_k:
            raise RequestError(f"draft_top_k is {self.draft_top_k}, allowed is 1..{spec.top_k}")
        if self.prefill_chunk is not None and not 1 <= self.prefill_chunk <= 1 << 16:
            raise RequestError(f"prefill_chunk is {self.prefill_chunk}, allowed is 1..65536")
        if self.kv_memory is not None and self.kv_memory < 1:
            raise RequestError(f"kv_memory is {self.kv_memory} bytes", "give an amount such as 1GiB")
        if self.prefix_cache < 0:
            raise RequestError(f"prefix_cache is {self.prefix_cache} bytes", "give an amount such as 1GiB, or 0")
        memory, bandwidth = self.fast_memory, self.slow_bandwidth
        if isinstance(memory, float) and not 0 <= memory <= 1:
            raise RequestError(f"fast_memory is {memory} of the experts", "give a share of 0.0 to 1.0, or bytes")
        if isinstance(memory, int) and memory < 0:
            raise RequestError(f"fast_memory is {memory} bytes", "give an amount such as 4GiB, or a share of 0.0 to 1.0")
        if bandwidth is not None and not 0 < bandwidth < inf:
            raise RequestError(f"slow_bandwidth is {bandwidth} bytes/s", "give a bandwidth such as 1.7GB/s")
        if self.staging_experts < 1:
            raise RequestError(f"staging_experts is {self.staging_experts}", "use at least 1")
        if self.commit_limit is not None and self.commit_limit < 1:
            raise RequestError(f"commit_limit is {self.commit_limit}", "use at least 1")
        if not 0 <= self.draft_offset <= 16:
            raise RequestError(f"draft_offset is {self.draft_offset}, allowed is 0..16")
        if self.draft_bits == 8 and enforced:
            raise RequestError("drafts of 8 bits need every LSB slice in memory", "use --reader memory")

    @property
    def fixed_split(self) -> Split:
        """The split of a budget whose slices are not chosen by rate."""
        return self.split if self.split != "auto" else "msb_first"
