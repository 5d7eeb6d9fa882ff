"""Measuring acceptance on an engine: drafts from every position, with more or fewer bits and resident experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import RequestError
from elmoe.llm import Model
from elmoe.trace import TraceRecorder, read_trace
from elmoe.trace.acceptance import AcceptanceRow, acceptance_of_trace

BITS = (4, 8)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of the MSB slices that are resident; 0 stands for the smallest budget, the top-k of every layer."""
DEPTH = 16


def profile_acceptance(
    model: Model,
    requests: list[Request],
    depth: int = DEPTH,
    progress: Callable[[], None] | None = None,
) -> tuple[AcceptanceRow, ...]:
    """One row for each of ``BITS`` x ``SHARES``; the model must lie in memory, its options give the batch.

    A run that is too short to fill a large budget has the residents of a smaller one: of equal rows one is returned.

    :param progress: called after each row.
    :raises RequestError: the store's experts are read from disk.
    """
    if model.reader.kind == "direct":
        raise RequestError("a profile needs every LSB slice in memory", "use a store that fits into memory")
    spec = model.reader.spec
    layouts = [model.reader.expert_layout(layer) for layer in spec.moe_layers]
    msb = sum(layout.msb_bytes for layout in layouts)
    whole = spec.experts * (msb + sum(layout.lsb_bytes for layout in layouts))
    rows: dict[tuple[int, float], AcceptanceRow] = {}
    with TemporaryDirectory() as folder:
        for bits in BITS:
            for share in SHARES:
                budget = 1.0 if share == 1 else (share * spec.experts * msb + (share > 0)) / whole
                row = _measure(model, requests, Path(folder) / "trace", bits, budget, depth)
                rows[bits, row.share] = row
                if progress is not None:
                    progress()
    return tuple(rows.values())


def _measure(model: Model, requests: list[Request], path: Path, bits: Any, budget: float, depth: int) -> AcceptanceRow:
    options: EngineOptions = replace(
        model.engine.options, mode="elastic", split="msb_first", fast_memory=budget, draft_bits=bits, draft_length=depth,
        commit_limit=1,
    )  # fmt: skip
    engine = model.new_engine(options)
    with TraceRecorder(path, model.reader.spec, {"commit_limit": 1}) as recorder:
        engine.generate(requests, recorder)
    return acceptance_of_trace(read_trace(path), bits)
