"""Splitting the fast tier's byte budget into dense parts, KV, staging and slots for expert slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from elmoe.errors import BudgetError
from elmoe.units import format_bytes

Split = Literal["msb_first", "whole_experts"]
"""Corners of the slice split: the paper's (all MSB slices before any LSB slice), or what an expert cache does."""

PREFILL_CHUNK, LARGEST_CHUNK, CHUNK_BYTES = 256, 1024, 64 << 20
"""Prompt tokens computed in one pass at least, at most, and the bytes of gate and up activations that allow more."""


@dataclass(frozen=True)
class FastTierSizes:
    """Bytes that compete for the fast tier. ``msb``, ``lsb``: one expert's slices in each MoE layer."""

    dense: int
    kv: int
    staging: int
    msb: tuple[int, ...]
    lsb: tuple[int, ...]
    experts: int
    top_k: int

    @property
    def fixed(self) -> int:
        """Bytes resident whatever the experts."""
        return self.dense + self.kv + self.staging

    @property
    def minimum(self) -> int:
        """The smallest budget: everything fixed and top-k MSB slices in every layer."""
        return self.fixed + self.top_k * sum(self.msb)

    @property
    def all_experts(self) -> int:
        """Both slices of every expert, bytes."""
        return self.experts * (sum(self.msb) + sum(self.lsb))

    def budget_of_share(self, share: float) -> int:
        """The budget that holds ``share`` (0..1) of the expert bytes beside the fixed parts, never below the minimum."""
        return max(self.minimum, self.fixed + int(share * self.all_experts))


@dataclass(frozen=True)
class TierShape:
    """A model as a planner sees it. ``msb``, ``lsb``: bytes of one expert's slices in each MoE layer; an LSB slice has 0
    bytes where a format has one slice. ``dense``: bytes of everything but routed experts."""

    msb: tuple[int, ...]
    lsb: tuple[int, ...]
    experts: int
    top_k: int
    dense: int = 0

    @classmethod
    def of(cls, sizes: FastTierSizes) -> TierShape:
        """The shape behind a budget's sizes."""
        return cls(sizes.msb, sizes.lsb, sizes.experts, sizes.top_k, sizes.dense)

    @property
    def layers(self) -> int:
        """How many layers have routed experts."""
        return len(self.msb)

    @property
    def one_expert(self) -> int:
        """Bytes of one whole expert in every layer."""
        return sum(self.msb) + sum(self.lsb)


@dataclass(frozen=True)
class SlotPlan:
    """How many MSB and LSB slices each MoE layer may keep resident; every LSB slice lies beside its MSB slice."""

    msb: tuple[int, ...]
    lsb: tuple[int, ...]
    bytes: int


def check_budget(budget: int, sizes: FastTierSizes, minimum: int) -> None:
    """BudgetError if the budget is below the minimum, which the message names and takes apart."""
    if budget < minimum:
        less = "" if budget < sizes.dense else ", or shorter prompts, fewer --max-tokens or a smaller --batch"
        slices = f" + top-{sizes.top_k} MSB slices per layer" if minimum > sizes.fixed else ""
        given, needed = format_bytes(budget), format_bytes(minimum)
        if given == needed:  # as rounded
            given, needed = f"{budget:,} bytes", f"{minimum:,} bytes"
        raise BudgetError(
            f"the fast-memory budget of {given} is below the minimum of {needed} "
            f"(dense parts {format_bytes(sizes.dense)} + KV cache {format_bytes(sizes.kv)} + staging "
            f"{format_bytes(sizes.staging)}{slices})",
            f"give at least --fast-memory {-(-minimum // 2**20)}MiB{less}",
        )


def plan_slots(budget: int, sizes: FastTierSizes, split: Split = "msb_first") -> SlotPlan:
    """Divide what the fixed parts leave of ``budget`` bytes evenly over the layers.

    ``msb_first`` gives every layer MSB slices until all have all, then LSB slices. ``whole_experts`` starts from top-k MSB
    slices per layer (a draft's minimum), completes those with their LSB slices, then adds whole experts.

    :raises BudgetError: the budget is below the minimum, which the message names.
    """
    check_budget(budget, sizes, sizes.minimum)
    layers = len(sizes.msb)
    msb = [sizes.top_k] * layers
    lsb = [0] * layers
    left = budget - sizes.minimum

    def fill(slots: list[int], limits: list[int], cost: list[int], paired: list[int] | None = None) -> None:
        """One more slot per layer and round, in layer order, while bytes last; ``paired`` slots grow along."""
        nonlocal left
        progress = True
        while progress:
            progress = False
            for layer in range(layers):
                if slots[layer] < limits[layer] and cost[layer] <= left:
                    slots[layer] += 1
                    left -= cost[layer]
                    if paired is not None:
                        paired[layer] += 1
                    progress = True

    every = [sizes.experts] * layers
    if split == "msb_first":
        fill(msb, every, list(sizes.msb))
        fill(lsb, msb, list(sizes.lsb))
    else:
        fill(lsb, msb.copy(), list(sizes.lsb))
        fill(msb, every, [m + x for m, x in zip(sizes.msb, sizes.lsb, strict=True)], lsb)
    used = sum(m * a + x * b for m, a, x, b in zip(msb, sizes.msb, lsb, sizes.lsb, strict=True))
    return SlotPlan(tuple(msb), tuple(lsb), sizes.fixed + used)


def prefill_chunk(top_k: int, expert_width: int, reads: bool) -> int:
    """Prompt tokens of a pass. ``reads``: from the slow tier; a chunk uses nearly all experts, fewer chunks read less."""
    if not reads:
        return PREFILL_CHUNK
    return min(max(PREFILL_CHUNK, CHUNK_BYTES // (2 * 4 * top_k * expert_width)), LARGEST_CHUNK)
