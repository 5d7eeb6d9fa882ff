"""The facts of a recorded trace by position, for a replay on a store of other weights.

The trace must hold a draft from every position (``commit_limit`` 1 and a fixed draft length when it was recorded): then
whatever draft lengths the replaying engine chooses, what each draft proposed, where it was routed, how much of it the target
accepted and where the target's rows were routed, rejected ones included, are all recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.trace.format import Trace


@dataclass(frozen=True)
class DraftFacts:
    """Sequences x positions; ``depth`` counts from the position of the last committed token.

    ``tokens`` (sequences, positions) int32 committed ids, -1 behind the end; ``prompts``: tokens of each prompt.
    ``target_tokens`` (sequences, positions, depths + 1): what the target says at depth d of the draft that starts there, -1
    where nothing was drafted; ``draft_tokens``, ``confidences`` (sequences, positions, depths). ``target_routes``,
    ``draft_routes`` (..., layers, ranks) uint16 expert ids by rank, ``target_scores``, ``draft_scores`` (float16) their
    probabilities; prompt positions are routed as depth 0. ``resident``: mean share of MSB slices resident during drafts.
    """

    tokens: NDArray[np.int32]
    prompts: NDArray[np.int32]
    target_tokens: NDArray[np.int32]
    draft_tokens: NDArray[np.int32]
    confidences: NDArray[np.float32]
    target_routes: NDArray[np.uint16]
    target_scores: NDArray[np.float16]
    draft_routes: NDArray[np.uint16]
    draft_scores: NDArray[np.float16]
    experts: int
    resident: float

    @property
    def depths(self) -> int:
        """The longest recorded draft."""
        return self.draft_tokens.shape[2]

    def length(self, sequence: int) -> int:
        """Tokens of a sequence, its prompt included: drafts near its end are as short as the room they had."""
        known = np.flatnonzero(self.target_tokens[sequence, :, 0] >= 0)
        return int(known[-1]) + 2 if len(known) else 0


def draft_facts_of_trace(trace: Trace) -> DraftFacts:
    """Index a trace by (sequence, position, depth); TraceError if it holds no draft from every position."""
    limit = trace.header.run.get("commit_limit")
    if limit != 1:
        raise TraceError(
            f"the trace was recorded with commit_limit {limit}, a replay needs a draft from every position",
            "record it with `elmoe trace record STORE --every-position`",
        )
    phase, sequence = trace.column("phase"), trace.column("sequence")
    position, token, target = trace.column("position"), trace.column("token"), trace.column("target")
    experts, scores = trace.routing("experts"), trace.routing("scores").astype(np.float16)
    drafted, confidence = trace.column("draft"), trace.column("confidence")
    prefill, draft = phase == "prefill", phase == "draft"
    verify = ~prefill & ~draft
    sequences, positions = int(sequence.max()) + 1, int(position.max()) + 1
    start = _starts(trace, verify | draft)
    depth = np.where(prefill, 0, position - start)
    start = np.where(prefill, position, start)
    depths = int(depth[draft].max()) + 1 if draft.any() else 0
    if depths == 0:
        raise TraceError("the trace holds no drafts", "record it with a draft length of 8 or more")
    shape = (sequences, positions)
    committed = np.full(shape, -1, np.int32)
    first = ~draft & (depth == 0)
    committed[sequence[first], position[first]] = token[first]
    prompts = np.zeros(sequences, np.int32)
    np.maximum.at(prompts, sequence[prefill], position[prefill] + 2)
    target_index = (sequence[~draft], start[~draft], depth[~draft])
    draft_index = (sequence[draft], start[draft], depth[draft])

    def table(index: tuple[NDArray, ...], last: int, values: NDArray, missing: int) -> NDArray:
        filled = np.full((*shape, last, *values.shape[1:]), missing, values.dtype)
        filled[index] = values
        return filled

    return DraftFacts(
        tokens=committed,
        prompts=prompts,
        target_tokens=table(target_index, depths + 1, target[~draft].astype(np.int32), -1),
        draft_tokens=table(draft_index, depths, drafted[draft].astype(np.int32), -1),
        confidences=table(draft_index, depths, confidence[draft].astype(np.float32), 0),
        target_routes=table(target_index, depths + 1, experts[~draft], 0),
        target_scores=table(target_index, depths + 1, scores[~draft], 0),
        draft_routes=table(draft_index, depths, experts[draft], 0),
        draft_scores=table(draft_index, depths, scores[draft], 0),
        experts=trace.header.model.experts,
        resident=mean_resident(trace, draft),
    )


def _starts(trace: Trace, rows: NDArray[np.bool_]) -> NDArray[np.int64]:
    """For each of ``rows`` the least position of its draft, where it starts; 0 elsewhere."""
    position = trace.column("position")
    _, draft = np.unique(trace.draft_keys()[rows], return_inverse=True)
    least = np.full(draft.max(initial=-1) + 1, np.iinfo(np.int64).max)
    np.minimum.at(least, draft, position[rows])
    starts = np.zeros(len(rows), np.int64)
    starts[rows] = least[draft]
    return starts


def mean_resident(trace: Trace, rows: NDArray[np.bool_]) -> float:
    """Share of MSB slices that were resident, a mean over the passes of ``rows``."""
    packed = [bits for bits in trace.table.column("resident").filter(rows).to_pylist() if bits is not None]
    return float(np.unpackbits(np.frombuffer(b"".join(packed), np.uint8)).mean())
