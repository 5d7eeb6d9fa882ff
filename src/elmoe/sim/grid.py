"""The grid: systems x forms x models x prompts x batch sizes, on all cores."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from elmoe.errors import BudgetError, HardwareError
from elmoe.hw.machine import Machine
from elmoe.models.load import load_model
from elmoe.processors import processors
from elmoe.schema.drafters import Drafters, load_drafters
from elmoe.schema.hardware import Hardware
from elmoe.sim.modelling import TODAY, Modelling
from elmoe.sim.rivals import Setting, is_ours
from elmoe.sim.routing import check_routing, facts_of, localities_of
from elmoe.sim.rows import row_of, static_watts
from elmoe.sim.simulate import Priced, Simulation
from elmoe.sim.workload import RoutingReplay
from elmoe.systems.forms import FORMS, FormName, Odds, TableOdds, rival_odds
from elmoe.trace.batches import BatchRouting
from elmoe.untrusted import short

PAPER_ODDS = tuple(Odds(f"{value:g}", value, "published range") for value in (0.33, 0.6, 0.91))
"""The paper's range of Elastic-SD acceptance, and between."""

SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


@dataclass(frozen=True)
class Grid:
    """What to simulate. ``odds``: acceptances of elastic drafts, a row each; ``systems``: the first is the reference.
    ``prompts``: localities of the routing, ``model`` for each model's own (see :mod:`elmoe.sim.routing`); ``batch_routing``:
    how much the sequences of a batch agree. ``lengths``: draft lengths, None for those of the modelling. ``trace``: replayed
    in place of synthetic facts. ``drafters``: what the rivals draft with. ``setting``: which rivals ``systems`` and
    ``drafters`` hold, for labels, and what they draft with. ``modelling``: what of the engine's ways is simulated."""

    systems: tuple[Hardware, ...]
    models: tuple[str, ...]
    prompts: tuple[str, ...]
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    forms: tuple[FormName, ...] = FORMS
    odds: tuple[Odds | TableOdds, ...] = PAPER_ODDS
    lengths: tuple[int, ...] | None = None
    context: int = 1024
    steps: int = 24
    trace: Path | None = None
    drafters: Drafters = field(default_factory=load_drafters)
    setting: Setting = field(default_factory=Setting)
    batch_routing: BatchRouting = "fitted"
    modelling: Modelling = TODAY


def run_grid(
    grid: Grid, progress: Callable[[int, int], None] | None = None, workers: int | None = None
) -> list[dict[str, Any]]:
    """All rows; (model, prompts) groups run side by side on ``workers`` processes (all cores by default)."""
    return run_grids([grid], progress, workers)[0]


def run_grids(
    grids: Sequence[Grid], progress: Callable[[int, int], None] | None = None, workers: int | None = None
) -> list[list[dict[str, Any]]]:
    """All rows of each of several grids over the same models, prompts and trace, such as one setting of the rivals each.

    Facts are replayed once for all of them, and a system that several grids have in common is priced once.
    """
    grid = grids[0]
    for each in grids:
        check_names(each)
        if _routing(each) != _routing(grid):
            raise HardwareError("grids that run together have the same models, prompts, trace and batch routing")
    check_routing(grid.prompts, grid.batch_routing, grid.trace, grid.batches)
    localities = {model: grid.prompts if grid.trace else localities_of(model, grid.prompts) for model in grid.models}
    groups = [(grids, model, prompts) for model in grid.models for prompts in localities[model]]
    rows: list[list[dict[str, Any]]] = [[] for _ in grids]
    if len(grids) > 1 and workers == 1:
        for index, group in enumerate(groups):
            for mine, found in zip(rows, _run_packed(group), strict=True):
                mine += found
            if progress is not None:
                progress(index + 1, len(groups))
        return rows
    if len(grids) == 1 and (workers == 1 or len(groups) == 1):
        steps = len(groups) * len(grid.batches)
        for index, group in enumerate(groups):
            for done, found in enumerate(batches_of_group(grid, *group[1:]), index * len(grid.batches) + 1):
                rows[0] += found
                if progress is not None:
                    progress(done, steps)
        return rows
    pool = ProcessPoolExecutor(min(workers or processors(), len(groups)), initializer=_serve_parent)
    try:
        futures = [pool.submit(_run_packed, group) for group in groups]  # not map, which cancels what it leaves
        for index, future in enumerate(futures):
            for mine, found in zip(rows, future.result(), strict=True):
                mine += found
            if progress is not None:
                progress(index + 1, len(groups))
    except BaseException:  # Ctrl-C too: what runs is not waited for
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(wait=False)
        raise
    pool.shutdown()
    return rows


def _routing(grid: Grid) -> tuple[Any, ...]:
    return grid.models, grid.prompts, grid.trace, grid.batch_routing


def _serve_parent() -> None:
    """Of a worker: Ctrl-C reaches the whole process group, and the parent ends its workers; Linux, where it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def check_cases(grid: Grid) -> None:
    """HardwareError where no system runs any of the forms: there would be no row."""
    if not any(True for hardware in grid.systems for _ in cases_of(grid, hardware)):
        choice = grid.setting.rival_drafts
        drafts = "" if choice == "all" else f" with rivals' drafts '{choice}'"
        raise HardwareError(
            f"none of the systems runs {' or '.join(grid.forms)}{drafts}",
            "elastic and planned need slices of experts in a fast memory, as ELMoE-3D has them; every system runs ar",
        )


def check_rows(rows: Sequence[dict[str, Any]]) -> None:
    """HardwareError where nothing of a grid fits its system."""
    if all("error" in row for row in rows):
        raise HardwareError(
            rows[0]["error"], "choose a smaller model, smaller batches, a shorter --context or larger memories"
        )


def check_names(grid: Grid) -> None:
    """HardwareError where two things of a kind have one name: their rows could not be told apart."""
    odds = [item.label for item in grid.odds]
    kinds: tuple[tuple[str, list[Any], str], ...] = (
        ("systems", [system.name for system in grid.systems], "change `name:` in one of the YAML files"),
        ("models", [load_model(name).name for name in grid.models], "rename the folder of one of them"),
        ("prompt sets", list(grid.prompts), "give each once"),
        ("batch sizes", list(grid.batches), "give each once"),
        ("forms", list(grid.forms), "give each once"),
        ("acceptances", odds, "give each once, in files of different names"),
    )
    for kind, names, hint in kinds:
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise HardwareError(f"two {kind} have the name '{short(twice)}'", hint)


def _run_packed(group: tuple[Sequence[Grid], str, str]) -> list[list[dict[str, Any]]]:
    grids, model, prompts = group
    replay = RoutingReplay(facts_of(load_model(model), prompts, grids[0].trace, grids[0].batch_routing))
    return [[row for rows in batches_of_group(grid, model, prompts, replay) for row in rows] for grid in grids]


def batches_of_group(
    grid: Grid, model_name: str, prompts: str, replay: RoutingReplay | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Rows of one model and prompt set, batch size by batch size; what does not fit becomes a row with ``error``, and so do
    all systems where the first one, the reference, is too small.

    :param replay: of the group's facts, if other grids share them.
    """
    model = load_model(model_name)
    replay = replay or RoutingReplay(facts_of(model, prompts, grid.trace, grid.batch_routing))
    facts = replay.facts
    simulation = Simulation(model, replay, grid.drafters, grid.context, grid.steps, grid.modelling)
    machines = [Machine(hardware) for hardware in grid.systems]
    for batch in grid.batches:
        rows = []
        reference, lacking = _reference(simulation, machines[0], batch)
        watts = {} if reference is None else _static_watts(simulation, machines, reference, batch)
        for machine in machines:
            for form, odds in cases_of(grid, machine.hardware):
                labels = {
                    "system": machine.hardware.name, "form": form, "model": model.name, "prompts": prompts, "batch": batch,
                    "acceptance": None if odds is None else odds.label, "locality": facts.source,
                } | grid.setting.labels  # fmt: skip
                if reference is None:
                    others = "" if machine is machines[0] else ", and every system is compared to it"
                    rows.append(labels | {"error": lacking + others})
                    continue
                try:
                    priced = simulation.price(machine, form, batch, odds, grid.lengths)
                except (BudgetError, HardwareError) as error:
                    rows.append(labels | {"error": str(error)})
                    continue
                row = row_of(priced, machine, labels, watts)
                row["speedup"] = row["tokens_per_second"] * reference.seconds / reference.tokens
                row["efficiency"] = {
                    name: (float(reference.whole.joules.sum()) + watts[name] * reference.seconds) / reference.tokens / joules
                    for name, joules in row["joules_per_token"].items()
                }
                rows.append(row)
        yield rows


def _reference(simulation: Simulation, machine: Machine, batch: int) -> tuple[Priced | None, str]:
    """Plain decoding of the first system, which all are compared to; None and why where the model does not fit it."""
    try:
        return simulation.price(machine, "ar", batch), ""
    except (BudgetError, HardwareError) as error:
        return None, str(error)


def _static_watts(simulation: Simulation, machines: list[Machine], reference: Priced, batch: int) -> dict[str, float]:
    """Of all systems: a share of what the plain xPU draws, or the first system where there is none, or too small a one."""
    drawn, share = reference, machines[0].hardware.static_share
    for machine in machines[1:]:
        if machine.hardware.name == "xpu":
            with suppress(BudgetError, HardwareError):
                drawn, share = simulation.price(machine, "ar", batch), machine.hardware.static_share
    return static_watts(drawn, share.low, share.value, share.high)


def cases_of(grid: Grid, hardware: Hardware) -> Iterator[tuple[FormName, Odds | TableOdds | None]]:
    """Forms that a system can run, with the acceptances to run them at."""
    for form in grid.forms:
        if not grid.setting.drafts_with(hardware, form):
            continue
        if form == "ar":
            yield form, None
        elif form in ("elastic", "bit_axis", "planned"):
            if is_ours(hardware):
                yield from ((form, odds) for odds in grid.odds)
        else:
            yield form, rival_odds(form, grid.drafters)


def best(rows: Sequence[dict[str, Any]], key: str = "tokens_per_second") -> dict[str, Any] | None:
    """The row of the highest rate, None of none."""
    return max((row for row in rows if "error" not in row), key=lambda row: row[key], default=None)
