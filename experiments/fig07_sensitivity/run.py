"""How far the headline moves when each constant on which sources disagree goes to its least and greatest value."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from elmoe.errors import HardwareError
from elmoe.report.figures import tornado
from elmoe.report.headline import compare
from elmoe.report.section import Section, Table
from elmoe.schema.hardware import Hardware, load_hardware
from elmoe.sim.sweep import changed, ranged
from elmoe.systems.forms import Odds
from experiments.common import Scope, mean, rows_of, study

ODDS = Odds("0.6", 0.6, "published range")
RATIOS = {"speed over the xPU": "speed_over_xpu", "energy efficiency over the xPU": "energy_over_xpu"}


def run(scope: Scope) -> Section:
    """A tornado plot for speed and one for energy."""
    scope = Scope((scope.models[0],), (scope.prompts[0],), scope.batches)
    bare, ours = load_hardware("xpu"), load_hardware("elmoe3d_8gb")
    paths = {item.path: item.constant for machine in (bare, ours) for item in ranged(machine)}
    base = headline(scope, bare, ours)
    moved = {
        path: (
            headline(scope, at(bare, path, c.low), at(ours, path, c.low)),
            headline(scope, at(bare, path, c.high), at(ours, path, c.high)),
        )
        for path, c in paths.items()
    }
    figures, tables, words = [], [], []
    for title, key in RATIOS.items():
        low, high = [m[0][key] for m in moved.values()], [m[1][key] for m in moved.values()]
        figures.append(tornado(f"{title}: {base[key]:.2f}x", list(moved), low, high, base[key], "x"))
        tables.append(
            Table(
                title=title,
                status="simulated, acceptance 0.6",
                columns=("constant", "at its least", "at its greatest"),
                rows=tuple((path, a, b) for path, a, b in zip(moved, low, high, strict=True)),
            )
        )
        widest = max(moved, key=lambda path: abs(moved[path][1][key] - moved[path][0][key]))
        words.append(
            f"{title}: {base[key]:.2f}x, most moved by {widest} ({moved[widest][0][key]:.2f}-{moved[widest][1][key]:.2f}x)"
        )
    return Section(
        name="sensitivity",
        title="Constants on which sources disagree",
        claim="The headline does not hang on one assumed constant.",
        verdict=".\n".join(words) + ".",
        command="experiments/fig07_sensitivity/run.py",
        figures=tuple(figures),
        tables=tuple(tables),
    )


def at(hardware: Hardware, path: str, value: float) -> Hardware:
    """Changed where this system has the constant."""
    try:
        return changed(hardware, path, value)
    except HardwareError:
        return hardware


def headline(scope: Scope, bare: Hardware, ours: Hardware) -> dict[str, float]:
    """Means over batch sizes of the two ratios."""
    rows: list[dict[str, Any]] = rows_of(scope, (bare, ours), forms=("ar", "elastic"), odds=(ODDS,))
    comparisons = compare(rows)
    return {
        "speed_over_xpu": mean(c.speed_over_xpu for c in comparisons),
        "energy_over_xpu": mean(c.energy_over_xpu["middle"] for c in comparisons),
    }


if __name__ == "__main__":
    study("fig07_sensitivity", run)
