"""Routing facts: what a hardware simulator replays, from a recording, an import or a synthesiser, in one shape and one file.

The file is a Parquet table of one row per (sequence, position): ``sequence`` and ``position`` (int32) and ``experts``, a
fixed list of uint16 ids by rank (layers x ranks). The metadata key ``elmoe_facts`` holds JSON: a ``FactsHeader``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.files import whole_file
from elmoe.trace.format import FACTS_KEY, METADATA_KEY, Trace, open_parquet, read_trace
from elmoe.trace.summary import committed_rows
from elmoe.untrusted import decode_json, load_object

FACTS_VERSION = 1
MAX_IDS = 1 << 30
"""Expert ids one file may hold: 2 GiB in memory."""
MAX_EXPERTS = 1 << 16


@dataclass(frozen=True, eq=False)
class RoutingFacts:
    """Which experts each computed position of each sequence was routed to.

    ``ranked`` (sequences, positions, layers, ranks) uint16: expert ids, best first, of the MoE layers in order; zeros behind
    a sequence's end. ``prompts`` (sequences,) int32: prompt tokens, at least 1; position ``prompts - 1`` is the first that
    decoding computes. ``lengths`` (sequences,) int32: positions computed. ``experts``, ``top_k``: the model's. ``source``: a
    label such as ``recorded: ...``, ``imported: ...`` or ``synthetic: ...``.

    :raises TraceError: shapes do not agree, an id is out of range, or a ranking names an expert twice.
    """

    ranked: NDArray[np.uint16]
    prompts: NDArray[np.int32]
    lengths: NDArray[np.int32]
    experts: int
    top_k: int
    source: str

    def __post_init__(self) -> None:
        if self.ranked.ndim != 4 or self.ranked.dtype != np.uint16 or 0 in self.ranked.shape:
            raise TraceError(
                f"ranked is {self.ranked.dtype} {self.ranked.shape}, not uint16 (sequences, positions, layers, ranks)"
            )
        sequences, positions, _, ranks = self.ranked.shape
        if not 1 <= self.top_k <= ranks <= self.experts <= MAX_EXPERTS:
            raise TraceError(f"top {self.top_k} of {ranks} ranks of {self.experts} experts cannot be")
        for name, counts, least, most in (
            ("lengths", self.lengths, 1, positions),
            ("prompts", self.prompts, 1, positions + 1),
        ):
            if counts.shape != (sequences,) or counts.dtype != np.int32 or counts.min() < least or counts.max() > most:
                raise TraceError(f"{name} must be {sequences} int32 counts in {least}..{most}")
        for sequence, length in enumerate(self.lengths.tolist()):
            ordered = np.sort(self.ranked[sequence, :length], axis=-1)
            if int(ordered[..., -1].max()) >= self.experts:
                raise TraceError(f"expert {int(ordered.max())} is named, the model has {self.experts}")
            if (ordered[..., 1:] == ordered[..., :-1]).any():
                raise TraceError(f"sequence {sequence}: a token's ranking names an expert twice")

    @property
    def chosen(self) -> NDArray[np.uint16]:
        """(sequences, positions, layers, top_k): the experts the target ran, best first."""
        return self.ranked[..., : self.top_k]

    @property
    def computed(self) -> NDArray[np.bool_]:
        """(sequences, positions): which positions hold facts."""
        return np.arange(self.ranked.shape[1]) < self.lengths[:, None]

    def decoding(self) -> RoutingFacts:
        """The same facts without the prompts' positions but the last: step n of every sequence at position n.

        :raises TraceError: a sequence ends before its prompt does.
        """
        first = self.prompts - 1
        lengths = self.lengths - first
        if lengths.min() < 1:
            raise TraceError("a sequence holds no decoded position", "record more tokens")
        ranked = np.zeros((len(first), int(lengths.max()), *self.ranked.shape[2:]), np.uint16)
        for sequence, (start, length) in enumerate(zip(first.tolist(), lengths.tolist(), strict=True)):
            ranked[sequence, :length] = self.ranked[sequence, start : start + length]
        return RoutingFacts(ranked, np.ones_like(first), lengths, self.experts, self.top_k, self.source)


class FactsHeader(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the metadata of a facts file holds."""

    version: int
    layers: int
    ranks: int
    experts: int
    top_k: int
    source: str
    prompts: tuple[int, ...]
    lengths: tuple[int, ...]


def check_sequences(held: int, batch: int) -> None:
    """TraceError if so many sequences make no batch of this size."""
    if batch > held:
        raise TraceError(
            f"the routing has {held} sequences, the batch is {batch}", "use a smaller batch, or --trace with more sequences"
        )


def facts_of_trace(trace: Trace) -> RoutingFacts:
    """The rows of a recording that stay, prompts included; shorter sequences are padded.

    :raises TraceError: a sequence or a position between others is missing.
    """
    rows = committed_rows(trace)
    if not len(rows):
        raise TraceError("the recording holds no computed position", "record at least one token")
    model = trace.header.model
    sequence, position = trace.column("sequence")[rows], trace.column("position")[rows]
    lengths = np.bincount(sequence).astype(np.int32)
    starts = np.cumsum(lengths) - lengths
    if lengths.min() < 1 or not np.array_equal(position, np.arange(len(rows)) - starts[sequence]):
        raise TraceError("the recording lacks a sequence, or a position before others of its sequence", "record it anew")
    layers, ranks = len(model.moe_layers), trace.header.ranks
    _check_size(len(lengths) * int(lengths.max()) * layers * ranks)
    ranked = np.zeros((len(lengths), int(lengths.max()), layers, ranks), np.uint16)
    ranked[sequence, position] = trace.routing()[rows]
    prompts = np.ones(len(lengths), np.int32)
    prefill = trace.column("phase") == "prefill"
    np.maximum.at(prompts, trace.column("sequence")[prefill], trace.column("position")[prefill].astype(np.int32) + 2)
    run = trace.header.run
    told = ", ".join(f"{key} {run[key]}" for key in ("store", "prompts", "temperature", "seed") if key in run)
    source = f"recorded: {model.family}, {layers} layers, top {model.top_k} of {model.experts}"
    source += f"; {told}" if told else ""
    return RoutingFacts(ranked, prompts, lengths, model.experts, model.top_k, source)


def write_facts(facts: RoutingFacts, path: str | Path) -> None:
    """Write a facts file; it appears when it is whole. TraceError if it cannot be written."""
    _, _, layers, ranks = facts.ranked.shape
    header = FactsHeader(
        version=FACTS_VERSION, layers=layers, ranks=ranks, experts=facts.experts, top_k=facts.top_k, source=facts.source,
        prompts=tuple(facts.prompts.tolist()), lengths=tuple(facts.lengths.tolist()),
    )  # fmt: skip
    sequence, position = np.nonzero(facts.computed)
    flat = pa.array(facts.ranked[sequence, position].reshape(-1), pa.uint16())
    columns = [
        pa.array(sequence.astype(np.int32)),
        pa.array(position.astype(np.int32)),
        pa.FixedSizeListArray.from_arrays(flat, layers * ranks),
    ]
    with whole_file(path, TraceError) as partial:
        pq.write_table(pa.Table.from_arrays(columns, schema=_table_schema(header)), partial, compression="zstd")


def read_facts(path: str | Path) -> RoutingFacts:
    """Read a facts file, or the facts of a recording.

    :raises TraceError: it is neither, from the future, damaged, or too large.
    """
    with open_parquet(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
        metadata = (schema.metadata or {}).get(FACTS_KEY)
        if metadata is not None:
            header = _header(path, metadata)
            _check_size(max(rows, len(header.lengths) * max(header.lengths)) * header.layers * header.ranks)
            if not schema.equals(_table_schema(header)):
                raise TraceError(f"'{path}' does not have the columns of a version {header.version} facts file")
            table = file.read()
        elif (schema.metadata or {}).get(METADATA_KEY) is not None and "experts" in schema.names:
            _check_size(rows * int(getattr(schema.field("experts").type, "list_size", 1)))
    if metadata is None:
        return facts_of_trace(read_trace(path))
    try:
        return _facts_of_table(header, table)
    except TraceError as error:
        raise TraceError(f"'{path}': {error}", "the file is damaged: write it anew") from error


def _header(path: str | Path, metadata: bytes) -> FactsHeader:
    version = load_object(metadata, f"{path}: header", TraceError).get("version")
    if isinstance(version, int) and version > FACTS_VERSION:
        raise TraceError(f"'{path}' has version {version}, this elmoe reads up to {FACTS_VERSION}", "update elmoe")
    header = decode_json(metadata, str(path), FactsHeader, TraceError, "no facts file: it has a damaged header")
    if not header.lengths or min(*header.lengths, header.layers, header.ranks) < 1:
        raise TraceError(f"'{path}' has a damaged header: it holds no sequence, layer or rank")
    return header


def _facts_of_table(header: FactsHeader, table: pa.Table) -> RoutingFacts:
    lengths, prompts = _counts(header.lengths), _counts(header.prompts)
    if table.num_rows != sum(header.lengths):
        raise TraceError("the rows are not those that the header promises")
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(sequence)) - (np.cumsum(lengths) - lengths)[sequence]
    same = all(
        np.array_equal(table.column(name).to_numpy(), values)
        for name, values in (("sequence", sequence), ("position", position))
    )
    if not same:
        raise TraceError("the rows are not those that the header promises")
    ranked = np.zeros((len(lengths), int(lengths.max()), header.layers, header.ranks), np.uint16)
    flat = table.column("experts").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    if flat.dtype != np.uint16 or flat.size != len(sequence) * header.layers * header.ranks:
        raise TraceError("the experts have missing values")
    ranked[sequence, position] = flat.reshape(len(sequence), header.layers, header.ranks)
    return RoutingFacts(ranked, prompts, lengths, header.experts, header.top_k, header.source)


def _counts(values: tuple[int, ...]) -> NDArray[np.int32]:
    if max(values, default=0) > np.iinfo(np.int32).max or min(values, default=0) < 0:
        raise TraceError("a count in the header is out of range")
    return np.array(values, np.int32)


def _table_schema(header: FactsHeader) -> pa.Schema:
    return pa.schema(
        [
            pa.field("sequence", pa.int32()),
            pa.field("position", pa.int32()),
            pa.field("experts", pa.list_(pa.uint16(), header.layers * header.ranks)),
        ],
        metadata={FACTS_KEY: msgspec.json.encode(header)},
    )


def _check_size(ids: int) -> None:
    if ids > MAX_IDS:
        raise TraceError(f"the facts hold {ids} expert ids, allowed are {MAX_IDS}", "use fewer or shorter sequences")
