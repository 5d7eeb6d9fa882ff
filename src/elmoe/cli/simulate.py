"""``elmoe simulate``: systems x forms x models x prompts x batch sizes."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import IntegerList, force_option, json_option, print_json
from elmoe.sim.paper import EXPERT_CACHES, MODELS, OWN_LOCALITY, PROMPTS, RIVAL_DRAFTS, RIVAL_SETS, SYSTEMS
from elmoe.terminal import counted, number, print_table, progress_bar, shown, size, small_number
from elmoe.untrusted import nearest, short


@click.command()
@click.option(
    "--hardware",
    multiple=True,
    default=SYSTEMS,
    help="Preset or YAML file; repeat it. The first is the reference [default: xpu and the paper's systems].",
)
@click.option("--model", multiple=True, default=MODELS, help="Preset, config.json, description (YAML), Hugging Face folder "
              "or store; repeat it [default: the paper's models].")  # fmt: skip
@click.option("--locality", "--prompts", "prompts", multiple=True, default=(OWN_LOCALITY,), help="How local the routing is. "
              "model: fitted to numbers published of each model. prompts: as of the demo model on the paper's four prompt "
              "sets. Or a preset, or a file of `elmoe trace fit`; repeat it [default: model].")  # fmt: skip
@click.option("--batch-routing", type=click.Choice(["fitted", "apart", "alike", "identical"]), default="fitted",
              show_default=True, help="How much the sequences of a batch "
              "agree on their experts. fitted: as the locality says. apart: they share no preference (most experts). alike: "
              "they share all. identical: they route alike (fewest experts).")  # fmt: skip
@click.option("--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Routing facts or a recording to replay instead of synthetic ones.")  # fmt: skip
@click.option("--batch", type=IntegerList(), default="1,2,4,8,16", show_default=True, help="Sequences served at once.")
@click.option("--form", "forms", multiple=True,
              type=click.Choice(["ar", "eagle", "small_lm", "quant", "elastic", "planned"]),
              help="ar: plain decoding. Others, by what drafts: a one-layer head (eagle), a small model (small_lm), a 4-bit "
              "copy (quant), experts in the fast memory (elastic), the same when the engine's planner decides so (planned) "
              "[default: all but planned].")  # fmt: skip
@click.option("--acceptance", multiple=True, help="Of elastic drafts: a probability, or a measured table (`demo`, a file of "
              "`elmoe trace profile`); repeat it [default: 0.33, 0.6, 0.91, the paper's range].")  # fmt: skip
@click.option(
    "--rivals",
    type=click.Choice(RIVAL_SETS),
    default="generous",
    show_default=True,
    help="Prior systems and "
    "their drafts: as kindly as sources allow; as their own papers publish them; or so with Duplex's bank PIM.",
)
@click.option(
    "--expert-cache",
    type=click.Choice(EXPERT_CACHES),
    help="Whole experts in the rivals' fast memory: none, "
    "the prompts' (static), or least recently used out first (lru) [default: as each is described].",
)
@click.option("--rival-drafts", type=click.Choice(RIVAL_DRAFTS), default="all", show_default=True, help="What rivals draft "
              "with: nothing, an EAGLE head, or that, a small model and a 4-bit copy.")  # fmt: skip
@click.option(
    "--context", type=click.IntRange(1, 1 << 20), default=1024, show_default=True, help="Positions in every cache."
)
@click.option(
    "--trees", is_flag=True, help="Elastic drafts may also be token trees; simulated only, the engine drafts chains."
)
@click.option(
    "--before",
    is_flag=True,
    help="Simulate as version 0.1 did, not as the engine is today (its routing: --locality prompts).",
)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result for `elmoe report`.")
@click.option(
    "--timeline", type=click.Path(dir_okay=False, path_type=Path), help="Write the last system's steps for Perfetto."
)
@force_option
@click.option("--show-preset", metavar="NAME", help="Print a preset of hardware or of a model to copy, and stop.")
@json_option
def command(
    hardware: tuple[str, ...], model: tuple[str, ...], prompts: tuple[str, ...], batch_routing: Any, trace: Path | None,
    batch: tuple[int, ...], forms: tuple[Any, ...], acceptance: tuple[str, ...], rivals: Any, expert_cache: Any,
    rival_drafts: Any, context: int, trees: bool, before: bool, out: Path | None, timeline: Path | None, force: bool,
    show_preset: str | None, as_json: bool,
) -> None:  # fmt: skip
    """Simulate models on described hardware: tokens/s, joules and bytes per token, and the busiest unit."""
    from elmoe.files import check_output, same_file
    from elmoe.sim.grid import PAPER_ODDS, Grid, check_cases, check_names, check_rows, run_grid
    from elmoe.sim.modelling import BEFORE, TODAY, TREES
    from elmoe.sim.result import SimulationResult, odds_of, write_result
    from elmoe.sim.rivals import Setting
    from elmoe.systems.forms import FORMS

    if show_preset is not None:
        click.echo(_preset_text(show_preset), nl=False)
        return
    if not batch or min(batch) < 1:
        raise click.BadParameter("batch sizes start at 1", param_hint="--batch")
    if before and trees:
        raise click.UsageError("version 0.1 had no token trees: give --before or --trees")
    if trace and click.get_current_context().get_parameter_source("prompts") is not click.core.ParameterSource.DEFAULT:
        raise click.UsageError("a trace is replayed as it was recorded: give --trace or --locality")
    for path, what in ((out, "result"), (timeline, "timeline")):
        check_output(path, force, what)
    if same_file(out, timeline):
        raise click.UsageError("--out and --timeline name the same file")
    localities = tuple(name for one in prompts for name in (PROMPTS if one == "prompts" else (one,)))
    setting = Setting(rivals, expert_cache, rival_drafts)
    grid = Grid(
        setting.systems(hardware), tuple(model), ("trace",) if trace else localities, batch, tuple(forms) or FORMS,
        tuple(odds_of(text) for text in acceptance) or PAPER_ODDS, context=context, trace=trace, drafters=setting.drafters,
        setting=setting, batch_routing=batch_routing,
        modelling=replace(BEFORE if before else TODAY, trees=TREES if trees else ()),
    )  # fmt: skip
    check_names(grid)
    check_cases(grid)
    sizes = ((grid.systems, "system"), (grid.models, "model"), (batch, "batch size"))
    told = "simulating " + " x ".join(counted(len(items), what) for items, what in sizes)
    with progress_bar(told, None) as bar:
        rows = run_grid(grid, lambda done, total: bar(done, total))
    check_rows(rows)
    result = SimulationResult.of(
        grid, rows, shlex.join(["elmoe", *sys.argv[1:]]), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    )
    if out is not None:
        write_result(result, out)
    if timeline is not None:
        from elmoe.sim.timeline import write_timeline

        write_timeline(grid, timeline)
    if as_json:
        print_json(result.as_dict())
        return
    _show(rows)


def _preset_text(name: str) -> str:
    """A preset of hardware or of a model."""
    from elmoe.models.described import described_names, described_text
    from elmoe.models.load import model_names, model_text
    from elmoe.schema.hardware import preset_names, preset_text
    from elmoe.schema.rivals import variant_names

    systems = (*preset_names(), *variant_names())
    for names, text in ((systems, preset_text), (model_names(), model_text), (described_names(), described_text)):
        if name in names:
            return text(name)
    models = ", ".join((*model_names(), *described_names()))
    known = f"hardware: {', '.join(systems)}; models: {models}"
    mend = nearest(name, (*systems, *model_names(), *described_names()), known)
    raise click.BadParameter(f"there is no preset '{short(name)}': {mend}", param_hint="--show-preset")


def _show_costs(rows: list[dict[str, Any]], model: str, batch: int) -> None:
    """Joules, bytes and the busiest unit of one batch size: mean over prompts."""
    from statistics import fmean

    from elmoe.report.systems import busiest, simulated

    groups: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for row in simulated(rows):
        if row["batch"] == batch:
            groups.setdefault((row["system"], row["form"], row["acceptance"]), []).append(row)
    print_table(
        f"{model}, batch {batch}: energy, bytes and the busiest unit, simulated",
        ("system", "form", "acceptance", "mJ/token", "bytes/token", "busiest unit"),
        [
            (*key, small_number(1e3 * fmean(row["joules_per_token"]["middle"] for row in group)),
             size(fmean(sum(row["bytes_per_token"].values()) for row in group)), "{} {:.0%}".format(*busiest(group[0])))
            for key, group in groups.items()
        ],
    )  # fmt: skip


def _words(rows: list[dict[str, Any]]) -> list[str]:
    """What the words in the tables mean."""
    from elmoe.report.headline import setting_words
    from elmoe.systems.forms import explain_forms

    rivals = any(row["acceptance"] == "preset" for row in rows)
    return [
        f"rivals: {setting_words(rows[0])}." if rows else "",
        f"form, by what drafts: {explain_forms(row['form'] for row in rows)}.",
        "acceptance: probability that the model accepts a draft token" + ("; preset: that of the form." if rivals else "."),
        "busiest unit: main and fast are the memories, compute the processor, each with the share of time it works.",
        *(f"routing of {model}: {source}." for model, source in dict.fromkeys(_routing(row) for row in rows)),
    ]


def _routing(row: dict[str, Any]) -> tuple[str, str]:
    """A model, and whose locality its routing has."""
    source = row["locality"]
    return row["model"], source.split("; locality of ", 1)[1] if source.startswith("synthetic: ") else source


def _show(rows: list[dict[str, Any]]) -> None:
    """A table per model: mean over prompts."""
    from elmoe.report.systems import simulated
    from elmoe.sim.result import averaged

    found = simulated(rows)
    for model in dict.fromkeys(row["model"] for row in found):
        mine = [row for row in found if row["model"] == model]
        batches = sorted({row["batch"] for row in mine})
        table = averaged(mine)
        print_table(
            f"{model}: tokens/s (x the first system, plain), simulated",
            ("system", "form", "acceptance", *(f"batch {batch}" for batch in batches)),
            [
                (*key, *(None if (key, b) not in table else f"{number(table[key, b][0], 1)} ({number(table[key, b][1])}x)"
                         for b in batches))
                for key in dict.fromkeys(key for key, _ in table)
            ],
        )  # fmt: skip
        _show_costs(mine, model, batches[-1])
    for line in _words(found):
        click.echo(shown(line))
    for line in _left_out(rows):
        click.echo(shown(line), err=True)


def _left_out(rows: list[dict[str, Any]]) -> list[str]:
    """What was not simulated, and why: a line for all forms of one batch size and reason."""
    forms: dict[tuple[str, str, int, str], list[str]] = {}
    for row in rows:
        if "error" in row:
            forms.setdefault((row["system"], row["model"], row["batch"], row["error"]), []).append(row["form"])
    return [
        f"left out: {system}, {model}, batch {batch}, {' and '.join(dict.fromkeys(mine))}: {error}"
        for (system, model, batch, error), mine in forms.items()
    ]
