"""``elmoe simulate`` and ``elmoe report`` from the command line, on real input and bad input."""

from __future__ import annotations

import json
from importlib.resources import files

import pytest
from click.testing import CliRunner

from elmoe.cli.main import cli
from elmoe.errors import ElmoeError, HardwareError, ModelError
from elmoe.files import write_whole
from elmoe.models.load import load_model
from elmoe.schema.hardware import load_hardware
from elmoe.sim.grid import Grid, run_grid
from elmoe.units import format_bytes

SMALL = ["--model", "qwen3-30b-a3b", "--prompts", "mt_bench", "--batch", "1,4"]


def run(*arguments: str):
    result = CliRunner().invoke(cli, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_simulate_gives_a_row_for_each_case():
    result = run("simulate", *SMALL, "--hardware", "xpu", "--hardware", "elmoe3d_8gb", "--acceptance", "0.6", "--json")
    data = json.loads(result.stdout)
    assert data["label"] == "simulated"
    cases = {(r["system"], r["form"], r["batch"]) for r in data["rows"]}
    forms = ("ar", "eagle", "small_lm", "quant")
    assert cases == {("xpu", f, b) for f in forms for b in (1, 4)} | {
        ("elmoe3d_8gb", f, b) for f in (*forms, "elastic") for b in (1, 4)
    }
    row = next(r for r in data["rows"] if r["form"] == "elastic")
    assert row["tokens_per_second"] > 0 and row["acceptance"] == "0.6"
    assert all(share <= 1 + 1e-9 for share in row["busy"].values())
    assert row["joules_per_token"]["low"] < row["joules_per_token"]["high"]


def test_the_simulator_of_before_the_planner_and_trees_can_be_asked_for():
    data = ("simulate", *SMALL[:-1], "1", "--hardware", "xpu", "--hardware", "elmoe3d_8gb", "--acceptance", "0.6", "--json")
    found = {}
    for options in ((), ("--before",), ("--trees",)):
        result = json.loads(run(*data, "--form", "ar", "--form", "elastic", "--form", "planned", *options).stdout)
        found[options] = {r["form"]: r["speedup"] for r in result["rows"] if r["system"] == "elmoe3d_8gb"}
        assert result["conditions"]["draft_lengths"] == ([1, 2, 4, 8] if options == ("--before",) else [1, 2, 4, 8, 12, 16])
        assert [r["choice"] for r in result["rows"] if r["form"] == "planned"] == ["by the planner, as it runs"]
    assert found["--before",]["ar"] < found[()]["ar"] == found["--trees",]["ar"]
    assert found["--trees",]["elastic"] >= found[()]["elastic"]


def test_the_tables_show_what_the_help_promises():
    data = ("simulate", *SMALL, "--hardware", "xpu", "--hardware", "elmoe3d_8gb", "--form", "ar")
    rows = [row for row in json.loads(run(*data, "--json").stdout)["rows"] if row["batch"] == 4]
    told = run(*data).stdout
    assert "batch 4: energy, bytes and the busiest unit, simulated" in " ".join(told.split())
    for row in rows:
        unit, share = max(row["busy"].items(), key=lambda item: item[1])
        joules, count = row["joules_per_token"]["middle"], format_bytes(sum(row["bytes_per_token"].values()))
        line = next(line for line in told.split("mJ/token")[1].splitlines() if row["system"] in line)
        assert f"{1e3 * joules:.1f}" in line and count in line and f"{unit} {share:.0%}" in line


def test_a_copied_preset_with_another_bandwidth_works(tmp_path):
    """The three lines of docs/simulator.md."""
    path = tmp_path / "my.yaml"
    path.write_text(
        run("simulate", "--show-preset", "xpu").stdout.replace("102.4 GB/s", "204.8 GB/s").replace("name: xpu", "name: mine")
    )
    result = run("simulate", *SMALL, "--hardware", "xpu", "--hardware", str(path), "--form", "ar", "--json")
    rows = json.loads(result.stdout)["rows"]
    rates = {(r["system"], r["batch"]): r["tokens_per_second"] for r in rows}
    assert rates["mine", 1] == pytest.approx(2 * rates["xpu", 1], rel=0.05)


def test_results_become_a_page(tmp_path):
    out, page, timeline = tmp_path / "result.json", tmp_path / "page.html", tmp_path / "timeline.json"
    systems = ("--hardware", "xpu", "--hardware", "hb_xpu", "--hardware", "elmoe3d_8gb")
    run("simulate", *SMALL, *systems, "--out", str(out), "--timeline", str(timeline), "--json")
    result = run("report", str(out), "--out", str(page), "--json")
    section = json.loads(result.stdout)["sections"][0]
    assert "the paper's claim of 6.6x is NOT JUDGED, it is over other models" in section["verdict"]
    html = page.read_text()
    assert "Paper v this simulator" in html and "Plotly.newPlot" in html
    events = json.loads(timeline.read_text())["traceEvents"]
    tracks = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    assert tracks.keys() >= {"passes", "main", "fast", "compute"}
    assert {event["tid"] for event in events if event["ph"] == "X"} == set(tracks.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("clock: {", "clok: {"), "clok"),
        (("102.4 GB/s", "102.4"), "has no unit"),
        (("102.4 GB/s", "102.4 ns"), "unit of time, expected bandwidth"),
        (("102.4 GB/s", "0 GB/s"), "not positive"),
        (("102.4 GB/s", "-5 GB/s"), "not a positive number"),
    ],
)
def test_bad_hardware_is_refused_by_file_and_path(tmp_path, change, message):
    path = tmp_path / "my.yaml"
    path.write_text(run("simulate", "--show-preset", "xpu").stdout.replace(*change))
    with pytest.raises(ElmoeError, match=message) as caught:
        run("simulate", *SMALL, "--hardware", str(path))
    assert "my.yaml" in str(caught.value) and "$" in str(caught.value)
    assert caught.value.hint


def test_processes_give_the_rows_of_one_in_the_same_order():
    grid, told = Grid((load_hardware("xpu"),), ("demo",), ("mt_bench", "gsm8k"), (1,), ("ar",), steps=4), []
    rows = run_grid(grid, lambda done, total: told.append((done, total)))
    assert rows == run_grid(grid, workers=1) == run_grid(grid, workers=2)
    assert [row["prompts"] for row in rows] == ["mt_bench", "gsm8k"] and told == [(1, 2), (2, 2)]


def test_a_model_too_large_becomes_a_row_that_says_so():
    arguments = ("--model", "qwen3-235b-a22b", "--prompts", "mt_bench", "--batch", "1", "--hardware", "xpu")
    with pytest.raises(ElmoeError, match=r"needs .* 'xpu' has"):
        run("simulate", *arguments, "--json")


def test_a_store_is_priced_as_its_configuration_is():
    """The demo store's spec and formats are those of the model card."""
    model = load_model("demo")
    spec = model.spec
    assert (len(spec.layers), spec.hidden, spec.experts, spec.top_k, spec.tied_embeddings) == (8, 192, 64, 4, True)
    assert model.expert.msb_bytes == 3 * 192 * 96 * 4.5 / 8 and len(model.formats) == 8
    result = run("simulate", "--model", "demo", "--prompts", "mt_bench", "--batch", "1", "--hardware", "xpu", "--json")
    rows = json.loads(result.stdout)["rows"]
    assert {row["model"] for row in rows} == {"demo"} and all(row["tokens_per_second"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "manifest.json"),
        ("[]", "manifest.json"),
        ('{"model": {"family": "x"}, "layers": []}', "manifest.json': Object missing required field"),
        ("changed", "there is no format 'nested9'"),
    ],
)
def test_a_damaged_store_is_refused_by_file(tmp_path, text, named):
    if text == "changed":
        text = (files("elmoe.presets") / "demo" / "manifest.json").read_text().replace("nested8", "nested9")
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path)
    assert named in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_model_that_cannot_be_simulated_is_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match=r"'qwen2\.5-coder-7b' has no layer with experts"):
        run("simulate", "--model", "qwen2.5-coder-7b", "--prompts", "mt_bench", "--hardware", "xpu")
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "jamba"}')
    with pytest.raises(ModelError, match=r"config\.json: there are no 'architectures', and .* 'jamba' is not"):
        run("simulate", "--model", str(path), "--prompts", "mt_bench", "--hardware", "xpu")


def test_a_trace_of_another_model_is_refused(tmp_path):
    path = tmp_path / "other.facts"
    run("trace", "synthesise", "mt_bench", str(path), "--experts", "32", "--top-k", "4", "--layers", "2", "--sequences", "2",
        "--positions", "40")  # fmt: skip
    with pytest.raises(ElmoeError, match="routes to 4 of 32 experts, 'qwen3-30b-a3b' to 8 of 128") as caught:
        run("simulate", "--model", "qwen3-30b-a3b", "--batch", "1", "--trace", str(path))
    assert "synthesise" in (caught.value.hint or "")


def test_bad_acceptance_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(ElmoeError, match="no probability below 1"):
        run("simulate", *SMALL, "--acceptance", "1.5")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(ElmoeError, match="not a section of a report"):
        run("report", str(bad), "--out", str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(HardwareError, match="cannot write"):
        write_whole(tmp_path / "taken", b"content")  # the rename meets a folder
    assert [item.name for item in tmp_path.iterdir()] == ["taken"]


def test_a_grid_from_python_is_checked_as_the_command_is():
    twice = (load_hardware("xpu"),) * 2
    with pytest.raises(HardwareError, match="two systems have the name 'xpu'"):
        run_grid(Grid(twice, ("olmoe-1b-7b",), ("gsm8k",), (1,), ("ar",), steps=2), workers=1)
