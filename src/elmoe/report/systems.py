"""What a result says of each of its systems, an own one too: rates, joules by part, bytes, the busiest unit, constants."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from elmoe.report.figures import bars
from elmoe.report.section import Figure, Table
from elmoe.systems.forms import explain_forms
from elmoe.units import format_bytes

Row = dict[str, Any]
STATIC = "static power"


def simulated(rows: Sequence[Row]) -> list[Row]:
    """Rows that are not left out."""
    return [row for row in rows if "error" not in row]


def best_forms(rows: Sequence[Row], system: str) -> list[Row]:
    """The system's fastest row of every model, prompt set and batch size."""
    best: dict[tuple[str, str, int], Row] = {}
    for row in simulated(rows):
        key = row["model"], row["prompts"], row["batch"]
        if row["system"] == system and (key not in best or row["tokens_per_second"] > best[key]["tokens_per_second"]):
            best[key] = row
    return list(best.values())


def acceptance_words(rows: Sequence[Row]) -> str:
    """At which acceptance a system's fastest form is taken, where elastic drafts were simulated at several."""
    odds = dict.fromkeys(row["acceptance"] for row in simulated(rows) if row["form"] in ("elastic", "bit_axis", "planned"))
    return f", elastic drafts at the fastest of the acceptances {', '.join(odds)}" if len(odds) > 1 else ""


def names_of(rows: Sequence[Row]) -> list[str]:
    """Systems that were simulated, in the order of the result."""
    return list(dict.fromkeys(row["system"] for row in simulated(rows)))


def busiest(row: Row) -> tuple[str, float]:
    """The resource that works for the largest share of the run, and the share."""
    name, share = max(row["busy"].items(), key=lambda item: item[1], default=("-", 0.0))
    return str(name), float(share)


def energy_parts(row: Row) -> dict[str, float]:
    """Joules per token by part, at the middle share of static power; they sum to ``joules_per_token``."""
    parts: dict[str, float] = dict(row["dynamic_joules_per_token"])
    parts[STATIC] = max(0.0, row["joules_per_token"]["middle"] - sum(parts.values()))
    return parts


def system_words(rows: Sequence[Row], reference: str) -> str:
    """A line for every system but the reference: speed, energy and how often it is the fastest."""
    fastest: dict[tuple[str, str, int], Row] = {}
    best = {name: best_forms(rows, name) for name in names_of(rows)}
    for group in best.values():
        for row in group:
            key = row["model"], row["prompts"], row["batch"]
            if key not in fastest or row["tokens_per_second"] > fastest[key]["tokens_per_second"]:
                fastest[key] = row
    lines = []
    for name, group in best.items():
        if name == reference:
            continue
        speed, energy = fmean(row["speedup"] for row in group), fmean(row["efficiency"]["middle"] for row in group)
        first = sum(row["system"] == name for row in fastest.values())
        lines.append(
            f"{name}: {speed:.2f}x the speed and {energy:.2f}x the tokens per joule of plain {reference}; the fastest in "
            f"{first} of {len(fastest)} conditions."
        )
    told = acceptance_words(rows).removeprefix(", ")
    return "\n".join([*lines, *([f"Each system in its fastest form, {told}."] if told and lines else [])])


def summary_table(rows: Sequence[Row], reference: str) -> Table:
    """Every system in its fastest form, mean over models and prompts."""
    batches = sorted({row["batch"] for row in simulated(rows)})
    lines: list[tuple[Any, ...]] = []
    for name in names_of(rows):
        group = best_forms(rows, name)
        by_batch = [[row["speedup"] for row in group if row["batch"] == batch] for batch in batches]
        lines.append(
            (
                name, *(fmean(values) if values else None for values in by_batch), fmean(row["speedup"] for row in group),
                fmean(row["efficiency"]["middle"] for row in group), ", ".join(dict.fromkeys(row["form"] for row in group)),
                ", ".join(dict.fromkeys(busiest(row)[0] for row in group)),
            )
        )  # fmt: skip
    title = f"Systems in their fastest form, over plain {reference}: means over models and prompts"
    return Table(
        title=title + acceptance_words(rows),
        status=f"simulated; forms by what drafts: {explain_forms(row['form'] for row in rows)}",
        columns=("system", *(f"speed, batch {b}" for b in batches), "speed, mean", "tokens/J, mean", "fastest forms",
                 "busiest unit"),
        rows=tuple(lines),
    )  # fmt: skip


def energy_figure(rows: Sequence[Row]) -> Figure:
    """Joules per token by part, each system in its fastest form at the smallest batch, mean over models and prompts."""
    batch = min(row["batch"] for row in simulated(rows))
    systems = names_of(rows)
    means: list[dict[str, float]] = []
    for name in systems:
        parts = [energy_parts(row) for row in best_forms(rows, name) if row["batch"] == batch]
        keys = dict.fromkeys(key for part in parts for key in part)
        means.append({key: fmean(part.get(key, 0.0) for part in parts) for key in keys})
    keys = dict.fromkeys(key for mean in means for key in mean)
    series = {key: [1e3 * mean.get(key, 0.0) for mean in means] for key in keys}
    title = f"Energy per token by part, batch {batch}, static power at its middle share"
    return bars(title, systems, series, "mJ per token", stacked=True)


def all_rows(rows: Sequence[Row]) -> Table:
    """Every row, mean over prompts."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in simulated(rows):
        key = row["model"], row["system"], row["form"], row["acceptance"], row["batch"]
        groups.setdefault(key, []).append(row)
    memories = list(dict.fromkeys(name for row in simulated(rows) for name in row["bytes_per_token"]))

    def traffic(group: list[Row], name: str) -> str | None:
        mean = fmean(row["bytes_per_token"].get(name, 0.0) for row in group)
        return format_bytes(mean) if mean else None

    table = [
        (
            *key, fmean(r["tokens_per_second"] for r in group), fmean(r["speedup"] for r in group),
            fmean(r["joules_per_token"]["middle"] for r in group), "{} {:.0%}".format(*busiest(group[0])),
            *(traffic(group, name) for name in memories), group[0]["draft_length"],
            None if group[0]["msb_hit_rate"] is None else f"{fmean(r['msb_hit_rate'] for r in group):.0%}",
        )
        for key, group in groups.items()
    ]  # fmt: skip
    return Table(
        title="All rows, mean over prompts", status="simulated", folded=True,
        columns=("model", "system", "form", "acceptance", "batch", "tokens/s", "x reference", "J/token", "busiest unit",
                 *(f"{name}, bytes/token" for name in memories), "draft length", "MSB hits"),
        rows=tuple(table),
    )  # fmt: skip


def energy_table(rows: Sequence[Row]) -> Table:
    """Joules per token by part of every system in its fastest form, by model and batch, mean over prompts."""
    lines: list[tuple[Any, ...]] = []
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for name in names_of(rows):
        for row in best_forms(rows, name):
            groups.setdefault((row["model"], name, row["batch"]), []).append(row)
    parts = list(dict.fromkeys(part for row in simulated(rows) for part in energy_parts(row)))
    for key, group in groups.items():
        means = [fmean(energy_parts(row).get(part, 0.0) for row in group) for part in parts]
        forms = ", ".join(dict.fromkeys(row["form"] for row in group))
        lines.append((*key, forms, *(1e3 * mean for mean in means), 1e3 * sum(means)))
    return Table(
        title="Energy per token by part, mJ: each system in its fastest form, static power at its middle share",
        status="simulated; host and disk are not counted", folded=True,
        columns=("model", "system", "batch", "form", *parts, "sum"), rows=tuple(lines),
    )  # fmt: skip


def constants_table(conditions: dict[str, Any]) -> Table | None:
    """What the systems are made of, equal constants in one line; None where the result does not say."""
    stated = conditions.get("constants")
    if not isinstance(stated, list):
        return None
    merged: dict[tuple[str, ...], list[str]] = {}
    for item in stated:
        if isinstance(item, dict):
            low, high = item.get("low"), item.get("high")
            span = "-" if low == high else f"{low} to {high}"
            key = (item.get("constant"), item.get("value"), span, item.get("status"), item.get("source"))
            merged.setdefault(tuple(str(part) for part in key), []).append(str(item.get("system")))
    systems = dict.fromkeys(name for names in merged.values() for name in names)
    rows = [
        (constant, "all" if len(names) == len(systems) else ", ".join(names), value, span, status, source)
        for (constant, value, span, status, source), names in merged.items()
    ]
    return Table(
        title="Constants of the systems", status="status and source of each; `user`: changed in a copy of a preset",
        columns=("constant", "systems", "value", "range", "status", "source"), rows=tuple(rows), folded=True,
    )  # fmt: skip


def changed_words(conditions: dict[str, Any]) -> str:
    """Which constants the user changed; empty if none."""
    stated = conditions.get("constants")
    changed = [
        f"{item.get('system')}: {item.get('constant')} is {item.get('value')}"
        for item in (stated if isinstance(stated, list) else [])
        if isinstance(item, dict) and item.get("status") == "user"
    ]
    return f"Changed by the user, not published: {'; '.join(changed)}." if changed else ""
