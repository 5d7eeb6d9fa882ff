"""The section of a simulation's result: headline against the paper, by model and batch, and where the claims hold."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from elmoe.report.figures import bars
from elmoe.report.headline import PAPER, SHARES, Comparison, compare, summary, verdict
from elmoe.report.section import Figure, Section, Table


def overview(rows: list[dict[str, Any]], conditions: dict[str, Any], command: str, system: str = "elmoe3d_8gb") -> Section:
    """One section of a result that holds ``system`` and the xPU; without them just the rates."""
    comparisons = compare(rows, system)
    tables, figures = [_rates(rows)], [_speed_figure(rows, conditions)]
    if not comparisons:
        return Section(
            name="rates", title="Rates", claim="Tokens per second by system, form and batch; means over prompts.",
            verdict=f"No comparison with the paper: the result lacks '{system}' with elastic drafts, or the xPU.",
            command=command, tables=tuple(tables), figures=tuple(figures),
        )  # fmt: skip
    by_label = summary(comparisons)
    words = "\n".join(verdict(name, by_label) for name in PAPER)
    return Section(
        name="headline", title=f"Headline: {system} against the paper",
        claim="The paper: 6.6x the speed and 4.4x the energy efficiency of an LPDDR xPU, 2.2x and 1.4x over the best prior "
        "accelerator in each condition; means over models, prompts and batch 1-16, 8 GB of hybrid-bonded DRAM. Acceptance "
        "of these models cannot be measured here, so every number stands for three acceptances, the paper's range.",
        verdict=f"{words}\n{_assumption(comparisons)}", command=command,
        tables=(
            _against_paper(by_label), *_by_model(comparisons), _rivals(comparisons), _energy(comparisons),
            _priors(comparisons), *tables,
        ),
        figures=(*_headline_figures(comparisons), *figures),
    )  # fmt: skip


def _against_paper(by_label: dict[str, dict[str, tuple[float, float]]]) -> Table:
    rows = []
    for name, (mean, most) in PAPER.items():
        for label, ratios in by_label.items():
            ours = ratios[name]
            rows.append(
                (name, label, mean, ours[0], f"{ours[0] / mean - 1:+.0%}", most, ours[1], f"{ours[1] / most - 1:+.0%}")
            )
    return Table(
        title="Paper v this simulator", status="paper: published, maxima second-hand; the rest simulated",
        columns=("ratio", "acceptance", "paper, mean", "simulated", "difference", "paper, max", "simulated", "difference"),
        rows=tuple(rows),
    )  # fmt: skip


def _by_model(comparisons: list[Comparison]) -> list[Table]:
    batches = sorted({c.batch for c in comparisons})
    tables = []
    for name in ("speed_over_xpu", "speed_over_prior"):
        rows = []
        for model in dict.fromkeys(c.model for c in comparisons):
            for label in dict.fromkeys(c.acceptance for c in comparisons):
                mine = [c for c in comparisons if (c.model, c.acceptance) == (model, label)]
                values = [getattr(c, name) for c in mine]
                means = (fmean(getattr(c, name) for c in mine if c.batch == batch) for batch in batches)
                rows.append((model, label, *means, fmean(values), max(values)))
        tables.append(
            Table(
                title=name.replace("_", " ").replace("xpu", "xPU (plain)") + ", mean over prompts", status="simulated",
                columns=("model", "acceptance", *(f"batch {b}" for b in batches), "mean", "max"), rows=tuple(rows),
            )
        )  # fmt: skip
    return tables


def _rival_means(comparisons: list[Comparison]) -> dict[str, dict[str, float]]:
    """Mean speed over each prior system in its best form, by acceptance."""
    names = list(dict.fromkeys(name for c in comparisons for name in c.over_rivals))
    labels = dict.fromkeys(c.acceptance for c in comparisons)
    return {
        label: {
            name: fmean(c.over_rivals[name] for c in comparisons if c.acceptance == label and name in c.over_rivals)
            for name in names
        }
        for label in labels
    }


def _assumption(comparisons: list[Comparison]) -> str:
    """Against which prior systems the claim over the best of them would hold."""
    claimed, parts = PAPER["speed over best prior"][0], []
    for label, means in _rival_means(comparisons).items():
        over = ", ".join(f"{name} {value:.2f}x" for name, value in means.items())
        held = [name for name, value in means.items() if value >= claimed]
        parts.append(f"at acceptance {label} over {over} ({claimed}x against {', '.join(held) if held else 'none of them'})")
    return "Speed over each prior system in its best form: " + "; ".join(parts) + "."


def _rivals(comparisons: list[Comparison]) -> Table:
    means = _rival_means(comparisons)
    names = list(next(iter(means.values())))
    return Table(
        title="Speed over each prior system in its best form, mean over models, prompts and batch sizes", status="simulated",
        columns=("acceptance", *names), rows=tuple((label, *values.values()) for label, values in means.items()),
    )  # fmt: skip


def _energy(comparisons: list[Comparison]) -> Table:
    rows = []
    for label in dict.fromkeys(c.acceptance for c in comparisons):
        mine = [c for c in comparisons if c.acceptance == label]
        for share in SHARES:
            rows.append(
                (
                    label, share, fmean(c.energy_over_xpu[share] for c in mine), max(c.energy_over_xpu[share] for c in mine),
                    fmean(c.energy_over_prior[share] for c in mine), max(c.energy_over_prior[share] for c in mine),
                )
            )  # fmt: skip
    return Table(
        title="Energy per token: xPU (plain) and the thriftiest prior system over ours, by static-power share",
        status="simulated; static power is assumed, the same watts in every system",
        columns=("acceptance", "static share", "over xPU, mean", "max", "over prior, mean", "max"), rows=tuple(rows),
    )  # fmt: skip


def _priors(comparisons: list[Comparison]) -> Table:
    counts: dict[tuple[int, str], int] = {}
    label = comparisons[0].acceptance
    for c in comparisons:
        if c.acceptance == label:
            counts[c.batch, c.prior] = counts.get((c.batch, c.prior), 0) + 1
    return Table(
        title="Which prior system is the fastest, conditions", status="simulated",
        columns=("batch", "system, form", "conditions"),
        rows=tuple((batch, name, count) for (batch, name), count in sorted(counts.items())),
    )  # fmt: skip


def _headline_figures(comparisons: list[Comparison]) -> list[Figure]:
    batches = sorted({c.batch for c in comparisons})
    labels = list(dict.fromkeys(c.acceptance for c in comparisons))
    figures = []
    for name, title in (
        ("speed_over_xpu", "Speed-up over the xPU"), ("speed_over_prior", "Speed-up over the best prior system"),
    ):  # fmt: skip
        series = {
            f"acceptance {label}": [
                fmean(getattr(c, name) for c in comparisons if (c.acceptance, c.batch) == (label, batch))
                for batch in batches
            ]
            for label in labels
        }
        figures.append(bars(f"{title}, mean over models and prompts", [f"batch {b}" for b in batches], series, "x"))
    return figures


def _speed_figure(rows: list[dict[str, Any]], conditions: dict[str, Any]) -> Figure:
    """Tokens/s of every system in its best form, mean over models and prompts, relative to the reference."""
    batches = sorted({row["batch"] for row in rows})
    series: dict[str, list[float | None]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        series[system] = [_best_mean(rows, system, batch) for batch in batches]
    reference = conditions.get("reference", "the first system")
    return bars(
        f"Every system in its best form, over plain {reference}",
        [f"batch {b}" for b in batches],
        series,
        "x",
        logarithmic=True,
    )


def _best_mean(rows: list[dict[str, Any]], system: str, batch: int) -> float | None:
    best: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["system"] == system and row["batch"] == batch and "error" not in row:
            key = row["model"], row["prompts"]
            best[key] = max(best.get(key, 0.0), row["speedup"])
    return fmean(best.values()) if best else None


def _rates(rows: list[dict[str, Any]]) -> Table:
    shown = [row for row in rows if "error" not in row]
    keys = dict.fromkeys((r["model"], r["system"], r["form"], r["acceptance"], r["batch"]) for r in shown)
    table = []
    for key in keys:
        group = [r for r in shown if (r["model"], r["system"], r["form"], r["acceptance"], r["batch"]) == key]
        table.append(
            (
                *key, fmean(r["tokens_per_second"] for r in group), fmean(r["speedup"] for r in group),
                fmean(r["joules_per_token"]["middle"] for r in group), group[0]["draft_length"],
                None if group[0]["msb_hit_rate"] is None else fmean(r["msb_hit_rate"] for r in group),
            )
        )  # fmt: skip
    return Table(
        title="All rows, mean over prompts", status="simulated",
        columns=("model", "system", "form", "acceptance", "batch", "tokens/s", "x reference", "J/token", "draft length",
                 "MSB hits"),
        rows=tuple(table),
    )  # fmt: skip
