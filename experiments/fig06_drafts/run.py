"""Speculative methods against each other on the same hardware (the paper: Elastic-SD 1.45x EAGLE-SD from batch 4)."""

from __future__ import annotations

from elmoe.report.figures import bars
from elmoe.report.section import Section, Table
from experiments.common import Scope, mean, rows_of, select, study, systems

CLAIMED = 1.45


def run(scope: Scope) -> Section:
    """Methods on ELMoE-3D with 8 GB."""
    rows, eagle = rows_of(scope, systems(scope, ("xpu", "elmoe3d_8gb"))), scope.setting.drafters.eagle.acceptance
    ours = select(rows, system="elmoe3d_8gb")
    series = {}
    for form, acceptance in dict.fromkeys((row["form"], row["acceptance"]) for row in ours):
        name = form if acceptance in (None, "preset") else f"{form} {acceptance}"
        series[name] = [
            mean(row["speedup"] for row in select(ours, form=form, acceptance=acceptance, batch=batch))
            for batch in scope.batches
        ]
    large = [i for i, batch in enumerate(scope.batches) if batch >= 4]
    ratios = {
        name: mean(values[i] / series["eagle"][i] for i in large)
        for name, values in series.items()
        if name.startswith("elastic")
    }
    words = ", ".join(f"{ratio:.2f}x at acceptance {name.split()[1]}" for name, ratio in ratios.items())
    reached = [name.split()[1] for name, ratio in ratios.items() if ratio >= CLAIMED]
    return Section(
        name="drafts",
        title="Speculative methods on the same hardware",
        claim=f"The paper (second-hand): Elastic-SD {CLAIMED}x EAGLE-SD from batch 4 on, MT-Bench.",
        verdict=f"Elastic over EAGLE-like drafts from batch 4 on: {words}. The claim is "
        + (f"reached at acceptance {', '.join(reached)}." if reached else "not reached in that range.")
        + f" EAGLE's chains accept {eagle.value:g} of the tokens ({eagle.status}), and its head costs little: its drafts "
        "lose where verification of rejected tokens must stream experts, as elastic ones do.",
        command="python -m experiments.fig06_drafts.run",
        figures=(bars("Methods, x the plain xPU", [f"batch {b}" for b in scope.batches], series, "x the xPU"),),
        tables=(
            Table(
                title="x the plain xPU, mean over models and prompts",
                status="simulated; acceptances of rivals assumed",
                columns=("method", *(f"batch {b}" for b in scope.batches)),
                rows=tuple((name, *values) for name, values in series.items()),
            ),
        ),
    )


if __name__ == "__main__":
    study("fig06_drafts", run)
