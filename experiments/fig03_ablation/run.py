"""What each part of the system is worth: features added one by one to the xPU, and taken away one by one from all of them.

Acceptance is the demo model's, measured with `elmoe trace profile`, so that it follows the resident share; without the LSB
augmentation its rejections grow as `bench/ablation.py` measured (temperature 0.8, all experts: 7.7 instead of 4.3 %).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from elmoe.report.figures import bars
from elmoe.report.section import Section, Table
from elmoe.schema.hardware import Features, load_hardware
from elmoe.sim.result import odds_of
from experiments.common import Scope, mean, rows_of, select, study

TRUNCATED_REJECTIONS = 7.7 / 4.3
ALL = dict(fast_dense=True, expert_cache=True, bit_slices=True, parallel_tiers=True, refill=True)
Case = tuple[str, dict[str, bool], str, bool]
"""Name, features, form, and whether drafts are truncated instead of rounded to the middle."""
ADDED: tuple[Case, ...] = (
    ("xPU", {}, "ar", False),
    ("+ dense parts in fast memory", {"fast_dense": True}, "ar", False),
    ("+ expert cache of whole experts", {"fast_dense": True, "expert_cache": True, "refill": True}, "ar", False),
    ("+ slices of 4 bits", {"fast_dense": True, "expert_cache": True, "refill": True, "bit_slices": True}, "ar", False),
    ("+ both memories at once", ALL, "ar", True),
    ("+ elastic drafts, truncated", ALL, "elastic", True),
    ("+ LSB augmentation", ALL, "elastic", False),
    ("+ mode choice (everything)", ALL, "best", False),
)
REMOVED: tuple[Case, ...] = (
    ("everything", ALL, "best", False),
    ("without mode choice: always draft", ALL, "elastic", False),
    ("without drafts", ALL, "ar", False),
    ("without the expert axis (bits alone)", ALL, "bit_axis", False),
    ("without the bit axis (whole experts)", {**ALL, "bit_slices": False}, "best", False),
    ("without LSB augmentation", ALL, "best", True),
    ("without refill (residents of the prompts)", {**ALL, "refill": False}, "best", False),
    ("without parallel tiers", {**ALL, "parallel_tiers": False}, "best", False),
)


@dataclass(frozen=True)
class Truncated:
    """Measured acceptance with as many more rejections as truncation causes."""

    base: Any
    label: str = "demo, truncated"
    status: str = "measured, scaled"

    def __call__(self, share: float, depth: int) -> float:
        """Probability that a truncated draft token is accepted."""
        return max(0.0, 1 - TRUNCATED_REJECTIONS * (1 - self.base(share, depth)))


def run(scope: Scope) -> Section:
    """Ablation of features."""
    preset, bare = load_hardware("elmoe3d_8gb"), load_hardware("xpu")
    measured = odds_of("demo")
    tables, figures, words = [], [], []
    for title, cases in (("Features added to the xPU", ADDED), ("Features taken from everything", REMOVED)):
        series: dict[str, list[float | None]] = {}
        for name, features, form, truncated in cases:
            machine = msgspec.structs.replace(preset, name="ours", features=Features(**features))
            odds = Truncated(measured) if truncated else measured
            forms = ("ar", "elastic") if form == "best" else (form,)
            rows = rows_of(scope, (bare, machine), forms=tuple(dict.fromkeys(("ar", *forms))), odds=(odds,))
            series[name] = [best_mean(select(rows, system="ours", batch=batch), forms) for batch in scope.batches]
        figures.append(bars(title, [f"batch {b}" for b in scope.batches], series, "x the xPU"))
        tables.append(
            Table(
                title=title,
                status="simulated; acceptance measured on the demo model",
                columns=("case", *(f"batch {b}" for b in scope.batches), "mean"),
                rows=tuple((name, *values, mean(values)) for name, values in series.items()),
            )
        )
        words.append("; ".join(f"{name} {mean(values):.2f}x" for name, values in series.items()))
    return Section(
        name="ablation",
        title="What each part is worth",
        claim="Both axes, the augmentation, refill, parallel tiers and the mode choice each pay.",
        verdict="Mean over models, prompts and batch sizes, over the plain xPU. Added: "
        + words[0]
        + ".\nTaken away: "
        + words[1]
        + ".",
        command="python -m experiments.fig03_ablation.run",
        tables=tuple(tables),
        figures=tuple(figures),
    )


def best_mean(rows: list[dict[str, Any]], forms: tuple[str, ...]) -> float:
    """Mean over models and prompts of the speed-up in the better of the forms."""
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["form"] in forms:
            key = row["model"], row["prompts"]
            best[key] = max(best.get(key, 0.0), row["speedup"])
    return mean(best.values())


if __name__ == "__main__":
    study("fig03_ablation", run, options=("locality", "batch-routing"))
