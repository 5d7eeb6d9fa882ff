"""The headline at both ends of what is not measured of routing: how much a batch agrees on its experts, and how local
GLM-4.7-Flash is, of which one number is published.

No published measurement tells how many experts a batch of separate texts touches. `apart`: sequences share no preference, so
that they touch the most experts; `alike`: they share all of it but what changes from token to token; `identical`: all route
as one. Rivals are the published set, without expert caches and with caches of whole experts.

Grid: 4 models x 4 batch routings, and GLM-4.7-Flash at 2 further localities, x 5 batch sizes x 6 systems x all forms, twice.
Cost: about 3 minutes on 2 cores.
"""

from __future__ import annotations

from dataclasses import replace

from elmoe.report.figures import bars
from elmoe.report.headline import PAPER, compare, summary
from elmoe.report.section import Section, Table
from elmoe.sim.grid import Grid, run_grids
from elmoe.sim.rivals import Setting
from elmoe.systems.forms import FORMS
from elmoe.terminal import progress_bar
from elmoe.trace.batches import BATCH_ROUTINGS
from experiments.common import Scope, study

SYSTEMS = ("xpu", "xpu_pim", "xpu_logicpim", "xpu_nmp", "hb_xpu", "elmoe3d_8gb")
SETTINGS = (Setting("published", "none"), Setting("published", "lru"))
BAND, BAND_ENDS = "glm-4.7-flash", ("glm-4.7-flash-low", "glm-4.7-flash", "glm-4.7-flash-high")
PLOTTED = "0.6"
Ratios = dict[str, dict[str, tuple[float, float]]]
Case = tuple[str, str, Ratios]
"""(what varies, expert cache of the rivals, ratios by acceptance)."""


def run(scope: Scope) -> Section:
    """The headline of every end."""
    cases = [case for routing in BATCH_ROUTINGS for case in cases_of(scope, f"batches {routing}", batch_routing=routing)]
    if BAND in scope.models:
        only = replace(scope, models=(BAND,))
        cases += [case for name in BAND_ENDS for case in cases_of(only, name, prompts=(name,))]
    names = list(dict.fromkeys(name for name, _, _ in cases))
    series = {
        f"{ratio}, rivals' expert cache {cache}": [
            next(found[PLOTTED][ratio][0] for name, kept, found in cases if (name, kept) == (wanted, cache))
            for wanted in names
        ]
        for ratio in ("speed over xPU", "speed over best prior")
        for cache in ("none", "lru")
        if ratio != "speed over xPU" or cache == "none"
    }
    return Section(
        name="bounds", title="The headline at both ends of what is not measured",
        claim="The paper: " + ", ".join(f"{name} {mean}x" for name, (mean, _) in PAPER.items()) + ".",
        verdict="\n".join(f"{name}: {_range(cases, name)}." for name in PAPER),
        command="python -m experiments.fig12_bounds.run",
        figures=(bars(f"Means at acceptance {PLOTTED}", names, series, "ratio"),), tables=(_table(cases),),
    )  # fmt: skip


def cases_of(scope: Scope, name: str, **changed: object) -> list[Case]:
    """The headline against both settings of the rivals, whose replays are shared."""
    grids = [
        replace(
            Grid(setting.systems(SYSTEMS), scope.models, scope.prompts, scope.batches, FORMS, drafters=setting.drafters,
                 setting=setting),
            **changed,
        )
        for setting in SETTINGS
    ]  # fmt: skip
    with progress_bar(name, len(scope.models)) as bar:
        found = run_grids(grids, lambda done, total: bar(done, total))
    return [
        (name, setting.labels["expert_cache"], summary(compare(rows))) for setting, rows in zip(SETTINGS, found, strict=True)
    ]


def _range(cases: list[Case], ratio: str) -> str:
    """Least and greatest mean over the routings of batches, by acceptance."""
    told = []
    for label in cases[0][2]:
        values = [found[label][ratio][0] for name, _, found in cases if name.startswith("batches")]
        told.append(f"{min(values):.2f}x to {max(values):.2f}x at {label}")
    return ", ".join(told)


def _table(cases: list[Case]) -> Table:
    rows = [
        (name, cache, label, *(value for ratio in PAPER for value in ratios[ratio]))
        for name, cache, found in cases
        for label, ratios in found.items()
    ]
    return Table(
        title="Speed and energy efficiency by routing, against the published rivals", status="simulated",
        columns=(
            "routing", "rivals' expert cache", "acceptance",
            *(f"{ratio}, {kind}" for ratio in PAPER for kind in ("mean", "max")),
        ),
        rows=tuple(rows),
    )  # fmt: skip


if __name__ == "__main__":
    study("fig12_bounds", run, labels=True, options=("locality",))
