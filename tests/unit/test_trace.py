"""Trace files: damaged, foreign and future ones are refused; a failed recording leaves nothing behind."""

from __future__ import annotations

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elmoe.errors import TraceError
from elmoe.trace import TRACE_VERSION, TraceRecorder, read_trace
from elmoe.trace.format import METADATA_KEY, TraceHeader, table_schema
from tests.tiny import tiny_schema

MODEL = tiny_schema()


def record(path, rows: int = 3, expert: int = 1) -> None:
    with TraceRecorder(path, MODEL) as recorder:
        numbers = np.arange(rows, dtype=np.int32)
        recorder.record(
            phase="plain", step=0, sequences=numbers, positions=numbers, tokens=numbers, targets=[5] * rows,
            drafts=[None] * rows, confidences=[None] * rows, draft_lengths=[0] * rows,
            ranked=[np.full((rows, 4), expert, np.int32)] * 3, scores=[np.full((rows, 4), 0.25, np.float32)] * 3,
            resident=np.eye(3, 8, dtype=bool),
        )  # fmt: skip


def test_round_trip(tmp_path):
    record(tmp_path / "a.trace", rows=5000)
    trace = read_trace(tmp_path / "a.trace")
    assert trace.table.num_rows == 5000 and trace.header.model == MODEL and trace.header.ranks == 4
    assert (trace.column("draft") == -1).all() and np.isnan(trace.column("confidence")).all()
    assert (trace.routing() == 1).all() and trace.routing("scores").shape == (5000, 3, 4)
    bits = np.unpackbits(np.frombuffer(trace.table.column("resident")[0].as_py(), np.uint8))[:24].reshape(3, 8)
    assert np.array_equal(bits, np.eye(3, 8))
    assert [path.name for path in tmp_path.iterdir()] == ["a.trace"]


def test_a_failed_run_leaves_no_trace(tmp_path):
    with pytest.raises(RuntimeError), TraceRecorder(tmp_path / "a.trace", MODEL):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_bad_files_are_refused(tmp_path):
    path = tmp_path / "a.trace"
    with pytest.raises(TraceError, match="no trace"):
        read_trace(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(TraceError, match="Parquet"):
        read_trace(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(TraceError, match="no elmoe header"):
        read_trace(path)
    record(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError):
        read_trace(path)
    record(path, expert=99)
    with pytest.raises(TraceError, match="expert 99"):
        read_trace(path)
    header = TraceHeader(version=TRACE_VERSION + 1, model=MODEL, ranks=4)
    pq.write_table(table_schema(header).empty_table(), path)
    with pytest.raises(TraceError, match="reads up to"):
        read_trace(path)
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({METADATA_KEY: b"{"}), path)
    with pytest.raises(TraceError, match="damaged header"):
        read_trace(path)
    header = TraceHeader(version=TRACE_VERSION, model=MODEL, ranks=4)
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({METADATA_KEY: msgspec.json.encode(header)}), path)
    with pytest.raises(TraceError, match="columns"):
        read_trace(path)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(TraceError, match="cannot write"):
        TraceRecorder(tmp_path / "missing" / "a.trace", MODEL)
