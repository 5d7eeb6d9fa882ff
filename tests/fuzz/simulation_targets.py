"""Targets of traces, the simulator and its reports: hardware, tables, routing logs, popularity, locality, results."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from tests.fuzz.target import Target, nothing, presets


def _run_hardware(folder: Path, raw: bytes) -> None:
    """Loaded, written, loaded again, and priced in one cell."""
    from elmoe.schema.hardware import load_hardware, write_hardware
    from elmoe.sim.grid import Grid, run_grid
    from elmoe.systems.forms import Odds

    path = folder / "mine.yaml"
    path.write_bytes(raw)
    hardware = load_hardware(path)
    write_hardware(hardware, folder / "written.yaml")
    assert load_hardware(folder / "written.yaml") == hardware
    grid = Grid((hardware,), ("gpt-oss-20b",), ("gsm8k",), (1,), ("elastic",), (Odds("0.6", 0.6, "assumed"),), (2,), steps=2)
    json.dumps(run_grid(grid, workers=1))


def _run_validation(folder: Path, raw: bytes) -> None:
    from elmoe.errors import HardwareError
    from elmoe.schema.validation import validation_of_text
    from elmoe.untrusted import text_of

    validation_of_text(text_of(raw, "mine.yaml", HardwareError), "mine.yaml")


def _run_trace(folder: Path, raw: bytes) -> None:
    from elmoe.errors import ElmoeError
    from elmoe.trace import read_facts, read_trace
    from elmoe.trace.locality import measured
    from elmoe.trace.summary import summarise

    (folder / "a.trace").write_bytes(raw)
    with suppress(ElmoeError):
        summarise(read_trace(folder / "a.trace"))
    measured(read_facts(folder / "a.trace"))


def _traces(folder: Path) -> list[bytes]:
    import numpy as np

    from elmoe.trace import TraceRecorder, facts_of_trace, read_trace, write_facts
    from tests.tiny import tiny_spec

    with TraceRecorder(folder / "seed.trace", tiny_spec()) as recorder:
        for step in range(3):
            phase = "prefill" if step == 0 else "plain"
            recorder.record(
                phases=[phase] * 2, step=step, sequences=np.arange(2, dtype=np.int32),
                positions=np.full(2, step, np.int32), tokens=np.arange(2, dtype=np.int32), targets=[5] * 2,
                drafts=[None] * 2, confidences=[None] * 2, draft_lengths=[0] * 2,
                ranked=[np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.int32)] * 3,
                scores=[np.full((2, 4), 0.25, np.float32)] * 3, resident=np.eye(3, 8, dtype=bool),
            )  # fmt: skip
    write_facts(facts_of_trace(read_trace(folder / "seed.trace")), folder / "seed.facts")
    return [(folder / name).read_bytes() for name in ("seed.trace", "seed.facts")]


def _table_seeds(folder: Path) -> list[bytes]:
    """Parquet tables as JSON: a key of the metadata, the header in it, and the columns."""
    import pyarrow.parquet as pq

    _traces(folder)
    found = []
    for name in ("seed.trace", "seed.facts"):
        table = pq.read_table(folder / name)
        ((key, header),) = table.schema.metadata.items()
        columns = {column: table.column(column).to_pylist() for column in table.column_names if column != "resident"}
        found.append(json.dumps({"key": key.decode(), "header": json.loads(header), "columns": columns}).encode())
    return found


def _run_table(folder: Path, raw: bytes) -> None:
    """A table with the columns that the header asks for, as far as the values fit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        wanted = json.loads(raw)
        known = {"step": pa.int32(), "sequence": pa.int32(), "position": pa.int32(), 
                 "token": pa.int32(), "target": pa.int32(), "draft": pa.int32(), "confidence": pa.float32(),
                 "draft_length": pa.int32()}  # fmt: skip
        fields, arrays = [], []
        for name, values in wanted["columns"].items():
            width = max((len(value) for value in values if isinstance(value, list)), default=1)
            kind = known.get(name, pa.dictionary(pa.int8(), pa.string()) if name == "phase" else None)
            kind = kind or pa.list_(pa.float32() if name == "scores" else pa.uint16(), width)
            fields.append(pa.field(name, kind))
            arrays.append(pa.array(values, pa.string()).dictionary_encode().cast(kind) if name == "phase"
                          else pa.array(values, kind))  # fmt: skip
        if "step" in wanted["columns"]:
            fields.append(pa.field("resident", pa.binary()))
            arrays.append(pa.nulls(len(arrays[0]), pa.binary()))
        schema = pa.schema(fields, metadata={wanted["key"]: json.dumps(wanted["header"])})
        pq.write_table(pa.Table.from_arrays(arrays, schema=schema), folder / "table.trace")
    except (pa.ArrowException, ValueError, TypeError, KeyError, OverflowError, AttributeError, RecursionError, IndexError):
        return  # the change made no table
    _run_trace(folder, (folder / "table.trace").read_bytes())


NDJSON = (
    '{"n_layers": 2, "n_experts": 8, "top_k": 2}\n{"e": [0, 1, 0, 2, 1, 3, 1, 4]}\n{"e": [0, 5, 0, 6, 1, 7, 1, 0]}\n',
    '{"model": {"num_hidden_layers": 3, "num_experts": 4, "k": 1}}\n[0, 1]\n[2, 3]\n[0, 2]\n[2, 0]\n',
    '{"n_layers_routed": 2, "n_expert": 8, "n_expert_used": 2}\n{"phase": "prefill", "layers": [[1, 2], [3, 4]]}\n'
    '{"layers": [[1, 2], [3, 4]]}\n',
)


def _run_ndjson(folder: Path, raw: bytes) -> None:
    from elmoe.trace import import_ndjson, write_facts

    (folder / "log.ndjson").write_bytes(raw)
    write_facts(import_ndjson(folder / "log.ndjson"), folder / "log.facts")


POPULARITIES = (
    json.dumps({"order": [[0, 1], [0, 0], [1, 0], [1, 1]]}),
    json.dumps({"layers": [0, 1], "models": {"m": {"expert_counts": {"d": [[1, 2], [3, 4]], "e": [[1, 2], [0, 4]]}}}}),
    json.dumps({"token_scores": {"0": {"0": 0.25, "1": 0.75}, "1": {"0": 0.5, "1": 0.5}}}),
)


def _run_popularity(folder: Path, raw: bytes) -> None:
    from elmoe.errors import ElmoeError
    from elmoe.trace import import_popularity, load_popularity, save_popularity

    path = folder / "scores.json"
    path.write_bytes(raw)
    for kind in ("esft", "olmoe", "fiddler"):
        try:
            save_popularity(import_popularity(path, kind), folder / "popularity.json")  # type: ignore[arg-type]
            load_popularity(folder / "popularity.json").table(5)
        except ElmoeError:
            continue


def _run_locality(folder: Path, raw: bytes) -> None:
    from elmoe.trace import load_locality

    (folder / "locality.json").write_bytes(raw)
    load_locality(folder / "locality.json")


def _run_published(folder: Path, raw: bytes) -> None:
    from elmoe.trace.published import load_published

    (folder / "published.json").write_bytes(raw)
    load_published(folder / "published.json")


def _run_description(folder: Path, raw: bytes) -> None:
    from elmoe.models.load import load_model

    (folder / "model.yaml").write_bytes(raw)
    model = load_model(folder / "model.yaml")
    assert model.total_bytes > 0 and model.active_parameters > 0


def _run_acceptance(folder: Path, raw: bytes) -> None:
    from elmoe.trace.acceptance import load_acceptance

    (folder / "acceptance.json").write_bytes(raw)
    load_acceptance(folder / "acceptance.json")


def _result_seeds(folder: Path) -> list[bytes]:
    from elmoe.report.overview import overview
    from elmoe.report.section import write_section
    from elmoe.schema.hardware import load_hardware
    from elmoe.sim.grid import Grid, run_grid
    from elmoe.sim.result import SimulationResult, write_result
    from elmoe.systems.forms import Odds

    systems = tuple(load_hardware(name) for name in ("xpu", "elmoe3d_8gb"))
    grid = Grid(
        systems, ("gpt-oss-20b",), ("gsm8k",), (1,), ("ar", "elastic"), (Odds("0.6", 0.6, "assumed"),), (2,), steps=2
    )
    result = SimulationResult.of(grid, run_grid(grid, workers=1), "elmoe simulate", "2026-01-02")
    write_result(result, folder / "result.json")
    section = overview(result.rows, result.conditions, "x")
    write_section(section, folder / "section.json")
    data = json.loads((folder / "result.json").read_bytes())
    data["conditions"]["constants"] = data["conditions"]["constants"][:2]
    section_data = json.loads((folder / "section.json").read_bytes())
    section_data["tables"], section_data["figures"] = section_data["tables"][:1], section_data["figures"][:1]
    return [json.dumps(data).encode(), json.dumps(section_data).encode()]


def _run_result(folder: Path, raw: bytes) -> None:
    """As `elmoe report`, called in this process."""
    import click

    from elmoe.cli.report import command

    path = folder / "r.json"
    path.write_bytes(raw)
    with click.Context(command):
        command.callback((path,), folder / "page.html", True, True)  # type: ignore[misc]


TARGETS = (
    Target("hardware", "text", nothing, presets("hardware"), _run_hardware),
    Target("validation", "text", nothing, presets("validation"), _run_validation),
    Target("trace", "binary", nothing, _traces, _run_trace),
    Target("trace_table", "json", nothing, _table_seeds, _run_table),
    Target("ndjson", "text", nothing, lambda _: [text.encode() for text in NDJSON], _run_ndjson),
    Target("popularity", "json", nothing, lambda _: [text.encode() for text in POPULARITIES], _run_popularity),
    Target("locality", "json", nothing, presets("locality", "gsm8k.json"), _run_locality),
    Target("published", "json", nothing, presets("published", "glm-4.7-flash.json"), _run_published),
    Target("description", "text", nothing, presets("described"), _run_description),
    Target("acceptance", "json", nothing, presets("acceptance"), _run_acceptance),
    Target("result", "json", nothing, _result_seeds, _run_result),
)  # fmt: skip
