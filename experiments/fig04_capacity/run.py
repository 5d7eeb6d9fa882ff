"""How much fast memory, and how fast: capacity 1 to 32 GB and bandwidth 0.2 to 6.4 TB/s around the 8 GB preset."""

from __future__ import annotations

import msgspec

from elmoe.report.figures import lines
from elmoe.report.section import Section, Table
from elmoe.schema.hardware import load_hardware
from elmoe.sim.sweep import changed
from elmoe.systems.forms import Odds
from experiments.common import Scope, rows_of, select, study
from experiments.fig03_ablation.run import best_mean

CAPACITIES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
BANDWIDTHS = (0.2, 0.4, 0.8, 1.6384, 3.2, 6.4)
ODDS = Odds("0.6", 0.6, "published range")


def run(scope: Scope) -> Section:
    """Sweeps of the fast memory."""
    preset, bare = load_hardware("elmoe3d_8gb"), load_hardware("xpu")
    sweeps = {
        "capacity": [(f"{c} GB", float(c), changed(preset, "fast.capacity", c * 1e9)) for c in CAPACITIES],
        "bandwidth": [(f"{b} TB/s", b, changed(preset, "fast.bandwidth", b * 1e12)) for b in BANDWIDTHS],
    }
    figures, tables, words = [], [], []
    for kind, points in sweeps.items():
        machines = [msgspec.structs.replace(machine, name=name) for name, _, machine in points]
        rows = rows_of(scope, (bare, *machines), forms=("ar", "elastic"), odds=(ODDS,))
        series = {}
        for batch in scope.batches:
            fitting = [(x, select(rows, system=name, batch=batch)) for name, x, _ in points]
            known = [(x, best_mean(group, ("ar", "elastic"))) for x, group in fitting if group]
            series[f"batch {batch}"] = ([x for x, _ in known], [value for _, value in known])
        unit = "GB" if kind == "capacity" else "TB/s"
        figures.append(lines(f"Speed-up over the xPU by fast {kind}", series, unit, "x the xPU"))
        tables.append(
            Table(
                title=f"By {kind}",
                status="simulated, acceptance 0.6",
                columns=(unit, *series),
                rows=tuple(
                    (x, *(dict(zip(*values, strict=True)).get(x) for values in series.values())) for _, x, _ in points
                ),
            )
        )
        ends = {name: (values[1][0], values[1][-1]) for name, values in series.items() if values[1]}
        words.append(f"{kind}: " + ", ".join(f"{name} {a:.2f}x to {b:.2f}x" for name, (a, b) in ends.items()))
    return Section(
        name="capacity",
        title="Capacity and bandwidth of the fast memory",
        claim="More capacity holds more MSB slices; bandwidth only matters until the main memory binds.",
        verdict="From the least to the greatest " + ";\n".join(words) + ".\nWhat does not fit is left out.",
        command="python -m experiments.fig04_capacity.run",
        figures=tuple(figures),
        tables=tuple(tables),
    )


if __name__ == "__main__":
    study("fig04_capacity", run, options=("locality", "batch-routing"))
