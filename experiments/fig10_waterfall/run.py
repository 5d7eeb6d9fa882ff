"""What each change of the simulator is worth: alone, and after those before it.

The first steps bring the simulated ELMoE-3D to what the engine does, from the simulator of version 0.1 on; rivals have what
belongs to the model or to all systems too: the embedding table outside the fast memory, windows, and draft lengths. Then
rivals become what their own sources publish, keep no experts, and each model's routing is as local as was published of it;
token trees, which the engine does not have, come last.
One row takes the mode and the draft length that the engine's planner chooses as it runs, in place of the best ones
afterwards.

Grid: 4 models x 1 prompt set x 3 batch sizes x 6 systems x all forms, once for each step alone and in sequence; `--all`:
all batch sizes. Cost: about 90 seconds on 2 cores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from elmoe.report.figures import bars
from elmoe.report.headline import PAPER, compare, summary
from elmoe.report.section import Section, Table
from elmoe.sim.grid import PAPER_ODDS, Grid, run_grids
from elmoe.sim.modelling import BEFORE, TODAY
from elmoe.sim.paper import SYSTEMS
from elmoe.sim.steps import Stage, stages
from elmoe.systems.forms import FORMS
from elmoe.terminal import progress_bar
from experiments.common import Scope, study, systems

USUAL = Scope(batches=(1, 4, 16))
LOCALITIES = ("mt_bench",)
"""Of version 0.1: the demo model's routing of a prompt set, in each model's shape."""
OURS = "elmoe3d_8gb"
MIDDLE = PAPER_ODDS[1:2]
"""Acceptance of the changes alone."""
RATIOS = tuple(PAPER)


def run(scope: Scope) -> Section:
    """The waterfall."""
    hardware = systems(scope, [name for name in SYSTEMS if name != "elmoe3d_4gb"])
    start = Grid(hardware, scope.models, LOCALITIES, scope.batches, FORMS, modelling=BEFORE)
    steps = list(stages(start))
    added = [start, *(step.added for step in steps)]
    alone = [replace(step.alone, odds=MIDDLE) for step in steps]
    engine = next(grid for grid in added if grid.modelling == TODAY)
    planned = replace(engine, systems=systems(scope, ("xpu", OURS)), forms=("planned",))
    grids = [*added, *alone, planned]
    rows = _rows(grids)
    names = ["as of version 0.1", *(step.name for step in steps)]
    sequence = [summary(compare(found, OURS)) for found in rows[: len(added)]]
    single = [sequence[0], *(summary(compare(found, OURS)) for found in rows[len(added) : -1])]
    chosen = summary(compare(rows[added.index(engine)] + rows[-1], OURS, planned=True))
    label = MIDDLE[0].label
    figures = tuple(
        bars(
            f"{name}, mean, acceptance {label}", names,
            {
                "this change alone": [None, *(one[label][name][0] for one in single[1:])],
                "with all before it": [one[label][name][0] for one in sequence],
            },
            "ratio",
        )
        for name in RATIOS
    )  # fmt: skip
    tables = (
        *(_sequence_table(odds.label, names, sequence, chosen) for odds in PAPER_ODDS),
        _alone_table(label, names, single), _reasons(steps),
    )  # fmt: skip
    return Section(
        name="waterfall", title="What each change of the simulator is worth", claim=_claim(),
        verdict=_verdict(sequence, chosen), command="python -m experiments.fig10_waterfall.run",
        tables=tables, figures=figures,
    )  # fmt: skip


def _rows(grids: Sequence[Grid]) -> list[list[dict[str, Any]]]:
    """Rows of every grid; those of one locality share their replays."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for prompts in dict.fromkeys(grid.prompts for grid in grids):
        mine = [index for index, grid in enumerate(grids) if grid.prompts == prompts]
        with progress_bar(f"models x localities ({', '.join(prompts)})", len(grids[0].models) * len(prompts)) as bar:
            found = run_grids([grids[index] for index in mine], lambda done, total: bar(done, total))
        rows |= dict(zip(mine, found, strict=True))
    return [rows[index] for index in range(len(grids))]


Ratios = dict[str, dict[str, tuple[float, float]]]


def _claim() -> str:
    told = ", ".join(f"{name} {mean}x" for name, (mean, _) in PAPER.items())
    return f"The paper's means: {told}. Which of the simulator's choices the distance to them comes from."


def _verdict(sequence: Sequence[Ratios], chosen: Ratios) -> str:
    first, last = sequence[0], sequence[-1]
    lines = [
        f"{name}: "
        + ", ".join(f"{first[odds][name][0]:.2f}x to {last[odds][name][0]:.2f}x at acceptance {odds}" for odds in first)
        + "."
        for name in RATIOS
    ]
    planned = ", ".join(f"{ratios['speed over xPU'][0]:.2f}x at {odds}" for odds, ratios in chosen.items())
    return "\n".join([*lines, f"Speed over xPU without trees, as the engine's planner chooses: {planned}."])


def _sequence_table(label: str, names: Sequence[str], sequence: Sequence[Ratios], chosen: Ratios) -> Table:
    rows = [
        (name, *(value for ratio in RATIOS for value in ratios[label][ratio]), "afterwards")
        for name, ratios in zip(names, sequence, strict=True)
    ]
    mine = tuple(value for ratio in RATIOS for value in chosen[label][ratio])
    rows.append(("without trees, the planner's choice", *mine, "by the planner, as it runs"))
    return Table(
        title=f"Changes in sequence, acceptance {label}", status="simulated",
        columns=("after", *(f"{ratio}, {kind}" for ratio in RATIOS for kind in ("mean", "max")), "mode chosen"),
        rows=tuple(rows),
    )  # fmt: skip


def _alone_table(label: str, names: Sequence[str], single: Sequence[Ratios]) -> Table:
    base = single[0][label]
    rows: list[tuple[Any, ...]] = []
    for name, ratios in zip(names, single, strict=True):
        mine = ratios[label]
        changes = (f"{mine[ratio][0] / base[ratio][0] - 1:+.1%}" for ratio in RATIOS)
        rows.append((name, *(mine[ratio][0] for ratio in RATIOS), *changes))
    return Table(
        title=f"Each change alone, acceptance {label}: means", status="simulated",
        columns=("change", *RATIOS, *(f"{ratio}, change" for ratio in RATIOS)), rows=tuple(rows),
    )  # fmt: skip


def _reasons(steps: Sequence[Stage]) -> Table:
    return Table(
        title="Where the changes come from", status="sources", columns=("change", "source"),
        rows=tuple((step.name, step.reason) for step in steps),
    )  # fmt: skip


if __name__ == "__main__":
    study("fig10_waterfall", run, USUAL, options=())
