"""Changes of a study one after the other: named steps from one grid to the next, and the rows of all of them at once.

Facts are synthesised and replayed once for all grids; what two grids have in common is priced once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from elmoe.models.load import load_model
from elmoe.processors import processors
from elmoe.sim.grid import Grid, batches_of_group
from elmoe.sim.modelling import STEPS
from elmoe.sim.routing import facts_of
from elmoe.sim.workload import RoutingReplay

Row = dict[str, Any]


@dataclass(frozen=True)
class GridStep:
    """A change of a grid. ``reason``: where it comes from."""

    name: str
    of: Callable[[Grid], Grid]
    reason: str


def elmoe_steps() -> list[GridStep]:
    """What brings ELMoE-3D, and the models on all systems, from ``modelling.BEFORE`` to what the engine does, then trees."""

    def change(index: int) -> Callable[[Grid], Grid]:
        return lambda grid: replace(grid, modelling=STEPS[index].of(grid.modelling))

    return [GridStep(step.name, change(index), step.reason) for index, step in enumerate(STEPS)]


def rows_of_grids(
    grids: Sequence[Grid], progress: Callable[[int, int], None] | None = None, workers: int | None = None
) -> list[list[Row]]:
    """Rows of every grid; all have the models, prompts and trace of the first. Groups of (model, prompts) run side by side
    on ``workers`` processes (all cores by default)."""
    groups = [(grids, model, prompts) for model in grids[0].models for prompts in grids[0].prompts]
    rows: list[list[Row]] = [[] for _ in grids]
    count = min(workers or processors(), len(groups))
    with ProcessPoolExecutor(count) as pool:
        for index, found in enumerate(pool.map(_rows_of_group, groups) if count > 1 else map(_rows_of_group, groups)):
            for mine, more in zip(rows, found, strict=True):
                mine += more
            if progress is not None:
                progress(index + 1, len(groups))
    return rows


def _rows_of_group(group: tuple[Sequence[Grid], str, str]) -> list[list[Row]]:
    grids, model, prompts = group
    replay = RoutingReplay(facts_of(load_model(model), prompts, grids[0].trace, grids[0].batch_routing))
    return [[row for rows in batches_of_group(grid, model, prompts, replay) for row in rows] for grid in grids]
