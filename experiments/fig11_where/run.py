"""Where the claimed 6.6x over the plain xPU would hold: by locality of the routing, acceptance of drafts, and batch size.

Each model's routing is made more and less local than published of it: all that is not white noise in the synthesiser's
scores, times a factor. A cell is the mean over models of the better of plain decoding and elastic drafts, known afterwards.
No constant of the hardware changes.

Grid: 4 models x 6 factors x 6 acceptances x 3 batch sizes x 2 systems. Cost: about 3 minutes on 2 cores.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from elmoe.models.load import load_model
from elmoe.report.figures import heat_map
from elmoe.report.headline import PAPER
from elmoe.report.section import Section, Table
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.routing import own_locality
from elmoe.systems.forms import Odds
from elmoe.terminal import progress_bar
from elmoe.trace.fit_published import scaled
from elmoe.trace.locality import save_locality
from experiments.common import Scope, mean, select, study, systems

FACTORS = (0.5, 0.75, 1.0, 1.5, 2.5, 4.0)
ACCEPTANCES = (0.33, 0.5, 0.6, 0.75, 0.91, 0.97)
OURS = "elmoe3d_8gb"
CLAIMED = PAPER["speed over xPU"][0]
USUAL = Scope(batches=(1, 4, 16))
Rows = dict[float, list[dict[str, Any]]]


def run(scope: Scope) -> Section:
    """A heat map for each batch size."""
    rows = rows_by_factor(scope)
    hits = {
        factor: mean(row["msb_hit_rate"] for row in select(found, system=OURS, form="ar", batch=1))
        for factor, found in rows.items()
    }
    cells = {
        batch: [[cell(rows[factor], batch, chance) for chance in ACCEPTANCES] for factor in FACTORS]
        for batch in scope.batches
    }
    labels = [f"x {factor:g} ({hits[factor]:.0%} hits)" for factor in FACTORS]
    return Section(
        name="where", title=f"Where {CLAIMED}x the plain xPU would hold",
        claim=f"The paper: {CLAIMED}x the speed of the xPU, mean over batch 1 to 16. Locality: what is published of each "
        "model's routing is x 1; in brackets the share of expert uses that 8 GB hold in plain decoding at batch 1.",
        verdict="\n".join(_verdict(batch, values) for batch, values in cells.items()),
        command="python -m experiments.fig11_where.run",
        figures=tuple(
            heat_map(
                f"Batch {batch}: speed over the plain xPU, mean over models", [f"{chance:g}" for chance in ACCEPTANCES],
                labels, values, "acceptance of a draft token", "locality, x published", CLAIMED,
            )
            for batch, values in cells.items()
        ),
        tables=tuple(
            Table(
                title=f"Batch {batch}: speed over the plain xPU, mean over models", status="simulated",
                columns=("locality", *(f"acceptance {chance:g}" for chance in ACCEPTANCES)),
                rows=tuple((label, *line) for label, line in zip(labels, values, strict=True)),
            )
            for batch, values in cells.items()
        ),
    )  # fmt: skip


def rows_by_factor(scope: Scope) -> Rows:
    """Rows of all models for each factor of their locality."""
    rows: Rows = {factor: [] for factor in FACTORS}
    odds = tuple(Odds(f"{chance:g}", chance, "assumed") for chance in ACCEPTANCES)
    with TemporaryDirectory() as folder, progress_bar("models", len(scope.models)) as bar:
        for index, model in enumerate(scope.models):
            own = own_locality(load_model(model))
            if own is None:
                raise ValueError(f"nothing published of the routing of '{model}' is known")
            files = {str(Path(folder) / f"{model}-{factor:g}.json"): factor for factor in FACTORS}
            for file, factor in files.items():
                save_locality(scaled(own, factor), file)
            grid = Grid(
                systems(scope, ("xpu", OURS)), (model,), tuple(files), scope.batches, ("ar", "elastic"), odds,
                batch_routing=scope.batch_routing,
            )  # fmt: skip
            for row in run_grid(grid):
                rows[files[row["prompts"]]].append(row)
            bar(index + 1, len(scope.models))
    return rows


def cell(rows: list[dict[str, Any]], batch: int, chance: float) -> float:
    """Mean over models of the better of plain decoding and drafts of this acceptance."""
    ours = [*select(rows, system=OURS, form="ar", batch=batch),
            *select(rows, system=OURS, form="elastic", batch=batch, acceptance=f"{chance:g}")]  # fmt: skip
    best: dict[str, float] = {}
    for row in ours:
        best[row["model"]] = max(best.get(row["model"], 0.0), row["speedup"])
    return mean(best.values())


def _verdict(batch: int, values: list[list[float]]) -> str:
    published = values[FACTORS.index(1.0)]
    reached = [chance for chance, value in zip(ACCEPTANCES, published, strict=True) if value >= CLAIMED]
    others = [
        f"acceptance {chance:g} with x {factor:g}"
        for column, chance in enumerate(ACCEPTANCES)
        for factor in [next((f for f, line in zip(FACTORS, values, strict=True) if line[column] >= CLAIMED), None)]
        if factor is not None
    ]
    if reached:
        return f"Batch {batch}: holds at the published locality from acceptance {reached[0]:g} on."
    if others:
        return f"Batch {batch}: does not hold at the published locality; it would hold from {', '.join(others)} on."
    most = max(max(line) for line in values)
    return f"Batch {batch}: does not hold at any locality and acceptance tried; the most is {most:.1f}x."


if __name__ == "__main__":
    study("fig11_where", run, USUAL, options=("batch-routing",))
