"""What an engine run must have counted, predicted from its trace: the engine is the simulator's ground truth.

The trace tells what was computed, and every pass's routing; hits, bytes and the resident sets follow from the policies. The
trace must rank all experts (`elmoe trace record --all-ranks`), for a draft may choose any resident expert.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.policy.budget import FastTierSizes, SlotPlan
from elmoe.policy.residency import ResidencyParameters, ResidentSet
from elmoe.systems.passes import Passes
from elmoe.trace.format import Trace
from elmoe.trace.residents import ReplayedResidents, best_residents, experts_used
from elmoe.trace.summary import first_rows


@dataclass
class Counts:
    """Of one phase: passes, tokens, expert uses by slice and tier, and bytes by tier. ``foreseen``: missed slices to whose
    experts the drafts of the step were routed, so that they may be read ahead. ``named``: slices that were not
    resident and to whose experts they were routed, used or not."""

    passes: int = 0
    tokens: int = 0
    msb_hits: int = 0
    msb_misses: int = 0
    lsb_hits: int = 0
    lsb_misses: int = 0
    fast_bytes: int = 0
    slow_bytes: int = 0
    foreseen: int = 0
    named: int = 0


@dataclass(frozen=True)
class RecordedPass:
    """One pass of a trace: its rows, in the order computed. ``phase``: of all rows, or ``mixed``: prompts among others."""

    phase: str
    step: int
    rows: NDArray[np.int64]


@dataclass
class Prediction:
    """Counts by phase, and every pass in order: its phase and a row of ``Passes`` (attention counts positions from 0)."""

    phases: dict[str, Counts] = field(default_factory=dict)
    passes: list[tuple[str, dict[str, NDArray | float]]] = field(default_factory=list)

    def passes_of(self, *phases: str) -> Passes:
        """The passes of some phases as arrays."""
        rows = [row for phase, row in self.passes if phase in phases]
        return Passes(**{f.name: np.array([row[f.name] for row in rows], np.float64) for f in fields(Passes)})


def predict(
    trace: Trace, slots: SlotPlan | Mapping[int, SlotPlan] | None, sizes: FastTierSizes, parameters: ResidencyParameters
) -> Prediction:
    """Replay a trace from an empty fast tier with these slots (None: plain decoding, nothing is kept).

    :param slots: of the whole run, or those of every step, as a planner that splits by rate chose them.

    :raises TraceError: the trace does not rank all experts, or a draft found too few residents.
    """
    model = trace.header.model
    layers, experts, top_k = len(model.moe_layers), model.experts, model.top_k
    ranked = trace.routing()
    if slots is not None and trace.header.ranks < experts and (trace.column("phase") == "draft").any():
        raise TraceError("the trace does not rank all experts", "record it with --all-ranks")
    first_slots = next(iter(slots.values())) if isinstance(slots, Mapping) else slots
    residents = None if first_slots is None else ReplayedResidents(layers, experts, first_slots, parameters)
    msb, lsb = np.array(sizes.msb), np.array(sizes.lsb)
    kept, first, positions = _kept_rows(trace), first_rows(trace), trace.column("position")
    prompt, sequence = trace.column("phase") == "prefill", trace.column("sequence")
    nothing, prediction = ResidentSet.empty(layers, experts), Prediction()
    named = np.zeros((layers, experts), bool)  # to which the step's drafts were routed
    kinds = np.stack((msb > 0, lsb > 0))[:, :, None]
    for recorded in passes_of(trace):
        rows = recorded.rows
        if residents is not None and isinstance(slots, Mapping):
            residents.resize(slots[recorded.step])
        routed, resident = ranked[rows], nothing if residents is None else residents.resident
        chosen = _masked(routed, resident.msb, top_k) if recorded.phase == "draft" else routed[..., :top_k]
        used = experts_used(chosen, experts)
        counts = prediction.phases.setdefault(recorded.phase, Counts())
        counts.passes += 1
        counts.tokens += len(rows)
        hit_counts = {"msb": (used & resident.msb).sum(axis=1), "lsb": (used & resident.lsb).sum(axis=1)}
        for size, name in ((msb, "msb"), (lsb, "lsb")):
            if name == "lsb" and recorded.phase == "draft":
                continue
            hits = hit_counts[name]
            misses = used.sum(axis=1) - hits
            setattr(counts, f"{name}_hits", getattr(counts, f"{name}_hits") + int(hits.sum()))
            setattr(counts, f"{name}_misses", getattr(counts, f"{name}_misses") + int(misses.sum()))
            counts.fast_bytes += int(hits @ size)
            counts.slow_bytes += int(misses @ size)
        foreseen = np.zeros((2, layers), np.int64)
        if recorded.phase == "draft":
            named |= experts_used(routed[..., :top_k], experts)
        else:
            lacking = named & ~np.stack((resident.msb, resident.lsb)) & kinds
            foreseen = (used & lacking).sum(axis=2)
            counts.foreseen += int(foreseen.sum())
            counts.named += int(lacking.sum())
            named[:] = False
        pairs = np.full(layers, chosen.shape[0] * top_k)
        seen = float(positions[rows].sum() + len(rows))
        prediction.passes.append(
            (
                recorded.phase,
                {
                    "tokens": len(rows), "attended": seen, "cached": seen, "active": used.sum(axis=1), "pairs": pairs,
                    "blocks": pairs, "msb_hits": hit_counts["msb"], "lsb_hits": hit_counts["lsb"], "captured": 0.0,
                    "sequences": len(np.unique(sequence[rows])), "msb_foreseen": foreseen[0], "lsb_foreseen": foreseen[1],
                },
            )
        )  # fmt: skip
        if recorded.phase != "draft" and residents is not None:
            residents.end_pass(chosen[prompt[rows] | first[rows]], chosen[kept[rows]], used)
    return prediction


def passes_of(trace: Trace) -> Iterator[RecordedPass]:
    """The passes of a trace: the first row of each carries the resident set."""
    starts = np.flatnonzero(np.array(trace.table.column("resident").is_valid()))
    phase, step = trace.column("phase"), trace.column("step")
    for start, end in zip(starts, [*starts[1:], trace.table.num_rows], strict=True):
        kinds = set(phase[start:end])
        name = str(phase[start]) if len(kinds) == 1 else "mixed"
        yield RecordedPass(name, int(step[start]), np.arange(start, end))


def _kept_rows(trace: Trace) -> NDArray[np.bool_]:
    """Rows of target passes that stay: prompts, and in a verification all up to the first disagreement or the end."""
    phase, draft, target = trace.column("phase"), trace.column("draft"), trace.column("target")
    sequence, eos = trace.column("sequence"), set(trace.header.model.eos_tokens)
    if trace.header.run.get("ignore_eos") is True:
        eos = set()
    limit = trace.header.run.get("commit_limit")
    kept = phase == "prefill"
    last_step = {int(s): int(step) for s, step in zip(sequence, trace.column("step"), strict=True)}
    for recorded in passes_of(trace):
        if recorded.phase in ("prefill", "draft"):
            continue
        going, count, previous = True, 0, -1
        for row in recorded.rows:
            if phase[row] == "prefill":
                continue
            if sequence[row] != previous:
                going, count, previous = True, 0, sequence[row]
            kept[row] = going
            count += going
            ended = int(target[row]) in eos and last_step[int(sequence[row])] == recorded.step
            going = going and draft[row] == target[row] and count != limit and not ended
    return kept


def _masked(ranked: NDArray, resident: NDArray[np.bool_], top_k: int) -> NDArray:
    """The best residents of (tokens, layers, experts) rankings, as many as the layer with the fewest allows up to top-k."""
    chosen, missing = best_residents(ranked, resident, top_k)
    # A layer with fewer residents than top-k repeats its best one: distinct experts are what counts here.
    return np.where(missing, chosen[..., :1], chosen)
