"""The headline against rivals as presets have them and as their own sources publish them, with and without expert caches and
drafts; and what each step from the one description to the other is worth.

Facts are replayed once and priced in every setting. Cost: the grid under a minute on 2 cores, the
steps another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from elmoe.report.figures import bars
from elmoe.report.headline import PAPER, Comparison, compare, summary
from elmoe.report.section import Section, Table
from elmoe.schema.drafters import Drafters
from elmoe.schema.hardware import Hardware
from elmoe.sim.grid import Grid, run_grids
from elmoe.sim.rivals import FORMS_OF, Setting, changes
from elmoe.systems.forms import Odds
from elmoe.terminal import progress_bar
from experiments.common import Scope, mean, study

RIVALS = ("xpu", "xpu_pim", "xpu_logicpim", "xpu_nmp", "hb_xpu")
OURS = ("xpu", "elmoe3d_8gb")
KEPT: tuple[Setting, ...] = (
    Setting(), Setting("generous", "none"), Setting("generous", "lru"), Setting("published", "none"),
    Setting("published", "lru"), Setting("duplex", "none"), Setting("duplex", "lru"),
)  # fmt: skip
"""Descriptions and caches that are priced; the first is what every other study compares with."""
DRAFTS = ("none", "eagle", "all")
ODDS = Odds("0.6", 0.6, "published range")
PLOTTED = ODDS.label
STEP_BATCHES = (1, 4, 16)


@dataclass(frozen=True)
class Case:
    """Rows of one setting: description, cache, drafts."""

    rivals: str
    expert_cache: str
    rival_drafts: str
    comparisons: list[Comparison]

    @property
    def label(self) -> str:
        """For figures."""
        return f"{self.rivals}, cache {self.expert_cache}, drafts {self.rival_drafts}"


def run(scope: Scope) -> Section:
    """The grid of settings, then the steps."""
    cases = settings(scope)
    steps = waterfall(scope)
    words = []
    for case in cases:
        if case.expert_cache != "lru" and case.rival_drafts == "all":
            found = summary(case.comparisons)
            over = ", ".join(f"{ratios['speed over best prior'][0]:.2f}x at {label}" for label, ratios in found.items())
            words.append(f"{case.label}: {over}")
    figure_cases = [case for case in cases if PLOTTED in summary(case.comparisons)]
    series = {
        name: [summary(case.comparisons)[PLOTTED][name][0] for case in figure_cases]
        for name in ("speed over best prior", "energy over best prior")
    }
    return Section(
        name="rivals", title="Rivals as presets have them and as their own sources publish them",
        claim="The paper: 2.2x the speed and 1.4x the energy efficiency of the best prior system in each condition. Whom it "
        "compares with is not public: each description, expert cache and choice of drafts is a row here.",
        verdict="Speed over the best prior system, mean: " + "; ".join(words) + ".",
        command="python -m experiments.fig09_rivals.run",
        figures=(
            bars(f"Means over the best prior system at acceptance {PLOTTED}", [c.label for c in figure_cases], series, "x"),
            bars(
                f"Speed over the best prior system at acceptance {PLOTTED}, by step", [name for name, *_ in steps],
                {"alone": [row[1] for row in steps], "with those before it": [row[2] for row in steps]}, "x",
            ),
        ),
        tables=(_grid_table(cases), _step_table(steps), _by_model(cases), _fastest(cases)),
    )  # fmt: skip


def settings(scope: Scope) -> list[Case]:
    """Comparisons of every setting; the first case is the presets as they are described."""
    models, prompts = scope.models, scope.prompts[:1]
    grids = [Grid(Setting().systems(OURS), models, prompts, scope.batches, ("ar", "elastic"))]
    grids += [
        Grid(setting.systems(RIVALS), models, prompts, scope.batches, FORMS_OF["all"], drafters=setting.drafters,
             setting=setting)
        for setting in KEPT
    ]  # fmt: skip
    with progress_bar("models, all settings of the rivals", len(models)) as bar:
        ours, *theirs = run_grids(grids, lambda done, total: bar(done, total))
    return [
        Case(
            setting.rivals, setting.labels["expert_cache"], drafts,
            compare([*ours, *(row for row in rows if row["form"] in FORMS_OF[drafts] and not _plain(row))]),
        )
        for setting, rows in zip(KEPT, theirs, strict=True)
        for drafts in DRAFTS
    ]  # fmt: skip


def _plain(row: dict[str, Any]) -> bool:
    """The bare processor's plain row, which is among ours."""
    return bool(row["system"] == "xpu" and row["form"] == "ar")


def waterfall(scope: Scope) -> list[tuple[str, float, float, str]]:
    """(step, speed over the best prior system with it alone, with all before it too, source), first without any step."""
    models, prompts = scope.models, scope.prompts[:1]
    batches = tuple(batch for batch in scope.batches if batch in STEP_BATCHES) or scope.batches
    alone, added = list(changes(False, (*RIVALS, OURS[1]))), list(changes(True, (*RIVALS, OURS[1])))
    base = Setting()
    worlds: list[tuple[tuple[Hardware, ...], Drafters]] = [(base.systems((*RIVALS, OURS[1])), base.drafters)]
    worlds += [(change.systems, change.drafters) for change in (*alone, *added)]
    grids = [
        Grid(systems, models, prompts, batches, FORMS_OF["all"], (ODDS,), drafters=drafters) for systems, drafters in worlds
    ]
    with progress_bar("models, all steps", len(models)) as bar:
        found = run_grids(grids, lambda done, total: bar(done, total))
    ratios = [mean(c.speed_over_prior for c in compare(rows)) for rows in found]
    steps = [("presets", ratios[0], ratios[0], "")]
    for index, change in enumerate(alone):
        steps.append((change.name, ratios[1 + index], ratios[1 + len(alone) + index], change.source))
    return steps


RATIOS = tuple(PAPER)
LABELS = ("rivals", "expert cache", "rivals' drafts")


def _grid_table(cases: list[Case]) -> Table:
    paper: tuple[Any, ...] = ("the paper", "-", "-", "0.33 to 0.91", *(value for name in RATIOS for value in PAPER[name]))
    rows = [paper]
    for case in cases:
        for label, ratios in summary(case.comparisons).items():
            numbers = (value for name in RATIOS for value in ratios[name])
            rows.append((case.rivals, case.expert_cache, case.rival_drafts, label, *numbers))
    return Table(
        title="Speed and energy efficiency over the plain xPU and over the best prior system, by setting of the rivals",
        status="paper: published, maxima second-hand; the rest simulated",
        columns=(*LABELS, "acceptance", *(f"{name}, {kind}" for name in RATIOS for kind in ("mean", "max"))),
        rows=tuple(rows),
    )  # fmt: skip


def _step_table(steps: list[tuple[str, float, float, str]]) -> Table:
    return Table(
        title="From the presets to the published rivals, step by step: speed over the best prior system",
        status=f"simulated at acceptance {PLOTTED}, mean over models and batch sizes, all drafts",
        columns=("step", "alone", "with those before it", "source"), rows=tuple(steps),
    )  # fmt: skip


def _by_model(cases: list[Case]) -> Table:
    batches = sorted({c.batch for case in cases for c in case.comparisons})
    rows = []
    for case in cases:
        keys = dict.fromkeys((c.model, c.acceptance) for c in case.comparisons)
        for model, label in keys:
            mine = {c.batch: c for c in case.comparisons if (c.model, c.acceptance) == (model, label)}
            rows.append(
                (case.rivals, case.expert_cache, case.rival_drafts, model, label,
                 *(value for b in batches for value in (mine[b].speed_over_xpu, mine[b].speed_over_prior,
                                                        mine[b].energy_over_prior["middle"])))
            )  # fmt: skip
    kinds = ("speed over xPU", "speed over prior", "energy over prior")
    return Table(
        title="The same by model and batch", status="simulated", folded=True,
        columns=(*LABELS, "model", "acceptance", *(f"{kind}, batch {b}" for b in batches for kind in kinds)),
        rows=tuple(rows),
    )  # fmt: skip


def _fastest(cases: list[Case]) -> Table:
    rows = []
    for case in cases:
        counts: dict[str, int] = {}
        for c in case.comparisons:
            if c.acceptance == PLOTTED:
                counts[c.prior] = counts.get(c.prior, 0) + 1
        rows += [
            (case.rivals, case.expert_cache, case.rival_drafts, name, count)
            for name, count in sorted(counts.items(), key=lambda item: -item[1])
        ]
    return Table(
        title="Which prior system is the fastest, conditions", status="simulated", folded=True,
        columns=(*LABELS, "system, form", "conditions"), rows=tuple(rows),
    )  # fmt: skip


if __name__ == "__main__":
    study("fig09_rivals", run, labels=True, options=("locality",))
