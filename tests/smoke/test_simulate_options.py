"""Options of ``elmoe simulate`` that contradict each other or leave nothing to simulate, and traces that are short."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from elmoe.cli.main import cli
from elmoe.errors import ElmoeError
from elmoe.models.load import model_text

SMALL = ("simulate", "--model", "qwen3-30b-a3b", "--batch", "1", "--acceptance", "0.6")
BOTH = ("--hardware", "xpu", "--hardware", "elmoe3d_8gb")
SHORT = ("--experts", "128", "--top-k", "8", "--layers", "2", "--sequences", "2", "--prompt", "4")


def run(*arguments: str):
    result = CliRunner().invoke(cli, list(arguments), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return result


def rows(*arguments: str) -> list[dict]:
    return json.loads(run(*arguments, "--json").stdout)["rows"]


@pytest.fixture(scope="module")
def short_trace(tmp_path_factory) -> str:
    """Nine positions behind the prompts."""
    path = tmp_path_factory.mktemp("trace") / "short.parquet"
    run("trace", "synthesise", "mt_bench", str(path), *SHORT, "--positions", "12")
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--before", "--trees"), "--before or --trees"),
        (("--trace", __file__, "--locality", "mt_bench"), "--trace or --locality"),
        (("--trace", __file__, "--prompts", "model"), "--trace or --locality"),
    ],
)
def test_options_that_contradict_each_other_are_refused(arguments, message):
    with pytest.raises(click.UsageError, match=message):
        run(*SMALL, *arguments)


@pytest.mark.parametrize(
    ("option", "name", "hint"),
    [
        ("--model", "qwen3-30b", "did you mean 'qwen3-30b-a3b'?"),
        ("--model", "Qwen3-30B-A3B", "did you mean 'qwen3-30b-a3b'?"),
        ("--hardware", "elmoe3d-8gb", "did you mean 'elmoe3d_8gb'"),
        ("--hardware", "XPU", "did you mean 'xpu'?"),
        ("--hardware", "xpu,elmoe3d_8gb", "give one name at a time, 'xpu' first"),
        ("--hardware", "xpu ", "did you mean 'xpu'?"),
        ("--hardware", "?", "a YAML file, or one of ddr5_nvme"),
        ("--hardware", "xpu.yml", "a YAML file, or one of ddr5_nvme"),
        ("--locality", "mtbench", "did you mean 'mt_bench'?"),
        ("--locality", "promts", "did you mean 'prompts'?"),
        ("--locality", "", "or take a preset: model, prompts, alpaca"),
        ("--locality", "?", "or take a preset: model, prompts, alpaca"),
    ],
)
def test_a_name_that_is_none_is_refused_with_the_nearest(option, name, hint):
    with pytest.raises(ElmoeError, match=r"there is no (model|hardware|locality)") as caught:
        run("simulate", option, name)
    assert hint in caught.value.hint


def test_what_does_not_fit_is_told_with_its_forms():
    told = run("simulate", "--model", "glm-4.5-air", "--hardware", "dgx_spark", "--hardware", "xpu", "--batch", "1").stderr
    lines = [line for line in told.splitlines() if line.startswith("left out: xpu, glm-4.5-air, ")]
    assert "ar: 'glm-4.5-air' needs 106.0 GiB at batch 1" in lines[0]


def test_a_first_system_that_is_too_small_for_a_model_leaves_that_model_out():
    case = ("simulate", "--hardware", "xpu", "--hardware", "dgx_spark", "--batch", "1", "--form", "ar")
    done = run(*case, "--model", "glm-4.5-air", "--model", "qwen3-30b-a3b")
    lines = done.stderr.splitlines()
    assert "qwen3-30b-a3b: tokens/s" in done.stdout and "glm-4.5-air: tokens/s" not in done.stdout
    for system in ("xpu", "dgx_spark"):
        (line,) = [line for line in lines if line.startswith(f"left out: {system}, glm-4.5-air, batch 1, ar: ")]
        assert "'glm-4.5-air' needs 106.0 GiB at batch 1, 'xpu' has" in line
        assert line.endswith("every system is compared to it") == (system != "xpu")
    told = run(*case[:-4], "--batch", "1,16", "--form", "ar", "--context", "65536", "--model", "qwen3-30b-a3b")
    assert "qwen3-30b-a3b, batch 1: energy" in told.stdout and "batch 16" not in told.stdout  # which does not fit
    assert "left out: xpu, qwen3-30b-a3b, batch 16, ar: " in told.stderr
    with pytest.raises(ElmoeError, match=r"'glm-4\.5-air' needs 106\.0 GiB") as caught:
        run(*case, "--model", "glm-4.5-air")
    assert "smaller model" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "xpu", "--hardware", "xpu_pim", "--form", "planned"), "none of the systems runs planned\n"),
        (("--hardware", "xpu", "--form", "elastic", "--form", "planned"), "runs elastic or planned\n"),
        (("--hardware", "xpu", "--form", "eagle", "--rival-drafts", "none"), "runs eagle with rivals' drafts 'none'"),
    ],
)
def test_a_grid_without_any_row_is_refused(arguments, message):
    with pytest.raises(ElmoeError, match=message) as caught:
        run(*SMALL, *arguments)
    assert "every system runs ar" in caught.value.hint


@pytest.mark.parametrize("first", ["xpu", "elmoe3d_8gb"])
def test_more_sequences_than_there_are_is_refused_whichever_system_is_first(first):
    """A system that splits its fast memory by the popularity in the prompts looks at them before anything is served."""
    case = ("simulate", "--model", "qwen3-30b-a3b", "--batch", "17", "--context", "16", "--form", "ar", "--hardware", first)
    with pytest.raises(ElmoeError, match="routing has 16 sequences, the batch is 17"):
        run(*case)


def test_a_timeline_is_of_the_last_system_that_runs_a_form(tmp_path):
    path = tmp_path / "timeline.json"
    case = (*SMALL, "--locality", "mt_bench", "--form", "elastic", "--form", "planned", "--timeline", str(path))
    run(*case, "--hardware", "elmoe3d_8gb", "--hardware", "xpu")
    first = path.read_text()
    run(*case, "--hardware", "xpu", "--hardware", "elmoe3d_8gb", "--force")
    assert first == path.read_text() and len(json.loads(first)["traceEvents"]) > 8


def test_a_short_trace_is_served_with_the_drafts_that_it_holds(short_trace):
    found = {row["form"]: row for row in rows(*SMALL, *BOTH, "--trace", short_trace) if row["system"] == "elmoe3d_8gb"}
    assert set(found) == {"ar", "eagle", "small_lm", "quant", "elastic"} and "error" not in found["elastic"]
    assert all(row["draft_length"] <= 8 for row in found.values())


def test_a_trace_that_holds_no_draft_says_so(tmp_path):
    path = str(tmp_path / "tiny.parquet")
    run("trace", "synthesise", "mt_bench", path, *SHORT, "--positions", "4")
    with pytest.raises(ElmoeError, match="ends before the first step"):
        run(*SMALL, *BOTH, "--trace", path)


def test_a_dense_model_is_refused_as_such_with_a_trace_too(short_trace):
    with pytest.raises(ElmoeError, match=r"'granite-3\.1-8b' has no layer with experts"):
        run("simulate", "--model", "granite-3.1-8b", "--batch", "1", "--hardware", "xpu", "--trace", short_trace)


def test_results_state_the_modelling_and_the_trace(short_trace):
    case = (*SMALL, *BOTH, "--form", "ar", "--json")
    told = [json.loads(run(*case, *more).stdout)["conditions"] for more in ((), ("--before",), ("--trees",))]
    assert [one["modelling"]["split"] for one in told] == ["by_rate", "msb_first", "by_rate"]
    assert [len(one["modelling"]["trees"]) for one in told] == [0, 0, 2] and "trace" not in told[0]
    assert json.loads(run(*case, "--trace", short_trace).stdout)["conditions"]["trace"] == short_trace


@pytest.mark.parametrize("folder", ["Qwen3-30B-A3B", "hub/models--Qwen--Qwen3-30B-A3B/snapshots/1234"])
def test_the_folder_of_a_model_has_the_model_s_own_locality(folder, tmp_path):
    path = Path(tmp_path / folder)
    path.mkdir(parents=True)
    (path / "config.json").write_text(model_text("qwen3-30b-a3b"))
    case = ("simulate", "--batch", "1", "--hardware", "xpu", "--hardware", "elmoe3d_8gb", "--form", "ar", "--model")
    mine, preset = (rows(*case, model) for model in (str(path), "qwen3-30b-a3b"))
    assert [row["model"] for row in mine] != [row["model"] for row in preset]
    assert [row | {"model": ""} for row in mine] == [row | {"model": ""} for row in preset]
