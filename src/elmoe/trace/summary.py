"""What a trace says in a few numbers: how often drafts agreed, how skewed and how local its routing is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.trace.format import Trace
from elmoe.trace.residents import expert_counts


def summarise(trace: Trace) -> dict[str, Any]:
    """Numbers for people and ``--json``.

    ``acceptance``: share of draft tokens at depth 0 that the target confirmed. ``busiest_over_mean``: tokens of a layer's
    busiest expert over the mean, a mean over layers. ``routing_covered_by``: share of the routing that a layer's most used
    25 and 50 % of experts take. ``reuse``: share of a token's experts that the token before it in its sequence used too;
    ``reuse_if_independent``: what popularity alone would give. All but the first are of computed target rows that stay.
    """
    model = trace.header.model
    phase = trace.column("phase")
    draft, target = trace.column("draft"), trace.column("target")
    names, counts = np.unique(phase, return_counts=True)
    summary: dict[str, Any] = {
        "model": f"{model.family}, {len(model.moe_layers)} MoE layers, top {model.top_k} of {model.experts}",
        "rows": dict(zip(names.tolist(), counts.tolist(), strict=True)),
        "sequences": int(trace.column("sequence").max()) + 1 if len(phase) else 0,
    }
    judged = (phase == "verify") & (draft >= 0) & first_rows(trace)
    summary["acceptance"] = float((draft == target)[judged].mean()) if judged.any() else None
    chosen = committed_experts(trace)
    if not len(chosen):
        return summary
    use = expert_counts(chosen, model.experts)
    ranked = np.sort(use, axis=1)[:, ::-1] / use.sum(axis=1, keepdims=True)
    quarter, half = max(1, model.experts // 4), max(1, model.experts // 2)
    summary["busiest_over_mean"] = float((ranked[:, 0] * model.experts).mean())
    summary["routing_covered_by"] = {
        "25%": float(ranked[:, :quarter].sum(axis=1).mean()), "50%": float(ranked[:, :half].sum(axis=1).mean()),
    }  # fmt: skip
    summary["reuse"] = reuse(trace, chosen)
    summary["reuse_if_independent"] = float(((use / len(chosen)) ** 2).sum(axis=1).mean() / model.top_k)
    return summary


def first_rows(trace: Trace) -> NDArray[np.bool_]:
    """Which rows are the first of their step and sequence: in a target pass, the position after the last committed token."""
    key = trace.draft_keys()
    target = np.isin(trace.column("phase"), ("plain", "verify"))
    rows = np.flatnonzero(target)
    least = np.zeros(len(key), bool)
    least[rows[np.unique(key[rows], return_index=True)[1]]] = True
    return least


def committed_rows(trace: Trace) -> NDArray[np.int64]:
    """Rows of target passes that stay, by (sequence, position): the last computation of each position, prompts included."""
    rows = np.flatnonzero(trace.column("phase") != "draft")
    key = trace.column("sequence")[rows].astype(np.int64) * (1 << 32) + trace.column("position")[rows]
    last = len(rows) - 1 - np.unique(key[::-1], return_index=True)[1]
    return rows[last]


def committed_experts(trace: Trace) -> NDArray[np.uint16]:
    """(tokens, layers, top-k) experts of the rows that stay, ordered by (sequence, position)."""
    return trace.routing()[committed_rows(trace), :, : trace.header.model.top_k]


def reuse(trace: Trace, chosen: NDArray) -> float | None:
    """Share of a token's experts that its predecessor in the sequence used too."""
    rows = committed_rows(trace)
    sequence, position = trace.column("sequence")[rows], trace.column("position")[rows]
    follows = (sequence[1:] == sequence[:-1]) & (position[1:] == position[:-1] + 1)
    if not follows.any():
        return None
    same = (chosen[1:, :, :, None] == chosen[:-1, :, None, :]).any(axis=3)
    return float(same[follows].mean())
