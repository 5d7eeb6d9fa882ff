"""Localities and batch routings in the simulator: by name, as they were, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from elmoe.cli.main import cli
from elmoe.errors import ElmoeError, HardwareError, TraceError
from elmoe.models.described import described_text
from elmoe.models.load import load_model, model_text
from elmoe.schema.hardware import load_hardware
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.paper import MODELS, OWN_LOCALITY, PROMPTS
from elmoe.sim.routing import (
    POSITIONS,
    PROMPT,
    SAMPLED_LAYERS,
    SEED,
    SEQUENCES,
    check_routing,
    facts_of,
    localities_of,
    own_locality,
)  # fmt: skip
from elmoe.trace import load_locality, save_locality, synthesise
from elmoe.trace.batches import BATCH_ROUTINGS


def run(*arguments: str):
    result = CliRunner().invoke(cli, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def simulated(*arguments: str) -> list[dict]:
    basic = ("simulate", "--hardware", "elmoe3d_8gb", "--form", "ar", "--batch", "4", "--json")
    return json.loads(run(*basic, *arguments).stdout)["rows"]


def test_the_prompt_sets_of_before_are_a_choice_bit_for_bit():
    """The facts are those of the locality, sizes and seed that were the only ones."""
    model = load_model("gpt-oss-20b")
    old = synthesise(
        load_locality("gsm8k"),
        model.spec.experts,
        model.spec.top_k,
        SAMPLED_LAYERS,
        SEQUENCES,
        POSITIONS,
        SEED,
        prompt=PROMPT,
    )
    new = facts_of(model, "gsm8k")
    assert np.array_equal(new.ranked, old.ranked) and new.source == old.source
    assert (SAMPLED_LAYERS, SEQUENCES, PROMPT, POSITIONS, SEED) == (8, 16, 64, 320, 0)
    rows = simulated("--model", "gpt-oss-20b", "--locality", "prompts")
    assert [row["prompts"] for row in rows] == list(PROMPTS)
    assert rows == simulated("--model", "gpt-oss-20b", *(word for name in PROMPTS for word in ("--prompts", name)))


def test_the_paper_models_have_their_own_locality_and_it_is_the_default():
    for name in MODELS:
        own = own_locality(load_model(name))
        assert own is not None and own.model == name and localities_of(name, (OWN_LOCALITY,)) == (OWN_LOCALITY,)
    (row,) = simulated("--model", "qwen3-30b-a3b")
    assert row["prompts"] == "model" and "published: qwen3-30b-a3b" in row["locality"]
    assert [row] == simulated("--model", "qwen3-30b-a3b", "--locality", "model")
    (named,) = simulated("--model", "qwen3-30b-a3b", "--locality", "qwen3-30b-a3b")
    assert named == row | {"prompts": "qwen3-30b-a3b"}
    (other,) = simulated("--model", "qwen3-30b-a3b", "--locality", "mt_bench")
    assert row["msb_hit_rate"] > other["msb_hit_rate"]


def test_a_model_of_which_nothing_is_known_takes_the_prompt_sets(tmp_path):
    assert own_locality(load_model("mixtral-8x22b")) is None
    assert localities_of("mixtral-8x22b", (OWN_LOCALITY, "gsm8k")) == PROMPTS
    assert localities_of("qwen3-30b-a3b", ("gsm8k", OWN_LOCALITY)) == ("gsm8k", OWN_LOCALITY)
    path = tmp_path / "qwen3-30b-a3b.json"  # the name, but not the experts, of a model that is known
    path.write_text(model_text("qwen3-30b-a3b").replace('"num_experts": 128', '"num_experts": 64'))
    assert own_locality(load_model(path)) is None
    with pytest.raises(TraceError, match="nothing published of the routing of 'mixtral-8x22b'"):
        facts_of(load_model("mixtral-8x22b"), OWN_LOCALITY)


def test_both_ends_of_a_band_are_localities():
    hits = []
    for end in ("-low", "", "-high"):
        (row,) = simulated("--model", "glm-4.7-flash", "--locality", f"glm-4.7-flash{end}")
        assert "band" in row["locality"]
        hits.append(row["msb_hit_rate"])
    assert hits[0] < hits[2] and hits[0] <= hits[1] <= hits[2]


def test_a_file_is_a_locality(tmp_path):
    path = tmp_path / "mine.json"
    save_locality(load_locality("gpt-oss-20b"), path)
    (row,) = simulated("--model", "gpt-oss-20b", "--locality", str(path))
    (own,) = simulated("--model", "gpt-oss-20b")
    assert row == own | {"prompts": str(path)}


def test_batch_routings_bound_the_experts_of_a_batch():
    rows = {name: simulated("--model", "deepseek-v2-lite", "--batch-routing", name)[0] for name in BATCH_ROUTINGS}
    active = {name: row["active_experts"] for name, row in rows.items()}
    assert active["identical"] == 6 < active["alike"] < active["fitted"] < active["apart"]
    speed = {name: row["tokens_per_second"] for name, row in rows.items()}
    assert speed["identical"] > speed["alike"] > speed["fitted"] > speed["apart"]
    assert all(rows[name]["locality"].endswith(f"sequences {name}") for name in ("apart", "alike", "identical"))
    data = json.loads(
        run("simulate", "--hardware", "xpu", "--model", "gpt-oss-20b", "--form", "ar", "--batch", "1", "--batch-routing",
            "apart", "--json").stdout
    )  # fmt: skip
    assert data["conditions"]["batch_routing"] == "apart" and data["conditions"]["prompts"] == ["model"]


def test_the_tables_say_whose_routing_it_is():
    told = run("simulate", "--hardware", "xpu", "--model", "gpt-oss-20b", "--form", "ar", "--batch", "1").stdout
    assert "routing of gpt-oss-20b: published: gpt-oss-20b" in told


def test_what_is_unknown_is_refused_by_name(tmp_path):
    xpu = ("simulate", "--hardware", "xpu", "--model", "gpt-oss-20b", "--form", "ar", "--batch", "1")
    with pytest.raises(ElmoeError, match="there is no locality 'mt_bank'") as caught:
        run(*xpu, "--locality", "mt_bank")
    assert caught.value.hint == "did you mean 'mt_bench'?"
    refused = CliRunner().invoke(cli, [*xpu, "--batch-routing", "near"])
    assert refused.exit_code == 2 and "'near' is not one of 'fitted', 'apart', 'alike', 'identical'" in refused.output
    grid = Grid((load_hardware("xpu"),), ("gpt-oss-20b",), ("gsm8k",), (1,), ("ar",), batch_routing="near")  # type: ignore[arg-type]
    with pytest.raises(HardwareError, match="no batch routing 'near'"):
        run_grid(grid, workers=1)
    trace = tmp_path / "t"
    trace.write_bytes(b"")
    with pytest.raises(HardwareError, match="as it was recorded"):
        run(*xpu, "--trace", str(trace), "--batch-routing", "apart")


def test_the_description_of_the_documents_is_simulated(tmp_path):
    """The lines of docs/simulator.md."""
    document = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()
    text = document.split("```yaml\n", 1)[1].split("```", 1)[0]
    path = tmp_path / "my-model.yaml"
    path.write_text(text)
    rows = simulated("--model", str(path), "--locality", "qwen3-30b-a3b")
    assert [row["model"] for row in rows] == ["my-model"] and rows[0]["tokens_per_second"] > 0
    assert run("simulate", "--show-preset", "gemma-4-26b-a4b").stdout == described_text("gemma-4-26b-a4b")


def test_localities_are_refused_before_a_study_starts():
    check_routing(("mt_bench", OWN_LOCALITY), "fitted", None, (1,))
    with pytest.raises(ElmoeError, match="there is no locality 'mt_bank'"):
        check_routing(("mt_bench", "mt_bank"), "fitted", None, (1,))
