"""A Perfetto (Chrome trace) file of simulated steps: what each resource does when."""

from __future__ import annotations

from pathlib import Path

from elmoe.chrome_trace import Span, write_chrome_trace
from elmoe.hw.cost import Cost
from elmoe.hw.machine import Machine
from elmoe.models.load import load_model
from elmoe.sim.grid import Grid, cases_of, check_cases
from elmoe.sim.routing import facts_of, localities_of
from elmoe.sim.simulate import Simulation
from elmoe.sim.workload import RoutingReplay

STEPS = 8


def write_timeline(grid: Grid, path: Path) -> None:
    """The first steps of the last system of the grid that runs any of its forms, in the last of these, at the last batch
    size; within a pass a resource's busy time is drawn from the pass's start, since a pass sums over layers.

    :raises HardwareError: no system runs any of the forms.
    """
    check_cases(grid)
    hardware, form, odds = [(system, *case) for system in grid.systems for case in cases_of(grid, system)][-1]
    batch = grid.batches[-1]
    model = load_model(grid.models[0])
    prompts = grid.prompts[0] if grid.trace else localities_of(grid.models[0], grid.prompts)[0]
    replay = RoutingReplay(facts_of(model, prompts, grid.trace, grid.batch_routing))
    simulation = Simulation(model, replay, grid.drafters, grid.context, grid.steps, grid.modelling)
    priced = simulation.price(Machine(hardware), form, batch, odds, grid.lengths)
    spans: list[Span] = []
    now = 0.0
    for step in range(min(STEPS, priced.workload.steps)):
        for name, cost in (("draft", priced.draft), ("target", priced.target)):
            if cost is not None:
                spans += pass_spans(f"{name} of step {step}", cost, step, now)
                now += float(cost.latency[step])
    write_chrome_trace(spans, path, lambda track: (track != "passes", track))


def pass_spans(name: str, cost: Cost, step: int, began: float) -> list[Span]:
    """The pass, and each resource that works in it."""
    working = {resource: busy[step] for resource, busy in cost.busy.items() if busy[step] > 0}
    seconds = {"passes": cost.latency[step]} | working
    return [Span(track, name, began, began + float(length)) for track, length in seconds.items()]
