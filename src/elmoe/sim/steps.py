"""Changes of a study one after the other: named steps from one grid to the next, and the rows of all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from elmoe.sim.grid import Grid
from elmoe.sim.modelling import STEPS
from elmoe.sim.paper import OWN_LOCALITY
from elmoe.sim.rivals import Setting, changes


@dataclass(frozen=True)
class GridStep:
    """A change of a grid. ``reason``: where it comes from."""

    name: str
    of: Callable[[Grid], Grid]
    reason: str


@dataclass(frozen=True)
class Stage:
    """``alone``: the first grid with one change. ``added``: with it and all before it."""

    name: str
    reason: str
    alone: Grid
    added: Grid


def stages(start: Grid) -> Iterator[Stage]:
    """From the simulator of version 0.1 with generous rivals to today's with published ones: what ELMoE-3D does as the
    engine does it, then the rivals' steps, of which the last is that no rival keeps experts, then each model's own
    locality, then token trees, which the engine does not have.
    """
    added = start
    *engine_steps, trees = elmoe_steps()
    for step in engine_steps:
        added = step.of(added)
        yield Stage(step.name, step.reason, step.of(start), added)
    names, engine = tuple(system.name for system in start.systems), added
    for single, several in zip(changes(False, names), changes(True, names), strict=True):
        added = replace(engine, systems=several.systems, drafters=several.drafters)
        alone = replace(start, systems=single.systems, drafters=single.drafters)
        yield Stage(f"rivals: {single.name}", single.source, alone, added)
    added = replace(added, setting=Setting("published"))
    own = (OWN_LOCALITY,)
    added = replace(added, prompts=own)
    yield Stage(
        "each model's own locality", "presets/published, fitted to published hit rates", replace(start, prompts=own), added
    )
    yield Stage(trees.name, trees.reason, trees.of(start), trees.of(added))


def elmoe_steps() -> list[GridStep]:
    """What brings ELMoE-3D, and the models on all systems, from ``modelling.BEFORE`` to what the engine does, then trees."""

    def change(index: int) -> Callable[[Grid], Grid]:
        return lambda grid: replace(grid, modelling=STEPS[index].of(grid.modelling))

    return [GridStep(step.name, change(index), step.reason) for index, step in enumerate(STEPS)]
