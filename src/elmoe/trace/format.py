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

TRACE_VERSION = 1
METADATA_KEY = b"elmoe"
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


def read_trace(path: str | Path) -> Trace:
    """Read and check a trace; TraceError if it is no trace, from the future, or damaged."""
    try:
        table = pq.read_table(path, memory_map=False)
    except FileNotFoundError:
        raise TraceError(f"there is no trace '{path}'") from None
    except (pa.ArrowException, OSError) as error:
        raise TraceError(f"'{path}' is not a readable Parquet file: {error}", "record it anew") from error
    metadata = (table.schema.metadata or {}).get(METADATA_KEY)
    if FACTS_KEY in (table.schema.metadata or {}):
        raise TraceError(f"'{path}' holds routing facts, this needs a recording", "record one with `elmoe trace record`")
    if metadata is None:
        raise TraceError(f"'{path}' has no elmoe header", "only traces written by elmoe can be read here")
    try:
        header = msgspec.json.decode(metadata, type=TraceHeader)
    except msgspec.DecodeError as error:
        raise TraceError(f"'{path}' has a damaged header: {error}") from error
    if header.version > TRACE_VERSION:
        raise TraceError(f"'{path}' has version {header.version}, this elmoe reads up to {TRACE_VERSION}", "update elmoe")
    expected = table_schema(header)
    if not table.schema.equals(expected):
        raise TraceError(f"'{path}' does not have the columns of a version {header.version} trace")
    trace = Trace(header, table)
    experts = trace.routing()
    if experts.size and int(experts.max()) >= header.model.experts:
        raise TraceError(f"'{path}' names expert {int(np.max(experts))}, the model has {header.model.experts}")
    return trace
