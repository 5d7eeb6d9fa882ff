"""The paper's headline: speed-up and energy efficiency over the xPU and over the best prior system, by model and batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

RIVALS = ("xpu", "xpu_pim", "xpu_logicpim", "xpu_nmp", "hb_xpu")
SETS = ("published", "duplex")
"""What the name of a rival ends in that is not described as its preset is (``sim/rivals.py``)."""
SHARES = ("low", "middle", "high")
PAPER = {
    "speed over xPU": (6.6, 12.0), "speed over best prior": (2.2, 9.9),
    "energy over xPU": (4.4, 7.2), "energy over best prior": (1.4, 4.9),
}  # fmt: skip
"""(mean, maximum) over models, prompts and batch 1-16 with 8 GB; the abstract (means) and second-hand notes (maxima)."""
PAPER_BATCHES = (1, 16)
"""Least and greatest batch size of the paper's means."""
Condition = tuple[str, str, int]


@dataclass(frozen=True)
class Comparison:
    """One condition: our system in the better of its modes, against the xPU (plain) and the best prior row.

    Ratios of tokens per second, and of joules per token at each static-power share; each comparison of energy takes the
    rival that uses the least, not the one that is fastest. ``over_rivals``: speed over each prior system in its best form.
    """

    model: str
    prompts: str
    batch: int
    acceptance: str
    mode: str
    prior: str
    over_rivals: dict[str, float]
    speed_over_xpu: float
    speed_over_prior: float
    energy_over_xpu: dict[str, float]
    energy_over_prior: dict[str, float]


def is_rival(system: str) -> bool:
    """Whether a system is a prior one of the paper, in whichever description."""
    return preset_of(system) in RIVALS


def preset_of(system: str) -> str:
    """The preset that a rival's description started from; other names as they are."""
    base, _, ending = system.rpartition("_")
    return base if ending in SETS else system


def setting_words(labels: Mapping[str, Any]) -> str:
    """Which rivals a row or a result's conditions compare with, for people; empty where it does not say."""
    if "rivals" not in labels:
        return ""
    return f"{labels['rivals']}, expert cache: {labels.get('expert_cache', '-')}, drafts: {labels.get('rival_drafts', '-')}"


def compare(
    rows: Iterable[dict[str, Any]], system: str = "elmoe3d_8gb", use_ar: bool = True, planned: bool = False
) -> list[Comparison]:
    """Every condition at every acceptance of the elastic drafts. Our system is in the better of its modes, which is known
    afterwards; with ``planned`` in the mode that the engine's planner chose as it ran. ``use_ar`` off: always draft."""
    drafts = "planned" if planned else "elastic"
    conditions: dict[Condition, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "error" not in row:
            conditions[row["model"], row["prompts"], row["batch"]].append(row)
    result = []
    for (model, prompts, batch), group in conditions.items():
        ours = [row for row in group if row["system"] == system]
        prior = [row for row in group if is_rival(row["system"])]
        bare = next((row for row in prior if row["system"] == "xpu" and row["form"] == "ar"), None)
        labels = dict.fromkeys(row["acceptance"] for row in ours if row["form"] == drafts)
        if bare is None:
            continue
        fastest = max(prior, key=lambda row: row["tokens_per_second"])
        rates: dict[str, float] = {}
        for row in prior:
            rates[row["system"]] = max(rates.get(row["system"], 0.0), row["tokens_per_second"])
        for label in labels:
            modes = [row for row in ours if row["form"] == drafts and row["acceptance"] == label]
            modes += [row for row in ours if row["form"] == "ar" and use_ar and not planned]
            mine = max(modes, key=lambda row: row["tokens_per_second"])
            joules = mine["joules_per_token"]
            result.append(
                Comparison(
                    model, prompts, batch, label, mine["form"], f"{fastest['system']}, {fastest['form']}",
                    {name: mine["tokens_per_second"] / rate for name, rate in rates.items()},
                    mine["tokens_per_second"] / bare["tokens_per_second"],
                    mine["tokens_per_second"] / fastest["tokens_per_second"],
                    {share: bare["joules_per_token"][share] / joules[share] for share in SHARES},
                    {share: min(row["joules_per_token"][share] for row in prior) / joules[share] for share in SHARES},
                )
            )  # fmt: skip
    return result


def summary(comparisons: list[Comparison]) -> dict[str, dict[str, tuple[float, float]]]:
    """(mean, maximum) of the four ratios, energy at the middle share, by acceptance."""
    groups: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        groups[comparison.acceptance].append(comparison)
    return {label: {name: _mean_max(values) for name, values in _ratios(group).items()} for label, group in groups.items()}


def _ratios(group: list[Comparison], share: str = "middle") -> dict[str, list[float]]:
    return {
        "speed over xPU": [c.speed_over_xpu for c in group],
        "speed over best prior": [c.speed_over_prior for c in group],
        "energy over xPU": [c.energy_over_xpu[share] for c in group],
        "energy over best prior": [c.energy_over_prior[share] for c in group],
    }


def _mean_max(values: list[float]) -> tuple[float, float]:
    return fmean(values), max(values)


def missing_rivals(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Prior systems of the paper that the result does not hold: without them a claim over the best prior is not judged."""
    found = {preset_of(row["system"]) for row in rows if "error" not in row}
    return [name for name in RIVALS if name not in found]


def verdict(name: str, by_label: dict[str, dict[str, tuple[float, float]]], comparisons: list[Comparison]) -> str:
    """Whether a mean that the paper claims holds, holds if drafts are accepted often enough, or does not hold here.

    With it, in how many of the conditions the ratio is reached, and where it does not hold, by which factor it falls short.
    """
    claimed = PAPER[name][0]
    reached = [label for label, ratios in by_label.items() if round(ratios[name][0], 2) >= claimed]  # as it is shown
    means = _means(name, by_label)

    def count(label: str) -> str:
        values = _ratios([one for one in comparisons if one.acceptance == label])[name]
        return f"{sum(round(value, 2) >= claimed for value in values)} of {len(values)} conditions reach it at {label}"

    if len(reached) == len(by_label):
        return f"{name}: the claim of {claimed}x HOLDS at every acceptance ({means}); {count(reached[0])}."
    if reached:
        return (
            f"{name}: the claim of {claimed}x HOLDS IF acceptance is {' or '.join(reached)} ({means}); {count(reached[0])}."
        )
    best = max(by_label, key=lambda label: by_label[label][name][0])
    return (
        f"{name}: the claim of {claimed}x DOES NOT HOLD ({means}); it falls short by a factor of "
        f"{claimed / by_label[best][name][0]:.2f} at best, and {count(best)}."
    )


def unjudged(name: str, by_label: dict[str, dict[str, tuple[float, float]]]) -> str:
    """The means of a result of other models than the paper's, beside its claim."""
    return (
        f"{name}: {_means(name, by_label)}; the paper's claim of {PAPER[name][0]}x is NOT JUDGED, it is over other models."
    )


def _means(name: str, by_label: dict[str, dict[str, tuple[float, float]]]) -> str:
    return ", ".join(f"{ratios[name][0]:.2f}x at {label}" for label, ratios in by_label.items())
