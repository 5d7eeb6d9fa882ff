"""The section of a simulation's result: headline against the paper, by model and batch, and where the claims hold."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from elmoe.errors import HardwareError
from elmoe.report.figures import bars
from elmoe.report.headline import (
    PAPER,
    PAPER_BATCHES,
    SHARES,
    Comparison,
    compare,
    missing_rivals,
    setting_words,
    summary,
    unjudged,
    verdict,
)
from elmoe.report.section import Figure, Section, Table, labelled
from elmoe.report.systems import (
    acceptance_words,
    all_rows,
    best_forms,
    changed_words,
    constants_table,
    energy_figure,
    energy_table,
    names_of,
    simulated,
    summary_table,
    system_words,
)  # fmt: skip
from elmoe.sim.paper import MODELS


def overview(
    rows: list[dict[str, Any]], conditions: dict[str, Any], command: str, system: str = "elmoe3d_8gb", file: str = "",
) -> Section:  # fmt: skip
    """One section of a result: what its systems do, and the paper's claims as far as the result holds their systems.

    :raises HardwareError: no row was simulated.
    """
    section = _overview(rows, conditions, command, system, file)
    words = setting_words(conditions) or setting_words(rows[0])
    return labelled(section, f"rivals: {words}" if words else "")


def _overview(rows: list[dict[str, Any]], conditions: dict[str, Any], command: str, system: str, file: str) -> Section:
    if not simulated(rows):
        raise HardwareError(
            f"{file or 'the result'} holds no simulated row", "every model was left out: see `elmoe simulate`"
        )
    reference = str(conditions.get("reference", names_of(rows)[0]))
    comparisons = compare(rows, system)
    tables = [summary_table(rows, reference)]
    figures = [_speed_figure(rows, reference), energy_figure(rows)]
    details = [energy_table(rows), all_rows(rows)]
    constants = constants_table(conditions)
    words = [system_words(rows, reference), changed_words(conditions)]
    common = {"command": str(conditions.get("command", command)), "date": str(conditions.get("date", "")), "file": file}
    if constants is not None:
        details.append(constants)
    if not comparisons:
        return Section(
            name="rates", title=f"Systems over plain {reference}", claim=_conditions(conditions),
            verdict="\n".join(filter(None, words)), tables=(*tables, *details), figures=tuple(figures), **common,
        )  # fmt: skip
    by_label, missing = summary(comparisons), missing_rivals(rows)
    judged = [name for name in PAPER if not missing or "prior" not in name]
    others = sorted({c.model for c in comparisons} ^ set(MODELS))
    words = [unjudged(name, by_label) if others else verdict(name, by_label, comparisons) for name in judged]
    batches = [c.batch for c in comparisons]
    if (min(batches), max(batches)) != PAPER_BATCHES:
        words.append(
            f"Other conditions: the paper's means are over batch {PAPER_BATCHES[0]} to {PAPER_BATCHES[1]}, this result has "
            f"{min(batches)} to {max(batches)}."
        )
    if others:
        words.append(
            f"Other models: the paper's means are over {', '.join(MODELS)}, this result has "
            f"{', '.join(dict.fromkeys(c.model for c in comparisons))}."
        )
    if missing:
        words.append(f"The claims over the best prior system are not judged: the result lacks {', '.join(missing)}.")
    else:
        words.append(_assumption(comparisons))
        details = [*_by_model(comparisons), _rivals(comparisons), _priors(comparisons), *details]
    planned = compare(rows, system, planned=True)
    if planned:
        words.append(_planned_words(planned, by_label, judged))
    words += [system_words(rows, reference), changed_words(conditions)]
    return Section(
        name="headline", title=f"{system} against the paper",
        claim="The paper: 6.6x the speed and 4.4x the energy efficiency of an LPDDR xPU, 2.2x and 1.4x over the best prior "
        "accelerator in each condition; means over models, prompts and batch 1-16, 8 GB of hybrid-bonded DRAM. Acceptance "
        f"of these models cannot be measured here, so numbers are given for several acceptances. {_conditions(conditions)}",
        verdict="\n".join(filter(None, words)),
        tables=(_against_paper(by_label, judged), *tables, _energy(comparisons, bool(missing)), *details),
        figures=(*_headline_figures(comparisons, bool(missing)), *figures), **common,
    )  # fmt: skip


def _planned_words(planned: list[Comparison], by_label: dict[str, Any], judged: list[str]) -> str:
    """What comes out where the mode is not chosen afterwards."""
    found = summary(planned)

    def told(name: str, label: str) -> str:
        return f"{found[label][name][0]:.2f}x instead of {by_label[label][name][0]:.2f}x at {label}"

    speeds = [f"{name} {', '.join(told(name, label) for label in found)}" for name in judged if "speed" in name]
    return (
        "The mode and the draft length above are the best ones, which are known afterwards. With those that the engine's "
        f"planner chooses as it runs: {'; '.join(speeds)}."
    )


def _conditions(conditions: dict[str, Any]) -> str:
    """What was simulated, in a sentence."""
    said = [
        f"{name}: {', '.join(map(str, values))}"
        for name in ("models", "prompts", "batches")
        if isinstance(values := conditions.get(name), list)
    ]
    if words := setting_words(conditions):
        said.append(f"rivals: {words}")
    if "context" in conditions:
        said.append(f"context: {conditions['context']} positions")
    return f"Simulated: {'; '.join(said)}." if said else "Simulated."


def _against_paper(by_label: dict[str, dict[str, tuple[float, float]]], judged: list[str]) -> Table:
    rows = []
    for name in judged:
        mean, most = PAPER[name]
        for label, ratios in by_label.items():
            ours = ratios[name]
            rows.append((name, label, mean, ours[0], _change(ours[0], mean), most, ours[1], _change(ours[1], most)))
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


def _energy(comparisons: list[Comparison], only_xpu: bool) -> Table:
    rivals = "xPU (plain)" if only_xpu else "xPU (plain) and the thriftiest prior system"
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
        title=f"Energy per token, by static-power share: {rivals} over ours",
        status="simulated; static power is assumed, the same watts in every system",
        columns=("acceptance", "static share", "over xPU, mean", "max", "over prior, mean", "max")[: 4 if only_xpu else 6],
        rows=tuple(row[: 4 if only_xpu else 6] for row in rows),
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


def _change(value: float, base: float) -> str:
    """``+3%``, ``0%``."""
    told = f"{value / base - 1:+.0%}"
    return "0%" if told in ("+0%", "-0%") else told


def _headline_figures(comparisons: list[Comparison], only_xpu: bool) -> list[Figure]:
    batches = sorted({c.batch for c in comparisons})
    labels = list(dict.fromkeys(c.acceptance for c in comparisons))
    figures = []
    shown = (("speed_over_xpu", "Speed-up over the xPU"), ("speed_over_prior", "Speed-up over the best prior system"))
    for name, title in shown[: 1 if only_xpu else 2]:
        series = {
            f"acceptance {label}": [
                fmean(getattr(c, name) for c in comparisons if (c.acceptance, c.batch) == (label, batch))
                for batch in batches
            ]
            for label in labels
        }
        figures.append(bars(f"{title}, mean over models and prompts", [f"batch {b}" for b in batches], series, "x"))
    return figures


def _speed_figure(rows: list[dict[str, Any]], reference: str) -> Figure:
    """Every system in its fastest form, mean over models and prompts, relative to the reference."""
    batches = sorted({row["batch"] for row in simulated(rows)})
    series: dict[str, list[float | None]] = {}
    for name in names_of(rows):
        group = best_forms(rows, name)
        values = [[row["speedup"] for row in group if row["batch"] == batch] for batch in batches]
        series[name] = [fmean(some) if some else None for some in values]
    title = f"Speed of every system in its fastest form, over plain {reference}{acceptance_words(rows)}"
    return bars(title, [f"batch {b}" for b in batches], series, f"x plain {reference}", logarithmic=True)
