"""From which acceptance on elastic drafts pay: 0.33 to 0.95, by batch, against the same hardware without drafts."""

from __future__ import annotations

from elmoe.report.figures import lines
from elmoe.report.section import Section, Table
from elmoe.systems.forms import Odds
from experiments.common import Scope, mean, rows_of, select, study, systems

POINTS = (0.33, 0.45, 0.6, 0.7, 0.8, 0.85, 0.91, 0.95)


def run(scope: Scope) -> Section:
    """Sweep of acceptance."""
    odds = tuple(Odds(f"{p:g}", p, "swept") for p in POINTS)
    rows = rows_of(scope, systems(scope, ("xpu", "elmoe3d_8gb")), forms=("ar", "elastic"), odds=odds)
    series, pays = {}, []
    for batch in scope.batches:
        plain = mean(row["speedup"] for row in select(rows, system="elmoe3d_8gb", form="ar", batch=batch))
        gains = [
            mean(row["speedup"] for row in select(rows, form="elastic", batch=batch, acceptance=o.label)) / plain
            for o in odds
        ]
        series[f"batch {batch}"] = (POINTS, gains)
        first = next((point for point, gain in zip(POINTS, gains, strict=True) if gain > 1), None)
        pays.append(f"batch {batch}: " + (f"from {first:g}" if first else "never"))
    return Section(
        name="acceptance",
        title="Acceptance at which elastic drafts pay",
        claim="The paper: acceptance 0.33-0.91; drafts at large batch, plain decoding with the cache at small.",
        verdict="Over plain decoding on the same hardware, mean over models and prompts: " + ", ".join(pays) + ".",
        command="python -m experiments.fig05_acceptance.run",
        figures=(lines("Elastic drafts over plain decoding, ELMoE-3D 8 GB", series, "acceptance", "x plain"),),
        tables=(
            Table(
                title="Elastic over plain on the same hardware",
                status="simulated",
                columns=("acceptance", *series),
                rows=tuple((p, *(gains[i] for _, gains in series.values())) for i, p in enumerate(POINTS)),
            ),
        ),
    )


if __name__ == "__main__":
    study("fig05_acceptance", run, options=("locality", "batch-routing"))
