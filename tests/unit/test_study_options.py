"""The command line of a study takes the options that its numbers depend on, and refuses the others."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from experiments import common
from experiments.common import OPTIONS, Scope, study
from experiments.fig11_where import run as where

from elmoe.report.section import Section, Table
from elmoe.sim.paper import OWN_LOCALITY, PROMPTS
from elmoe.sim.rivals import Setting

FOLDER = Path(common.__file__).parent
GIVEN = {
    "locality": ("--locality", "prompts", "--locality", "qwen3-30b-a3b"),
    "batch-routing": ("--batch-routing", "apart"),
    "rivals": ("--rivals", "published", "--expert-cache", "lru", "--rival-drafts", "eagle"),
}


def studied(monkeypatch, tmp_path, arguments: tuple[str, ...], **named: object) -> tuple[Scope, Section]:
    scopes, written = [], []

    def run(scope: Scope) -> Section:
        scopes.append(scope)
        table = Table(title="t", status="simulated", columns=("a",), rows=((1,),))
        return Section(name="n", title="n", claim="c", verdict="v", command="x", tables=(table,), figures=())

    monkeypatch.setattr(sys, "argv", ["study", *arguments, "--out", str(tmp_path / "out.json")])
    monkeypatch.setattr(common, "write_section", lambda section, path: written.append(section))
    study("n", run, **named)
    return scopes[0], written[0]


def test_all_options_reach_the_scope(monkeypatch, tmp_path):
    scope, section = studied(monkeypatch, tmp_path, tuple(one for each in GIVEN.values() for one in each))
    assert scope.prompts == (*PROMPTS, "qwen3-30b-a3b") and scope.batch_routing == "apart"
    assert scope.setting == Setting("published", "lru", "eagle")
    assert section.tables[0].status == "simulated; rivals: published, expert cache: lru, drafts: eagle"


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_without_a_say_is_refused(option, monkeypatch, tmp_path, capsys):
    others = tuple(one for one in OPTIONS if one != option)
    with pytest.raises(SystemExit):
        studied(monkeypatch, tmp_path, GIVEN[option], options=others)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_tables_name_rivals_only_where_a_study_compares_with_them(monkeypatch, tmp_path):
    scope, section = studied(monkeypatch, tmp_path, (), options=("locality",))
    assert section.tables[0].status == "simulated" and scope == Scope(prompts=(OWN_LOCALITY,))


def test_where_the_claim_holds_depends_on_how_a_batch_agrees(monkeypatch):
    grids = []
    monkeypatch.setattr(where, "run_grid", lambda grid: grids.append(grid) or [])
    where.rows_by_factor(Scope(("qwen3-30b-a3b",), batches=(1,), batch_routing="alike"))
    assert [grid.batch_routing for grid in grids] == ["alike"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("fig*/run.py")), ids=lambda path: path.parent.name)
def test_a_study_that_makes_its_own_grids_takes_no_option_that_they_ignore(path):
    text = path.read_text()
    offered = text[text.index("study(") :]
    takes = OPTIONS if "options=" not in offered else tuple(one for one in OPTIONS if f'"{one}"' in offered)
    if "rows_of(scope" not in text:
        assert ("rivals" in takes) == ("scope.setting" in text)
        assert ("batch-routing" in takes) == ("scope.batch_routing" in text)
        assert ("locality" in takes) == ("scope.prompts" in text)
