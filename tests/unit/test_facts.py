"""Routing facts: from recordings and back from disk; whatever is damaged, foreign or impossible is refused."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from elmoe.errors import TraceError
from elmoe.trace import RoutingFacts, TraceRecorder, facts_of_trace, read_facts, read_trace, write_facts
from elmoe.trace import facts as facts_module
from elmoe.trace.format import FACTS_KEY
from tests.tiny import tiny_spec

MODEL = tiny_spec()


def random_facts(sequences: int = 3, positions: int = 5, layers: int = 2, ranks: int = 4, experts: int = 8) -> RoutingFacts:
    rng = np.random.default_rng(7)
    ranked = np.argsort(rng.random((sequences, positions, layers, experts)), axis=-1)[..., :ranks].astype(np.uint16)
    lengths = np.maximum(1, positions - np.arange(sequences)).astype(np.int32)
    ranked[np.arange(positions) >= lengths[:, None]] = 0
    return RoutingFacts(ranked, np.full(sequences, 2, np.int32), lengths, experts, 2, "synthetic: a test")


def record_sequences(path, facts: RoutingFacts, skip: tuple[int, int] | None = None) -> None:
    """A recording whose committed rows are these facts (3 layers): prompts prefilled, the rest verified, drafts between."""
    scores = [np.full((1, 4), 0.25, np.float32)] * 3
    with TraceRecorder(path, MODEL, {"store": "tiny", "seed": 3}) as recorder:
        for sequence, length in enumerate(facts.lengths.tolist()):
            for position in range(length):
                if (sequence, position) == skip:
                    continue
                for phase in ("prefill",) if position < facts.prompts[sequence] - 1 else ("draft", "verify"):
                    one = np.array([position], np.int32)
                    ranked = facts.ranked[sequence, position].astype(np.int32)
                    recorder.record(
                        phase=phase, step=position, sequences=np.full(1, sequence, np.int32), positions=one, tokens=one,
                        targets=[1], drafts=[None], confidences=[None], draft_lengths=[0],
                        ranked=[row[None, ::-1] if phase == "draft" else row[None] for row in ranked], scores=scores,
                        resident=np.zeros((3, 8), bool),
                    )  # fmt: skip


def same(a: RoutingFacts, b: RoutingFacts) -> bool:
    arrays = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("ranked", "prompts", "lengths"))
    return arrays and (a.experts, a.top_k, a.source) == (b.experts, b.top_k, b.source)


def test_round_trip(tmp_path):
    facts = random_facts()
    write_facts(facts, tmp_path / "f")
    assert same(read_facts(tmp_path / "f"), facts)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert facts.chosen.shape == (3, 5, 2, 2) and facts.computed.sum() == 5 + 4 + 3
    with pytest.raises(TraceError, match="holds routing facts"):
        read_trace(tmp_path / "f")
    with pytest.raises(TraceError, match="cannot write"):
        write_facts(facts, tmp_path / "missing" / "f")


def test_facts_of_a_recording_are_the_rows_that_stay(tmp_path):
    facts = random_facts(layers=3)
    record_sequences(tmp_path / "t", facts)
    found = read_facts(tmp_path / "t")
    assert same(replace(found, source=facts.source), facts)
    assert found.source == "recorded: qwen3_moe, 3 layers, top 2 of 8; store tiny, seed 3"
    assert same(facts_of_trace(read_trace(tmp_path / "t")), found)
    record_sequences(tmp_path / "t", facts, skip=(1, 2))
    with pytest.raises(TraceError, match="lacks"):
        read_facts(tmp_path / "t")


def test_decoding_starts_at_the_last_prompt_token():
    facts = random_facts()
    decoded = facts.decoding()
    assert decoded.lengths.tolist() == [4, 3, 2] and decoded.prompts.tolist() == [1, 1, 1]
    for sequence in range(3):
        assert np.array_equal(decoded.ranked[sequence, 0], facts.ranked[sequence, 1])
    with pytest.raises(TraceError, match="no decoded position"):
        replace(facts, prompts=np.array([2, 2, 4], np.int32)).decoding()


def test_impossible_facts_are_refused():
    facts = random_facts()
    twice = facts.ranked.copy()
    twice[1, 2, 0, 3] = twice[1, 2, 0, 0]
    for changes, message in (
        ({"experts": 5}, "expert 7 is named"),
        ({"ranked": twice}, "sequence 1.*twice"),
        ({"ranked": facts.ranked.astype(np.int32)}, "uint16"),
        ({"top_k": 5}, "top 5 of 4"),
        ({"lengths": np.array([5, 6, 1], np.int32)}, "lengths"),
        ({"prompts": np.array([0, 1, 1], np.int32)}, "prompts"),
    ):
        with pytest.raises(TraceError, match=message):
            replace(facts, **changes)


def test_bad_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "f"
    with pytest.raises(TraceError, match="no trace"):
        read_facts(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(TraceError, match="Parquet"):
        read_facts(path)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(TraceError, match="no elmoe header"):
        read_facts(path)
    write_facts(random_facts(), path)
    whole, table = path.read_bytes(), pq.read_table(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError):
        read_facts(path)
    header = msgspec.json.decode(table.schema.metadata[FACTS_KEY])

    def rewrite(rows: pa.Table = table, **changes: object) -> None:
        pq.write_table(rows.replace_schema_metadata({FACTS_KEY: msgspec.json.encode(header | changes)}), path)

    for changes, message in (
        ({"version": 99}, "reads up to"),
        ({"version": "x"}, "damaged header"),
        ({"lengths": []}, "damaged header"),
        ({"extra": 1}, "damaged header"),
        ({"layers": 3}, "columns"),
        ({"lengths": [5, 4, 4]}, "rows are not"),
        ({"lengths": [5, 4]}, "rows are not"),
        ({"lengths": [1 << 40]}, "allowed are"),
        ({"prompts": [1 << 31, 1, 1]}, "out of range"),
        ({"experts": 4}, "expert 7"),
        ({"top_k": 0}, "top 0"),
    ):
        rewrite(**changes)
        with pytest.raises(TraceError, match=message):
            read_facts(path)
    rewrite(table.slice(1))
    with pytest.raises(TraceError, match="rows are not"):
        read_facts(path)
    holes = pa.array([None] * table.num_rows, table.schema.field("experts").type)
    rewrite(table.set_column(2, table.schema.field("experts"), holes))
    with pytest.raises(TraceError, match="missing values"):
        read_facts(path)
    path.write_bytes(whole)
    monkeypatch.setattr(facts_module, "MAX_IDS", 10)
    with pytest.raises(TraceError, match="allowed are 10"):
        read_facts(path)
