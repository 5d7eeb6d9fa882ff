"""How often a draft token is what the target says, by the draft's bits, what is resident, depth and confidence."""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.trace.draft_facts import mean_resident
from elmoe.trace.format import Trace
from elmoe.trace.locality import read_json, write_json
from elmoe.untrusted import decode_json

ACCEPTANCE_VERSION = 1
CONFIDENCE_EDGES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
ENOUGH = 20
"""Judged tokens below which a cell gives way to a wider pool."""
MAX_DEPTHS = 64
PRESETS = Path(__file__).resolve().parent.parent / "presets" / "acceptance"


class AcceptanceRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Counts of drafts of ``bits`` bits with the ``share`` (0..1) of MSB slices resident.

    ``judged``, ``accepted``: one row per depth (1, 2, ...), one column per confidence bucket: draft tokens all of whose
    predecessors in the draft were accepted, and how many of these were accepted themselves.
    """

    bits: int
    share: float
    judged: tuple[tuple[int, ...], ...]
    accepted: tuple[tuple[int, ...], ...]


class AcceptanceTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Acceptance, ``measured`` on an engine or ``assumed`` to be one ``constant``.

    ``edges``: the n + 1 bounds of n confidence buckets, ascending from 0 to 1; a bound belongs to the bucket above it.

    :raises TraceError: the numbers do not form a table.
    """

    status: Literal["measured", "assumed"]
    source: str
    version: int = ACCEPTANCE_VERSION
    constant: float | None = None
    edges: tuple[float, ...] = CONFIDENCE_EDGES
    rows: tuple[AcceptanceRow, ...] = ()

    def __post_init__(self) -> None:
        if (self.constant is None) != bool(self.rows):
            raise TraceError("a table has either a constant or rows")
        if self.constant is not None and not 0 <= self.constant <= 1:
            raise TraceError(f"constant is {self.constant}, allowed is 0..1")
        if self.status == "measured" and not self.rows:
            raise TraceError("a constant is assumed, not measured")
        edges = self.edges
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != 1 or any(a >= b for a, b in pairwise(edges)):
            raise TraceError("edges must ascend from 0 to 1")
        for row in self.rows:
            _check_row(row, len(edges) - 1)
        if len({(row.bits, row.share) for row in self.rows}) < len(self.rows):
            raise TraceError("two rows have the same bits and share")

    @classmethod
    def constant_of(cls, probability: float, source: str) -> AcceptanceTable:
        """An assumed table: the same probability wherever it is asked."""
        return cls(status="assumed", source=source, constant=probability)

    def probability(self, bits: int, share: float, depth: int, confidence: float | None = None) -> float:
        """Chance that the draft token at ``depth`` (from 1) is accepted where those before it were.

        Linear in the ``share`` of resident MSB slices between measured ones, the nearest outside; depths beyond the measured
        count as the last. Where fewer than ``ENOUGH`` tokens were judged, all confidences of the depth, or all depths of the
        confidence, stand in, then everything.

        :raises TraceError: nothing was measured with these bits, or an argument is out of range.
        """
        if depth < 1 or not 0 <= share <= 1 or not 0 <= (confidence or 0) <= 1:
            raise TraceError(f"depth {depth}, share {share}, confidence {confidence} cannot be")
        if self.constant is not None:
            return self.constant
        rows = sorted((row for row in self.rows if row.bits == bits), key=lambda row: row.share)
        if not rows:
            known = sorted({row.bits for row in self.rows})
            raise TraceError(f"drafts of {bits} bits were not measured", f"measured are {known}")
        bucket = None if confidence is None else min(bisect_right(self.edges, confidence), len(self.edges) - 1) - 1
        chances = [_chance(row, depth, bucket) for row in rows]
        return float(np.interp(share, [row.share for row in rows], chances))


def acceptance_of_trace(trace: Trace, bits: int) -> AcceptanceRow:
    """Count a recording with a draft from every position (``commit_limit`` 1); ``bits``: what its drafts read.

    :raises TraceError: it was recorded otherwise, or nothing was drafted.
    """
    if trace.header.run.get("commit_limit") != 1:
        raise TraceError("the recording has no draft from every position", "record it with --every-position")
    rows = np.flatnonzero((trace.column("phase") == "verify") & (trace.column("draft") >= 0))
    if not len(rows):
        raise TraceError("the recording holds no verified draft", "record it with a draft length of 1 or more")
    _, first, draft = np.unique(trace.draft_keys()[rows], return_index=True, return_inverse=True)
    position = trace.column("position")[rows]
    depth = position - position[first][draft]
    agree = np.zeros((len(first), int(depth.max()) + 1), bool)
    agree[draft, depth] = (trace.column("draft") == trace.column("target"))[rows]
    reached = np.ones_like(agree)
    reached[:, 1:] = np.logical_and.accumulate(agree, axis=1)[:, :-1]
    judged = reached[draft, depth]
    confidence = trace.column("confidence")[rows]
    bucket = np.clip(np.searchsorted(CONFIDENCE_EDGES, confidence, "right") - 1, 0, len(CONFIDENCE_EDGES) - 2)

    def counts(of: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
        table = np.zeros((agree.shape[1], len(CONFIDENCE_EDGES) - 1), np.int64)
        np.add.at(table, (depth[of], bucket[of]), 1)
        return tuple(tuple(line) for line in table.tolist())

    share = round(mean_resident(trace, trace.column("phase") == "draft"), 4)
    return AcceptanceRow(bits=bits, share=share, judged=counts(judged), accepted=counts(judged & agree[draft, depth]))


def save_acceptance(table: AcceptanceTable, path: str | Path) -> None:
    """Write JSON, one line per depth; TraceError if it cannot be written."""
    data = msgspec.json.encode(table)
    for opening in (b"{", b"["):
        data = data.replace(b"," + opening, b",\n" + opening)
    write_json(path, data)


def load_acceptance(name_or_path: str | Path) -> AcceptanceTable:
    """A file of ``elmoe trace profile``, or a preset by its name: ``demo``.

    :raises TraceError: there is none, or it is no acceptance table.
    """
    path, raw = read_json(name_or_path, PRESETS, "acceptance table", "write one with `elmoe trace profile`")
    hint = "write it anew with `elmoe trace profile`"
    table = decode_json(raw, str(path), AcceptanceTable, TraceError, "no acceptance table", hint)
    if not 1 <= table.version <= ACCEPTANCE_VERSION:
        raise TraceError(
            f"'{path}' has version {table.version}, this elmoe reads up to {ACCEPTANCE_VERSION}", "update elmoe"
        )
    return table


def _check_row(row: AcceptanceRow, buckets: int) -> None:
    where = f"row of {row.bits} bits, share {row.share}"
    if not 1 <= row.bits <= 16 or not 0 <= row.share <= 1:
        raise TraceError(f"{where}: bits must lie in 1..16, share in 0..1")
    if not 1 <= len(row.judged) == len(row.accepted) <= MAX_DEPTHS:
        raise TraceError(f"{where}: judged and accepted must have one list for each of 1..{MAX_DEPTHS} depths")
    for depth, (judged, accepted) in enumerate(zip(row.judged, row.accepted, strict=True), 1):
        if len(judged) != buckets or len(accepted) != buckets:
            raise TraceError(f"{where}, depth {depth}: there are {buckets} confidence buckets")
        if any(not 0 <= few <= many < 1 << 53 for few, many in zip(accepted, judged, strict=True)):
            raise TraceError(f"{where}, depth {depth}: accepted must lie in 0..judged")
    if not sum(map(sum, row.judged)):
        raise TraceError(f"{where}: nothing was judged")


def _chance(row: AcceptanceRow, depth: int, bucket: int | None) -> float:
    """Of the narrowest pool with enough judged tokens."""
    counts = np.array([row.judged, row.accepted])
    level = min(depth, counts.shape[1]) - 1
    narrow = [] if bucket is None else [counts[:, level, bucket], counts[:, :, bucket].sum(axis=1)]
    everything = counts.sum(axis=(1, 2))
    for judged, accepted in (*narrow, counts[:, level].sum(axis=1)):
        if judged >= ENOUGH:
            return float(accepted / judged)
    return float(everything[1] / everything[0])
