"""Changes of a study one after the other: named steps from one grid to the next, and the rows of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from elmoe.sim.grid import Grid
from elmoe.sim.modelling import STEPS


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
