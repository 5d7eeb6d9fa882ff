"""A Perfetto (Chrome trace) file of simulated steps: what each resource does when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elmoe.files import json_text, write_whole
from elmoe.hw.cost import Cost
from elmoe.hw.machine import Machine
from elmoe.schema.architecture import load_architecture
from elmoe.sim.grid import Grid, facts_of
from elmoe.sim.simulate import Simulation
from elmoe.sim.workload import Replay

STEPS = 8


def write_timeline(grid: Grid, path: Path) -> None:
    """The first steps of the grid's last system and form at its largest batch; within a pass a resource's busy time is drawn
    from the pass's start, since a pass sums over layers."""
    hardware, form, batch = grid.systems[-1], grid.forms[-1], grid.batches[-1]
    model = load_architecture(grid.models[0])
    simulation = Simulation(
        model, Replay(facts_of(model, grid.prompts[0], grid.trace)), grid.drafters, grid.context, grid.steps
    )
    odds = grid.odds[-1] if form == "elastic" else None
    priced = simulation.price(Machine(hardware), form, batch, odds, grid.lengths)
    events: list[dict[str, Any]] = []
    now = 0.0
    for step in range(min(STEPS, priced.workload.steps)):
        for name, cost in (("draft", priced.draft), ("target", priced.target)):
            if cost is not None:
                now = _add(events, name, cost, step, now)
    write_whole(path, json_text({"traceEvents": events, "displayTimeUnit": "ms"}).encode())


def _add(events: list[dict[str, Any]], name: str, cost: Cost, step: int, now: float) -> float:
    seconds = float(cost.latency[step])
    label = f"{name} of step {step}"
    events.append(_event(label, "passes", now, seconds))
    events += [_event(label, resource, now, float(busy[step])) for resource, busy in cost.busy.items() if busy[step] > 0]
    return now + seconds


def _event(name: str, track: str, start: float, seconds: float) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": "simulated", "tid": track, "ts": start * 1e6, "dur": seconds * 1e6}
