"""The trace file: one Parquet table, one row per computed position, rejected ones included.

=================  ==========================  =====================================================================
column             type                        meaning
=================  ==========================  =====================================================================
step               int32                       engine step
phase              dictionary of string        ``prefill``, ``plain``, ``draft`` or ``verify``
sequence           int32                       index of the request
position           int32                       absolute position of the token that was computed
token              int32                       its id
target             int32 or null               the target's token for the next position (null in prefill and draft rows)
draft              int32 or null               the draft's token for the next position
confidence         float32 or null             the draft's probability of it
draft_length       int32                       condition: tokens drafted for this sequence in this step
experts            fixed list of uint16        router ids by rank, (layers x ranks), unmasked
scores             fixed list of float32       their probabilities
resident           binary or null              condition, on the first row of a pass: resident MSB slices, one bit per
                                               (layer, expert), packed as ``numpy.packbits``
=================  ==========================  =====================================================================

The file's metadata key ``elmoe`` holds JSON: ``version``, ``model`` (a ``TracedModel``), ``ranks`` (2 top-k, or all experts)
and free-form ``run``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.models.spec import ModelSpec
from elmoe.untrusted import decode_json, short

TRACE_VERSION = 1
METADATA_KEY = b"elmoe"
PHASES = ("prefill", "plain", "draft", "verify")
MAX_TRACE_IDS = 1 << 31
"""Most router ids of a trace: 12 GB with their scores."""
FACTS_KEY = b"elmoe_facts"
"""Of the other kind of file, ``elmoe.trace.facts``."""


class TracedModel(msgspec.Struct, frozen=True, kw_only=True):
    """The facts about a model that a trace depends on: its vocabulary, its layers and which of them are dense, its routed
    experts, and the tokens that end a sequence."""

    family: str
    vocabulary: int
    layers: int
    experts: int
    top_k: int
    dense_layers: tuple[int, ...] = ()
    eos_tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, spec: ModelSpec) -> TracedModel:
        """The facts of a spec."""
        return cls(
            family=spec.family, vocabulary=spec.vocabulary, layers=len(spec.layers), experts=spec.experts, top_k=spec.top_k,
            dense_layers=spec.dense_layers, eos_tokens=spec.eos_tokens,
        )  # fmt: skip

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        dense = set(self.dense_layers)
        return tuple(layer for layer in range(self.layers) if layer not in dense)


class TraceHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What the metadata of a trace holds; ``ranks``: router ids recorded per layer."""

    version: int
    model: TracedModel
    ranks: int
    run: dict[str, Any] = {}


def table_schema(header: TraceHeader) -> pa.Schema:
    """The Arrow schema of a trace with this header."""
    width = len(header.model.moe_layers) * header.ranks
    return pa.schema(
        [
            pa.field("step", pa.int32()),
            pa.field("phase", pa.dictionary(pa.int8(), pa.string())),
            pa.field("sequence", pa.int32()),
            pa.field("position", pa.int32()),
            pa.field("token", pa.int32()),
            pa.field("target", pa.int32()),
            pa.field("draft", pa.int32()),
            pa.field("confidence", pa.float32()),
            pa.field("draft_length", pa.int32()),
            pa.field("experts", pa.list_(pa.uint16(), width)),
            pa.field("scores", pa.list_(pa.float32(), width)),
            pa.field("resident", pa.binary()),
        ],
        metadata={METADATA_KEY: msgspec.json.encode(header)},
    )


@dataclass(frozen=True)
class Trace:
    """A trace in memory: the header and the columns as a table."""

    header: TraceHeader
    table: pa.Table

    def column(self, name: str) -> NDArray:
        """A scalar column as NumPy; nulls become NaN (float) or -1 (integer)."""
        column = self.table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(pa.string())
        elif pa.types.is_integer(column.type):
            column = column.fill_null(-1)
        return column.to_numpy()

    def draft_keys(self) -> NDArray[np.int64]:
        """One number per row, the same for rows of the same step and sequence: a draft and its verification."""
        return self.column("step").astype(np.int64) * (1 << 32) + self.column("sequence")

    def routing(self, name: str = "experts") -> NDArray:
        """``experts`` or ``scores`` as (rows, layers, ranks)."""
        flat = self.table.column(name).combine_chunks().flatten().to_numpy()
        return flat.reshape(self.table.num_rows, len(self.header.model.moe_layers), self.header.ranks)


@contextmanager
def open_parquet(path: str | Path) -> Iterator[pq.ParquetFile]:
    """A Parquet file to read from; what fails in the block because the file is damaged is a TraceError."""
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except FileNotFoundError:
        raise TraceError(f"there is no trace '{path}'") from None
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        MemoryError,
    ) as error:  # ValueError: names that are no text
        raise TraceError(f"'{path}' is not a readable Parquet file: {short(error)}", "record it anew") from error


def read_trace(path: str | Path) -> Trace:
    """Read and check a trace; TraceError if it is no trace, from the future, or damaged."""
    with open_parquet(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        header = _checked_header(path, schema)
        width = len(header.model.moe_layers) * header.ranks
        if rows * max(1, width) > MAX_TRACE_IDS:
            raise TraceError(f"'{path}' holds {rows} rows of {width} ids, more than {MAX_TRACE_IDS} ids", "record less")
        table = file.read()
    trace = Trace(header, table)
    try:
        _check_rows(trace)
    except TraceError as error:
        raise TraceError(f"'{path}' {error}", "the file is damaged: record it anew") from None
    except pa.ArrowException as error:  # an index beyond its dictionary, say, which reading alone does not notice
        raise TraceError(f"'{path}' holds values that contradict each other: {short(error)}", "record it anew") from error
    return trace


def _checked_header(path: str | Path, schema: pa.Schema) -> TraceHeader:
    """The header of a trace, its numbers within bounds and its columns as they say."""
    metadata = (schema.metadata or {}).get(METADATA_KEY)
    if FACTS_KEY in (schema.metadata or {}):
        raise TraceError(f"'{path}' holds routing facts, this needs a recording", "record one with `elmoe trace record`")
    if metadata is None:
        raise TraceError(f"'{path}' has no elmoe header", "only traces written by elmoe can be read here")
    header = decode_json(metadata, str(path), TraceHeader, TraceError, "no trace: it has a damaged header")
    if header.version > TRACE_VERSION:
        raise TraceError(f"'{path}' has version {header.version}, this elmoe reads up to {TRACE_VERSION}", "update elmoe")
    model = header.model
    for name, value, most in (
        ("layers", model.layers, 1 << 12), ("experts", model.experts, 1 << 16), ("top_k", model.top_k, model.experts),
        ("ranks", header.ranks, model.experts), ("vocabulary", model.vocabulary, 1 << 24),
        ("dense layers", len(model.dense_layers), model.layers),
    ):  # fmt: skip
        if not 0 <= value <= most:
            raise TraceError(f"'{path}' has a damaged header: {name} is {value}, allowed are 0 to {most}")
    if not schema.equals(table_schema(header)):
        raise TraceError(f"'{path}' does not have the columns of a version {header.version} trace")
    return header


def _check_rows(trace: Trace) -> None:
    """TraceError where a number of a row is out of bounds, or missing."""
    rows, model = trace.table.num_rows, trace.header.model
    for name, most in (
        ("step", 1 << 31), ("sequence", rows), ("position", 1 << 24), ("token", 1 << 31), ("draft_length", 1 << 16),
    ):  # fmt: skip
        values = trace.column(name)
        if rows and not (int(values.min()) >= 0 and int(values.max()) < most):
            raise TraceError(f"has a {name} outside 0 to {most - 1}")
    for name in ("experts", "scores"):
        column = trace.table.column(name)
        if column.null_count or any(chunk.flatten().null_count for chunk in column.chunks):
            raise TraceError(f"lacks {name}")
    experts = trace.routing()
    if experts.size and int(experts.max()) >= model.experts:
        raise TraceError(f"names expert {int(experts.max())}, the model has {model.experts}")
    if not set(trace.table.column("phase").cast(pa.string()).unique().to_pylist()) <= set(PHASES):
        raise TraceError(f"has a phase that is none of {', '.join(PHASES)}")
    packed = (len(model.moe_layers) * model.experts + 7) // 8
    lengths = {len(value) for value in trace.table.column("resident").drop_null().to_pylist()}
    if not lengths <= {packed}:
        raise TraceError(f"has resident sets that are not of {packed} bytes")
