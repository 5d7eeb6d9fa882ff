"""Rows of a result: one per system, form, model, prompts, batch and acceptance."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from elmoe.hw.machine import Machine
from elmoe.sim.simulate import Priced

AFTERWARDS, AS_IT_RUNS = "best of all, afterwards", "by the planner, as it runs"
"""How the draft length of a row was chosen."""
Positive = Annotated[float, msgspec.Meta(gt=0, le=1e300)]
NotNegative = Annotated[float, msgspec.Meta(ge=0, le=1e300)]


class Shares(TypedDict):
    """A value at each share of static power."""

    low: Positive
    middle: Positive
    high: Positive


class Labels(TypedDict):
    """What a row stands for."""

    system: str
    form: str
    model: str
    prompts: str
    batch: Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
    acceptance: str | None
    rivals: NotRequired[str]
    expert_cache: NotRequired[str]
    rival_drafts: NotRequired[str]


class Row(Labels):
    """What tables and reports take from a row that was simulated."""

    tokens_per_second: Positive
    speedup: Positive
    draft_length: int
    draft_shape: NotRequired[str | None]
    msb_hit_rate: float | None
    busy: dict[str, NotNegative]
    bytes_per_token: dict[str, NotNegative]
    dynamic_joules_per_token: dict[str, NotNegative]
    joules_per_token: Shares
    efficiency: Shares


class LeftOut(Labels):
    """A row that could not be simulated, and why."""

    error: str


def check_row(row: Any) -> None:
    """ValueError names the key of a row, read from a file, that is missing or of another kind."""
    msgspec.convert(row, LeftOut if isinstance(row, dict) and "error" in row else Row)


def row_of(priced: Priced, machine: Machine, labels: dict[str, Any], static_watts: dict[str, float]) -> dict[str, Any]:
    """A row for ``--json``: rates, and where time, energy and bytes go, per committed token.

    ``static_watts``: watts of static power by the label of its share. ``busy``: share of the run in which a resource works.
    """
    whole, tokens, seconds = priced.whole, priced.tokens, priced.seconds
    workload = priced.workload
    draft_seconds = 0.0 if priced.draft is None else float(priced.draft.latency.sum())
    dynamic = {name: float(values.sum()) / tokens for name, values in whole.energy.items()}
    per_token = sum(dynamic.values())
    return labels | {
        "draft_length": workload.draft_passes,
        "choice": AFTERWARDS if workload.drafting is None else AS_IT_RUNS, "drafting_steps": workload.drafting,
        "tokens_per_second": tokens / seconds,
        "draft_shape": priced.shape,
        "tokens_per_step": tokens / workload.steps / float(workload.target.sequences[0]),
        "acceptance_measured": workload.accepted / workload.judged if workload.judged else None,
        "resident_share": workload.resident if machine.hardware.features.expert_cache else None,
        "msb_hit_rate": workload.msb_hit_rate if machine.hardware.features.expert_cache else None,
        "active_experts": float(workload.target.active.mean()),
        "draft_seconds_per_token": draft_seconds / tokens,
        "target_seconds_per_token": (seconds - draft_seconds) / tokens,
        "busy": {name: float(values.sum()) / seconds for name, values in whole.busy.items()},
        "bytes_per_token": {name: float(values.sum()) / tokens for name, values in whole.traffic.items()},
        "dynamic_joules_per_token": dynamic,
        "joules_per_token": {
            share: per_token + watts * seconds / tokens for share, watts in static_watts.items()
        },
    }  # fmt: skip


def static_watts(reference: Priced, low: float, middle: float, high: float) -> dict[str, float]:
    """Static power at which the reference (the bare processor, plain decoding) spends that share of its energy on it."""
    dynamic = float(reference.whole.joules.sum()) / reference.seconds
    return {name: share / (1 - share) * dynamic for name, share in (("low", low), ("middle", middle), ("high", high))}
