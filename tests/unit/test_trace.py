"""Trace files: damaged, foreign and future ones are refused; a failed recording leaves nothing behind."""

from __future__ import annotations

import json
import tracemalloc
from functools import cache
from itertools import combinations

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elmoe.errors import TraceError
from elmoe.trace import TRACE_VERSION, TraceRecorder, read_facts, read_trace
from elmoe.trace.format import METADATA_KEY, TracedModel, TraceHeader, table_schema
from elmoe.trace.replacement import belady_misses, hit_rates
from elmoe.trace.summary import summarise
from tests.tiny import tiny_spec

MODEL = tiny_spec()


def record(path, rows: int = 3, expert: int = 1) -> None:
    with TraceRecorder(path, MODEL) as recorder:
        numbers = np.arange(rows, dtype=np.int32)
        recorder.record(
            phases=["plain"] * rows, step=0, sequences=numbers, positions=numbers, tokens=numbers, targets=[5] * rows,
            drafts=[None] * rows, confidences=[None] * rows, draft_lengths=[0] * rows,
            ranked=[np.full((rows, 4), expert, np.int32)] * 3, scores=[np.full((rows, 4), 0.25, np.float32)] * 3,
            resident=np.eye(3, 8, dtype=bool),
        )  # fmt: skip


def test_round_trip(tmp_path):
    record(tmp_path / "a.trace", rows=5000)
    trace = read_trace(tmp_path / "a.trace")
    assert trace.table.num_rows == 5000 and trace.header.model == TracedModel.of(MODEL) and trace.header.ranks == 4
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
    header = TraceHeader(version=TRACE_VERSION + 1, model=TracedModel.of(MODEL), ranks=4)
    pq.write_table(table_schema(header).empty_table(), path)
    with pytest.raises(TraceError, match="reads up to"):
        read_trace(path)
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({METADATA_KEY: b"{"}), path)
    with pytest.raises(TraceError, match="damaged header"):
        read_trace(path)
    header = TraceHeader(version=TRACE_VERSION, model=TracedModel.of(MODEL), ranks=4)
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({METADATA_KEY: msgspec.json.encode(header)}), path)
    with pytest.raises(TraceError, match="columns"):
        read_trace(path)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(TraceError, match="cannot write"):
        TraceRecorder(tmp_path / "missing" / "a.trace", MODEL)


def routed_trace(path, choices: np.ndarray) -> None:
    """A trace of one sequence whose token t ran ``choices[t]`` (layers, ranks)."""
    with TraceRecorder(path, MODEL) as recorder:
        for position, ranked in enumerate(choices):
            one = np.array([position], np.int32)
            recorder.record(
                phases=["plain"], step=position, sequences=np.zeros(1, np.int32), positions=one, tokens=one, targets=[5],
                drafts=[None], confidences=[None], draft_lengths=[0], ranked=[row[None] for row in ranked],
                scores=[np.full((1, 4), 0.25, np.float32)] * 3, resident=np.zeros((3, 8), bool),
            )  # fmt: skip


def test_hit_rates_against_an_independent_replay(tmp_path):
    rng = np.random.default_rng(4)
    weights = 1 / np.arange(1, 9)
    choices = np.array(
        [[rng.choice(8, 4, replace=False, p=weights / weights.sum()) for _ in range(3)] for _ in range(150)], np.int32
    )
    routed_trace(tmp_path / "t", choices)
    for slots in (2, 4, 6):
        rates = hit_rates(read_trace(tmp_path / "t"), slots)
        used = choices[:, :, : MODEL.top_k]
        hits = 0
        for layer in range(3):  # last use decides; of experts used by the same token, the lower id stays
            last: dict[int, int] = {}
            cached: set[int] = set()
            for token in range(150):
                now = set(used[token, layer].tolist())
                hits += len(now & cached)
                last |= dict.fromkeys(now, token)
                cached = set(sorted(cached | now, key=lambda e: (-last[e], e))[:slots])
        assert rates["lru"] == pytest.approx(hits / used.size)
        assert rates["belady"] >= max(rates.values()) - 1e-12 and rates["belady"] > rates["random"]
    everything = hit_rates(read_trace(tmp_path / "t"), 8)
    firsts = sum(len(np.unique(choices[:, layer, : MODEL.top_k])) for layer in range(3))
    assert [everything["lru"], everything["belady"]] == pytest.approx([1 - firsts / used.size] * 2)


def test_a_summary_of_a_known_trace(tmp_path):
    choices = np.tile(np.arange(4, dtype=np.int32), (10, 3, 1))
    choices[5:] += 4
    routed_trace(tmp_path / "t", choices)
    summary = summarise(read_trace(tmp_path / "t"))
    assert summary["rows"] == {"plain": 10} and summary["sequences"] == 1 and summary["acceptance"] is None
    assert summary["reuse"] == pytest.approx(8 / 9) and summary["busiest_over_mean"] == pytest.approx(2.0)
    assert summary["routing_covered_by"]["50%"] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(8))
def test_belady_is_the_least(seed):
    """Against trying every cache content after every step."""
    rng = np.random.default_rng(seed)
    experts, slots, uses = 5, 2, rng.random((7, 5)) < 0.4

    @cache
    def least(step: int, cached: frozenset[int]) -> int:
        if step == len(uses):
            return 0
        needed = set(np.flatnonzero(uses[step]).tolist())
        kept = [frozenset(c) for size in range(slots + 1) for c in combinations(sorted(cached | needed), size)]
        return len(needed - cached) + min(least(step + 1, after) for after in kept)

    assert belady_misses(uses, slots) == least(0, frozenset())
    best = min(least(0, frozenset(c)) for c in combinations(range(experts), slots))
    assert belady_misses(uses, slots, warm=True) == best


def damaged(path, column=None, value=None, **header):
    """A small trace with one number changed: in a column's first row, or in the header."""
    table = pq.read_table(path)
    told = json.loads(table.schema.metadata[b"elmoe"])
    for key, change in header.items():
        (told if key in told else told["model"])[key] = change
    if column is not None:
        index = table.schema.get_field_index(column)
        values = [value, *table.column(column).to_pylist()[1:]]
        table = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
    changed = path.with_name("changed.trace")
    pq.write_table(table.replace_schema_metadata({b"elmoe": json.dumps(told).encode()}), changed)
    return changed


@pytest.mark.parametrize(
    ("column", "value", "told"),
    [
        ("sequence", -1, "a sequence outside"), ("sequence", 2**31 - 1, "a sequence outside"),
        ("sequence", None, "a sequence"),
        ("position", -1, "a position outside"), ("position", 2**31 - 1, "a position outside"),
        ("step", -5, "a step outside"),
        ("draft_length", 1 << 20, "a draft_length outside"), ("experts", None, "lacks experts"),
        ("scores", None, "lacks scores"),
        ("resident", b"x", "resident sets"), ("phase", "warm-up", "a phase that is none of"),
    ],
)  # fmt: skip
def test_a_number_of_a_row_out_of_bounds_is_told(tmp_path, column, value, told):
    record(tmp_path / "a.trace")
    with pytest.raises(TraceError, match=told):
        read_trace(damaged(tmp_path / "a.trace", column, value))


@pytest.mark.parametrize(
    "header",
    [{"layers": 2**31 - 1}, {"layers": -1}, {"ranks": 10**30}, {"ranks": 1000}, {"experts": 2**31}, {"top_k": 99},
     {"vocabulary": -1}, {"layers": "2"}, {"dense_layers": [0] * 5000}, {"run": []}],
)  # fmt: skip
def test_a_number_of_the_header_out_of_bounds_is_told(tmp_path, header):
    record(tmp_path / "a.trace")
    with pytest.raises(TraceError, match="damaged header"):
        read_trace(damaged(tmp_path / "a.trace", **header))


def test_a_name_that_is_no_text_is_told(tmp_path):
    with pytest.raises(TraceError):
        read_trace(str(tmp_path / "x\udce9"))


def test_columns_whose_kind_or_names_are_damaged_are_refused(tmp_path):
    record(tmp_path / "a.trace")
    table = pq.read_table(tmp_path / "a.trace")
    plain = table.set_column(table.column_names.index("experts"), "experts", pa.array([[1]] * 3, pa.list_(pa.uint16())))
    pq.write_table(plain.replace_schema_metadata(table.schema.metadata), tmp_path / "list.trace")
    raw = (tmp_path / "a.trace").read_bytes()
    (tmp_path / "name.trace").write_bytes(raw.replace(b"sequence", b"seq\xffence"))
    for name in ("list.trace", "name.trace"):
        for reader in (read_trace, read_facts):
            with pytest.raises(TraceError, match=name):
                reader(tmp_path / name)


@pytest.mark.parametrize(
    "changes", [{"lengths": (1 << 29,)}, {"layers": 1 << 40}, {"ranks": 1 << 70}, {"lengths": (2, 1 << 28)}]
)
def test_a_header_of_facts_that_asks_for_gigabytes_is_refused(tmp_path, changes):
    header = {"version": 1, "layers": 1, "ranks": 1, "experts": 4, "top_k": 1, "source": "x", "prompts": [1] * len(
        changes.get("lengths", (2,))), "lengths": [2]} | changes  # fmt: skip
    schema = pa.schema(
        [("sequence", pa.int32()), ("position", pa.int32()), ("experts", pa.list_(pa.uint16(), 1))],
        metadata={b"elmoe_facts": json.dumps(header)},
    )
    rows = {"sequence": [0, 0], "position": [0, 1], "experts": [[1], [2]]}
    pq.write_table(pa.table(rows, schema=schema), tmp_path / "a.facts")
    tracemalloc.start()
    with pytest.raises(TraceError, match=r"expert ids|not those that the header promises|no sequence, layer"):
        read_facts(tmp_path / "a.facts")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 1 << 28


def test_a_name_that_is_not_utf_8_stays_in_the_message(tmp_path):
    path = tmp_path / "st\udce9"
    for content in (None, b"x"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(TraceError, match="st\udce9"):
            read_trace(path)
