"""Sets of rivals: what each says, that steps compose, and what drafts and caches cost."""

from __future__ import annotations

import json
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from elmoe.cli.main import cli
from elmoe.errors import BudgetError, HardwareError
from elmoe.hw.machine import Machine
from elmoe.models.load import load_model
from elmoe.report.headline import compare, is_rival, missing_rivals, preset_of, setting_words
from elmoe.report.overview import overview
from elmoe.schema.constants import Bandwidth, Capacity, Ratio
from elmoe.schema.drafters import Tree, load_drafters
from elmoe.schema.hardware import load_hardware, preset_text
from elmoe.schema.provenance import constants
from elmoe.schema.rivals import Step, drafters_after, rival_sets, rivals_of_text, steps_of, system_after, variant_names
from elmoe.sim.grid import Grid, run_grid, run_grids
from elmoe.sim.paper import RIVAL_SETS, SYSTEMS
from elmoe.sim.result import SimulationResult, result_of
from elmoe.sim.rival_checks import _priced, _two_h100, rival_checks
from elmoe.sim.rivals import Setting, changes, is_ours, with_expert_cache
from elmoe.sim.simulate import Simulation
from elmoe.sim.workload import Plan, RoutingReplay
from elmoe.systems.forms import (
    DraftShape,
    Odds,
    dense_passes,
    draft_cost,
    draft_model_bytes,
    odds_of_yield,
    rival_shapes,
    shape_of,
)  # fmt: skip
from tests.physics.machines import MODEL, facts, hardware, known, memory

RIVALS = ("xpu_pim", "xpu_logicpim", "xpu_nmp", "hb_xpu")
PUBLISHED = drafters_after(steps_of("published"))


def test_the_generous_rivals_are_the_presets_themselves():
    assert Setting().systems(SYSTEMS) == tuple(load_hardware(name) for name in SYSTEMS)
    assert Setting().drafters == load_drafters() and not load_drafters().eagle.trees
    assert Setting().labels == {"rivals": "generous", "expert_cache": "as described", "rival_drafts": "all"}
    assert set(rival_sets()) == set(RIVAL_SETS) - {"generous"}


@pytest.mark.parametrize("rivals", ["published", "duplex"])
def test_a_set_changes_every_rival_and_neither_the_bare_processor_nor_ours(rivals):
    systems = Setting(rivals).systems(SYSTEMS)
    assert [s.name for s in systems] == ["xpu", *(f"{name}_{rivals}" for name in RIVALS), "elmoe3d_4gb", "elmoe3d_8gb"]
    for name, system in zip(SYSTEMS, systems, strict=True):
        preset = load_hardware(name)
        for field in ("main", "compute", "sram", "links", "vector", "static_share"):
            assert getattr(system, field) == getattr(preset, field), (name, field)
        if name not in RIVALS:
            assert system == preset
    assert {f"{name}_{rivals}" for name in RIVALS} <= set(variant_names())


def test_what_the_published_rivals_say():
    pim, logic, nmp, hb = Setting("published").systems(RIVALS)
    external = load_hardware("xpu").main.bandwidth.value
    assert pim.near.bandwidth.value == pytest.approx(8 * external) and pim.near.intensity.value == 1.95
    assert (pim.near.dense, pim.near.narrow, logic.near.dense, logic.near.experts) == (
        "faster",
        "twice",
        "processor",
        "both",
    )
    assert nmp.near.bandwidth.value == pytest.approx(32 * 25.6e9) and nmp.fast.bandwidth.value == pytest.approx(2 * 12.8e9)
    assert pim.near.energy.value == pytest.approx(0.15 * 3.88e-12, rel=0.01) and pim.near.mac_energy.value == 0.3e-12
    assert not nmp.features.expert_cache and not hb.features.expert_cache and hb.features.fast_dense
    gemv = pim.near.efficiency.value * 8 / 0.9334
    assert gemv == pytest.approx(6.1, rel=0.01)  # LP5X-PIM Sim, over reads at the efficiency of refresh
    duplex = Setting("duplex").systems(RIVALS)[0].near
    assert (duplex.bandwidth.value / external, duplex.intensity.value, duplex.dense) == (pytest.approx(16), 1, "processor")


def test_every_changed_constant_has_a_source_of_its_own():
    for name in variant_names():
        for path, constant in constants(load_hardware(name)):
            assert len(constant.source) > 10 and constant.low <= constant.value <= constant.high, (name, path)
    for step in (*steps_of("published"), *steps_of("duplex")):
        assert len(step.name) > 10 and len(step.source) > 20 and (step.systems or step.drafters)
    assert {path for path, _ in constants(PUBLISHED)} >= {"eagle.trees.0.committed", "eagle.trees.3.width"}


def test_steps_alone_and_one_on_top_of_the_other():
    alone, added = list(changes(False)), list(changes(True))
    assert [c.name for c in alone] == [c.name for c in added] == [step.name for step in steps_of("published")]
    assert added[-1].systems == Setting("published").systems(SYSTEMS) and added[-1].drafters == PUBLISHED
    presets = Setting().systems(SYSTEMS)
    for step, change in zip(steps_of("published"), alone, strict=True):
        for name, system, preset in zip(SYSTEMS, change.systems, presets, strict=True):
            assert (system == preset) == (name not in step.systems), (step.name, name)
        assert (change.drafters == load_drafters()) == (not step.drafters), step.name
        assert (change.source, change.name) == (step.source, step.name)


@pytest.mark.parametrize(
    ("systems", "match"),
    [
        ({"xpu_pim": {"near": {"width": 3}}}, "width"),
        ({"xpu_pim": {"near": {"dense": "sometimes"}}}, "dense"),
        ({"xpu_nmp": {"near": {"experts": "both"}}}, "placement: main"),
        ({"xpu_pim": {"near": {"efficiency": {"value": "120 %", "source": "a source", "status": "assumed"}}}}, "100 %"),
    ],
)
def test_a_step_that_names_what_is_not_there_is_refused_by_name(systems, match):
    step = Step(name="a step", source="a source", systems=systems)
    with pytest.raises(HardwareError, match=match):
        system_after(next(iter(systems)), [step])


def test_sets_and_settings_that_do_not_exist_are_refused_by_name():
    with pytest.raises(HardwareError, match=r"mine\.yaml.*kindness"):
        rivals_of_text("name: x\ndescription: y\nsteps: []\nkindness: 3\n", "mine.yaml")
    with pytest.raises(HardwareError, match="no set of rivals 'kind'"):
        steps_of("kind")
    with pytest.raises(HardwareError, match="trees"):
        drafters_after([Step(name="a", source="b", drafters={"eagle": {"trees": 3}})])
    for wrong in (("kind",), ("published", "some"), ("published", None, "medusa")):
        with pytest.raises(HardwareError, match=wrong[-1]):
            Setting(*wrong)


def test_expert_caches_of_rivals_are_an_axis_and_ours_stays():
    for name in ("hb_xpu", "xpu_nmp"):
        features = {c: with_expert_cache(load_hardware(name), c).features for c in ("none", "static", "lru")}
        assert [(f.expert_cache, f.refill) for f in features.values()] == [(False, False), (True, False), (True, True)]
    for name in ("elmoe3d_8gb", "xpu", "xpu_pim"):
        assert with_expert_cache(load_hardware(name), "none") == load_hardware(name)


def test_an_expert_cache_keeps_whole_experts_of_a_description_that_could_slice_them():
    ours = load_hardware("elmoe3d_8gb")
    other = msgspec.structs.replace(ours, features=msgspec.structs.replace(ours.features, expert_cache=False))
    assert ours.features.bit_slices and not is_ours(with_expert_cache(other, "lru"))


def test_what_rivals_draft_with_is_an_axis_and_ours_always_runs():
    ours, rival = load_hardware("elmoe3d_8gb"), load_hardware("hb_xpu")
    forms = ("ar", "eagle", "small_lm", "quant")
    run = {drafts: [f for f in forms if Setting(rival_drafts=drafts).drafts_with(rival, f)] for drafts in
           ("none", "eagle", "all")}  # fmt: skip
    assert run == {"none": ["ar"], "eagle": ["ar", "eagle"], "all": list(forms)}
    assert all(Setting(rival_drafts="none").drafts_with(ours, form) for form in (*forms, "elastic"))


def tree(tokens: int, levels: int, width: int, committed: float) -> Tree:
    return Tree(tokens=known(Ratio, tokens), levels=known(Ratio, levels), width=known(Ratio, width),
                committed=known(Ratio, committed))  # fmt: skip


def test_a_tree_spreads_its_tokens_and_commits_what_was_measured():
    assert shape_of(tree(16, 4, 4, 2.54)) == DraftShape(4, (3, 3, 3, 2), 4)
    assert shape_of(tree(4, 3, 3, 1.99)) == DraftShape(3, (), 3)
    for shape, odds in rival_shapes("eagle", PUBLISHED):
        tokens = 1 + shape.levels + sum(shape.siblings)
        measured = next(t for t in PUBLISHED.eagle.trees if t.tokens.value == tokens)
        assert sum(odds.value**level for level in range(shape.levels + 1)) == pytest.approx(measured.committed.value)
        assert shape.words == f"tree of {tokens} in {shape.levels} levels"
    assert odds_of_yield(1.86, 3) == pytest.approx(PUBLISHED.eagle.acceptance.value, abs=0.001)
    assert not rival_shapes("small_lm", PUBLISHED) and not rival_shapes("eagle", load_drafters())


@pytest.mark.parametrize(
    ("numbers", "match"), [((16, 4, 4, 5.5), "committed"), ((4, 4, 2, 2), "more 'tokens'"), ((4.5, 3, 2, 2), "whole")]
)
def test_a_tree_that_cannot_be_is_refused(numbers, match):
    with pytest.raises(ValueError, match=match):
        tree(*numbers)


def test_a_verified_tree_computes_all_its_tokens_and_reads_more_experts_than_its_chain():
    replay = RoutingReplay(facts())

    def odds(share: float, depth: int) -> float:
        return 0.6

    chain = replay.run(Plan(4, "external", 3, 64, 16, 8), odds)
    wide = replay.run(Plan(4, "external", 3, 64, 16, 8, siblings=(2, 1, 0)), odds)
    assert wide.committed.tolist() == chain.committed.tolist()
    assert set(chain.target.tokens) == {16.0} and set(wide.target.tokens) == {28.0}
    assert (wide.target.active >= chain.target.active).all() and wide.target.active.sum() > chain.target.active.sum()
    assert set(wide.target.attended) == {28 * 64.0} and set(wide.target.cached) == {4 * 64.0}


def test_a_tree_is_drafted_level_by_level():
    machine = Machine(hardware(main=memory(1e9, 64e9, 4e-12)))
    drafters = msgspec.structs.replace(load_drafters(), eagle=msgspec.structs.replace(
        load_drafters().eagle, trees=(tree(8, 3, 3, 2.2),)))  # fmt: skip
    simulation = Simulation(MODEL, RoutingReplay(facts()), drafters, context=64, steps=4)
    run = simulation.price(machine, "eagle", 2, Odds("0.5", 0.5, "assumed"), ())

    def level(tokens: int) -> np.ndarray:
        return draft_cost("eagle", machine, MODEL, drafters, None, np.full(4, 2.0 * tokens), 2, 64).latency

    np.testing.assert_allclose(run.draft.latency, level(1) + 2 * level(3), rtol=1e-12)
    assert set(run.workload.target.tokens) == {16.0}


def test_a_drafter_with_a_cache_reads_and_stores_its_keys_and_values():
    model, tokens = load_model("qwen3-30b-a3b"), np.full(1, 16.0)
    machine = Machine(load_hardware("xpu"))
    assert draft_model_bytes("small_lm", model, load_drafters(), 16 * 1024) == draft_model_bytes(
        "small_lm", model, load_drafters())  # fmt: skip
    small = load_model("qwen3-0.6b")
    kv = 28 * 2 * 8 * 128 * 2  # layers, keys and values, heads, width, fp16
    assert small.spec.kv_bytes_per_position == kv
    stored = draft_model_bytes("small_lm", model, PUBLISHED, 16 * 1024)
    assert stored == pytest.approx(small.total_bytes + 16 * 1024 * kv)
    read = draft_cost("small_lm", machine, model, PUBLISHED, None, tokens, 16, 1024).traffic["main"].sum()
    assert read == pytest.approx(small.active_bytes - small.embedding_bytes / small.spec.vocabulary + 16 * 1024 * kv)
    own = model.layers[-1].kv_bytes
    eagle = [draft_cost("eagle", machine, model, PUBLISHED, None, tokens, 16, context) for context in (0, 1024)]
    assert (eagle[1].traffic["main"] - eagle[0].traffic["main"]).sum() == pytest.approx(16 * 1024 * own)
    head = draft_model_bytes("eagle", model, PUBLISHED, 0)
    weights = model.layers[-1].attention_parameters + 12 * 2048**2 + 32000 * 2048
    assert head == pytest.approx(weights * 8.5 / 8)
    assert draft_model_bytes("eagle", model, PUBLISHED, 100) == pytest.approx(head + 100 * own)
    assert eagle[0].traffic["main"].sum() == pytest.approx(head)  # the vocabulary head of its own, not the target's
    passes = dense_passes(np.full(2, 32.0), 16, 1024)
    assert passes.active.shape == (2, 0) and passes.sequences.tolist() == [16.0] * 2
    assert passes.attended.tolist() == [32 * 1024.0] * 2 and passes.cached.tolist() == [16 * 1024.0] * 2


def test_a_fast_memory_without_experts_must_still_hold_what_is_in_it():
    small = msgspec.structs.replace(load_hardware("hb_xpu_published"), fast=memory(1e12, 1e9, 1e-12))
    simulation = Simulation(MODEL, RoutingReplay(facts()), load_drafters(), context=64, steps=4)
    assert simulation.price(Machine(small), "ar", 1).tokens > 0
    tiny = msgspec.structs.replace(small, fast=msgspec.structs.replace(small.fast, capacity=known(Capacity, 1e6)))
    with pytest.raises(BudgetError, match=r"dense parts and KV cache of 'tiny' .* 'hb_xpu_published'"):
        simulation.price(Machine(tiny), "ar", 1)


@pytest.fixture(scope="module")
def grids():
    odds = (Odds("0.6", 0.6, "assumed"),)
    settings = (Setting(), Setting("published", "lru"), Setting("published", "none", "eagle"))
    names = ("xpu", *RIVALS, "elmoe3d_8gb")
    return [
        Grid(setting.systems(names), ("qwen3-30b-a3b",), ("mt_bench",), (4,), odds=odds, lengths=(2,), steps=4,
             drafters=setting.drafters, setting=setting)
        for setting in settings
    ]  # fmt: skip


def test_grids_together_are_the_grids_alone(grids):
    together = run_grids(grids, workers=1)
    assert together == [run_grid(grid, workers=1) for grid in grids]
    for grid, rows in zip(grids, together, strict=True):
        assert all(row.items() >= grid.setting.labels.items() for row in rows)
    assert {row["form"] for row in together[2] if is_rival(row["system"])} == {"ar", "eagle"}
    other = msgspec.structs.replace(grids[0].drafters)
    mixed = Grid(grids[0].systems, ("qwen3-30b-a3b",), ("gsm8k",), drafters=other)
    with pytest.raises(HardwareError, match="same models, prompts, trace"):
        run_grids([grids[0], mixed])


def test_comparisons_know_rivals_of_every_set_and_say_which(grids):
    rows = run_grid(grids[1], workers=1)
    found = compare(rows)[0]
    assert set(found.over_rivals) == {"xpu", *(f"{name}_published" for name in RIVALS)} and not missing_rivals(rows)
    assert [preset_of(name) for name in ("xpu_pim_published", "xpu_pim_duplex", "hb_xpu", "my_own")] == [
        "xpu_pim", "xpu_pim", "hb_xpu", "my_own"]  # fmt: skip
    result = SimulationResult.of(grids[1], rows)
    assert {item["drafter"] for item in result.conditions["drafters"]} >= {"eagle.acceptance", "eagle.trees.1.committed"}
    again = result_of(json.loads(json.dumps(result.as_dict())), "x")
    section = overview(again.rows, again.conditions, "x")
    words = "rivals: published, expert cache: lru, drafts: all"
    assert all(words in table.status for table in section.tables) and all(words in f.title for f in section.figures)
    assert all(words in figure.plot["layout"]["title"]["text"] for figure in section.figures)
    assert setting_words({}) == "" and words in overview(rows, {"reference": "xpu"}, "x").tables[0].status


def test_the_options_of_simulate():
    small = ["simulate", "--model", "qwen3-30b-a3b", "--prompts", "mt_bench", "--batch", "1", "--hardware", "xpu"]
    run = CliRunner().invoke(
        cli, [*small, "--hardware", "xpu_pim", "--rivals", "published", "--rival-drafts", "none", "--json"]
    )
    data = json.loads(run.stdout)
    assert [(row["system"], row["form"], row["rivals"]) for row in data["rows"]] == [
        ("xpu", "ar", "published"), ("xpu_pim_published", "ar", "published")]  # fmt: skip
    assert (data["conditions"]["rivals"], data["conditions"]["rival_drafts"]) == ("published", "none")
    text = CliRunner().invoke(cli, [*small, "--form", "ar"]).stdout
    assert "rivals: generous, expert cache: as described, drafts: all" in " ".join(text.split())
    for option in (["--rivals", "kind"], ["--expert-cache", "some"], ["--rival-drafts", "medusa"]):
        refused = CliRunner().invoke(cli, [*small, *option])
        assert refused.exit_code == 2 and option[1] in refused.stderr
    shown = CliRunner().invoke(cli, ["simulate", "--show-preset", "xpu_nmp_published"])
    assert shown.stdout == preset_text("xpu_nmp_published") and "name: xpu_nmp_published" in shown.stdout


def test_a_published_description_can_be_copied_and_what_is_changed_is_the_users(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(preset_text("xpu_pim_published").replace("819.2 GB/s", "1.6 TB/s").replace("xpu_pim_published", "mine"))
    mine = load_hardware(path)
    assert mine.near.bandwidth.status == "user" and "819.2 GB/s" in mine.near.bandwidth.source
    assert mine.near.efficiency == load_hardware("xpu_pim_published").near.efficiency
    assert isinstance(mine.near.bandwidth, Bandwidth)


def test_every_check_of_a_rival_is_close_or_says_why_not():
    checks = rival_checks()
    assert len(checks) == 13
    for check in checks:
        assert abs(check.error) < 0.15 or len(check.reason) > 5, check.name
        assert not check.fitted or abs(check.error) < 0.1, check.name
    by_name = {check.name.split(",")[0]: check for check in checks}
    assert by_name["H2-LLM over in-die NMP"].predicted == pytest.approx(2.72, rel=0.25)


def test_the_two_h100_decode_plainly_as_published():
    plain = _priced(_two_h100(), "ar", None)
    assert plain.tokens / plain.seconds == pytest.approx(222.47, rel=1e-9)


def test_the_progress_of_grids_on_several_processes_ends_at_the_whole():
    names, seen = ("xpu", "hb_xpu"), []
    grid = Grid(Setting().systems(names), ("qwen3-30b-a3b",), ("mt_bench", "gsm8k"), (1,), ("ar",), steps=2)
    rows = run_grids([grid, grid], lambda done, total: seen.append((done, total)), workers=2)
    alone: list[tuple[int, int]] = []
    assert run_grids([grid, grid], lambda done, total: alone.append((done, total)), workers=1) == rows and alone == seen
    twice = replace(grid, forms=("ar", "ar"))
    with pytest.raises(HardwareError, match="two forms have the name 'ar'"):
        run_grids([grid, twice], workers=1)
    assert seen == [(1, 2), (2, 2)] and rows[0] == rows[1] and len(rows[0]) == 4
