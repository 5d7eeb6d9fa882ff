"""Several grids at once: what they share is replayed and priced once, and changes no row."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elmoe.report.headline import compare
from elmoe.schema.hardware import load_hardware
from elmoe.sim.grid import Grid, run_grid, run_grids
from elmoe.sim.modelling import BEFORE, TODAY, TREES
from elmoe.sim.steps import elmoe_steps
from elmoe.systems.forms import Odds

SYSTEMS = tuple(load_hardware(name) for name in ("xpu", "hb_xpu", "elmoe3d_8gb"))
START = Grid(
    SYSTEMS, ("gpt-oss-20b",), ("gsm8k",), (2,), ("ar", "eagle", "elastic"), (Odds("0.6", 0.6, "assumed"),), steps=3,
    modelling=BEFORE,
)  # fmt: skip


@pytest.fixture(scope="module")
def grids():
    found = [START]
    for step in elmoe_steps():
        found.append(step.of(found[-1]))
    return found


def test_steps_change_a_grid_one_after_the_other(grids):
    assert [step.name for step in elmoe_steps()] and all(step.reason for step in elmoe_steps())
    assert grids[-2].modelling == TODAY and grids[-1].modelling.trees == TREES
    assert len({grid.modelling for grid in grids}) == len(grids)


def test_rows_of_several_grids_are_those_of_each_alone(grids):
    together = run_grids(grids, workers=1)
    assert together == [run_grid(grid, workers=1) for grid in grids]
    speeds = [compare(rows)[0].speed_over_xpu for rows in together]
    assert speeds[-1] > speeds[0]


def test_the_planner_s_choice_is_compared_apart_from_what_is_best_afterwards(grids):
    rows = run_grid(replace(grids[-2], forms=("ar", "eagle", "elastic", "planned")), workers=1)
    (best,), (planned,) = compare(rows), compare(rows, planned=True)
    assert best.mode in ("ar", "elastic") and planned.mode == "planned"
    mine = next(row for row in rows if row["form"] == "planned")
    bare = next(row for row in rows if (row["system"], row["form"]) == ("xpu", "ar"))
    assert planned.speed_over_xpu == mine["tokens_per_second"] / bare["tokens_per_second"]
    choices = {row["form"]: row["choice"] for row in rows}
    assert choices == dict.fromkeys(("ar", "eagle", "elastic"), "best of all, afterwards") | {
        "planned": "by the planner, as it runs"
    }
    assert 0 <= mine["drafting_steps"] <= 1 and rows[0]["drafting_steps"] is None
