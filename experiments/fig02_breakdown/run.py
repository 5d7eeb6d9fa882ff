"""Where time and energy go: drafts and target by resource, joules by component, for plain and elastic serving.

Expected: on LPDDR the main memory is busy all the time and takes most of the energy; with elastic drafts the time splits
between fast memory (drafts) and main memory (verification).
"""

from __future__ import annotations

from elmoe.report.figures import bars
from elmoe.report.section import Section, Table
from elmoe.sim.rivals import Setting
from elmoe.systems.forms import Odds
from experiments.common import Scope, mean, rows_of, select, study

ODDS = Odds("0.91", 0.91, "published range")
RESOURCES = ("main", "fast", "compute", "vector", "links")
CASES = (("xpu", "ar"), ("hb_xpu", "ar"), ("elmoe3d_8gb", "ar"), ("elmoe3d_8gb", "elastic"))


def run(scope: Scope) -> Section:
    """Breakdown of time and energy."""
    rows = rows_of(scope, Setting().systems(("xpu", "hb_xpu", "elmoe3d_8gb")), forms=("ar", "elastic"), odds=(ODDS,))
    figures, table = [], []
    for batch in (min(scope.batches), max(scope.batches)):
        cases = {f"{system}, {form}": select(rows, system=system, form=form, batch=batch) for system, form in CASES}
        seconds = {
            part: [mean(row[f"{part}_seconds_per_token"] * 1e3 for row in group) for group in cases.values()]
            for part in ("draft", "target")
        }
        components = sorted({name for group in cases.values() for row in group for name in row["dynamic_joules_per_token"]})
        joules = {
            name: [mean(row["dynamic_joules_per_token"].get(name, 0.0) * 1e3 for row in group) for group in cases.values()]
            for name in components
        }
        joules["static (middle share)"] = [
            mean((row["joules_per_token"]["middle"] - sum(row["dynamic_joules_per_token"].values())) * 1e3 for row in group)
            for group in cases.values()
        ]
        figures += [
            bars(f"Time per token, batch {batch}", list(cases), seconds, "ms", stacked=True),
            bars(f"Energy per token, batch {batch}", list(cases), joules, "mJ", stacked=True),
        ]
        for name, group in cases.items():
            busy = {
                r: mean(row["busy"].get(r, 0.0) for row in group) for r in ("main", "fast", "compute", "vector", "links")
            }
            table.append((f"batch {batch}: {name}", *busy.values()))
    busiest = max(RESOURCES, key=lambda resource: table[-1][1 + RESOURCES.index(resource)])
    return Section(
        name="breakdown",
        title="Where time and energy go",
        claim="Serving is memory-bound; elastic drafts move it to the fast memory.",
        verdict=f"Elastic at batch {max(scope.batches)} and acceptance 0.91: the busiest resource is '{busiest}'; the main "
        f"memory works {table[-1][1]:.0%} of the time, the fast one {table[-1][2]:.0%}, the multipliers "
        f"{table[-1][3]:.0%}.",
        command="python -m experiments.fig02_breakdown.run",
        figures=tuple(figures),
        tables=(
            Table(
                title="Share of time a resource works",
                status="simulated",
                columns=("case", *RESOURCES),
                rows=tuple(table),
            ),
        ),
    )


if __name__ == "__main__":
    study("fig02_breakdown", run, options=("locality", "batch-routing"))
