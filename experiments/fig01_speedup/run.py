"""Speed-up and energy by batch size against every system: the paper's headline.

Grid: 4 models with their own localities, 5 batch sizes, 7 systems, all forms, and ELMoE-3D as the engine's planner decides.
Cost: about 40 seconds on 2 cores.
"""

from __future__ import annotations

from elmoe.report.overview import overview
from elmoe.report.section import Section
from experiments.common import Scope, rows_of, study, systems


def run(scope: Scope) -> Section:
    """The headline section."""
    rows = rows_of(scope, systems(scope))
    rows += rows_of(scope, systems(scope, ("xpu", "elmoe3d_8gb")), forms=("planned",))
    return overview(rows, {"reference": "xpu"}, "python -m experiments.fig01_speedup.run")


if __name__ == "__main__":
    study("fig01_speedup", run, labels=True)
