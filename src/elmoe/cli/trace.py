"""``elmoe trace``: record and summarise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import (
    NumberRange,
    Serving,
    force_option,
    json_option,
    print_json,
    seed_type,
    serving_options,
    temperature_type,
)
from elmoe.cli.suggesting import SuggestingGroup
from elmoe.cli.trace_facts import fit, import_, synthesise
from elmoe.cli.trace_profile import profile, read_prompts
from elmoe.terminal import counted, percent, print_table, progress_bar

SUMMARY_WORDS = {
    "rows": "rows by phase",
    "acceptance": "first tokens of drafts that were accepted",
    "busiest_over_mean": "tokens of a layer's busiest expert, times the mean",
    "routing_covered_by": "share of the routing of the experts used most",
    "reuse": "experts that the token before used too",
    "reuse_if_independent": "the same, if tokens were independent",
}
"""Names of a summary's numbers, for people."""


@click.group("trace", cls=SuggestingGroup)
def command() -> None:
    """Record the routing and the drafts of a run, and look at them. Every subcommand has --json."""


@command.command("record")
@click.argument("store")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--prompts", "prompts_path", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Text file, one prompt per line.")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), help="Cut prompts after this many tokens.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens of an answer at most.")
@click.option("--temperature", type=temperature_type, default=0.8, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", type=seed_type, default=0, show_default=True, help="Prompt n is sampled with seed + n.")
@click.option("--batch", type=click.IntRange(1, 64), default=8, show_default=True, help="Sequences served at once.")
@click.option("--every-position", is_flag=True,
              help="Draft again from every position, for `elmoe bench --replay` [draft length: 16].")  # fmt: skip
@click.option("--all-ranks", is_flag=True,
              help="Record the rank of every expert, so that a replay may keep other experts in memory.")  # fmt: skip
@serving_options
@force_option
@json_option
def record(
    store: str, out: Path, prompts_path: Path, prompt_tokens: int | None, max_tokens: int, temperature: float, seed: int,
    batch: int, every_position: bool, all_ranks: bool, serving: Serving, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Answer prompts with drafts, and write the trace OUT (Parquet)."""
    from elmoe.files import check_output

    check_output(out, force, "trace")
    from elmoe.bitslice import SamplingParameters
    from elmoe.engine.request import Request
    from elmoe.trace import TraceRecorder

    prompts = read_prompts(prompts_path)
    options = replace(serving.options("elastic", min(batch, len(prompts))), all_ranks=all_ranks)
    if every_position:
        options = replace(options, draft_length=options.draft_length or 16, commit_limit=1)
    with serving.load(store, options) as model:
        requests = [
            Request(
                model.encode(text)[:prompt_tokens], max_tokens, SamplingParameters(temperature, seed=seed + index),
                ignore_eos=every_position,
            )
            for index, text in enumerate(prompts)
        ]  # fmt: skip
        run = {
            "store": str(store), "mode": "elastic", "commit_limit": options.commit_limit, "temperature": temperature,
            "seed": seed, "fast_memory": options.fast_memory, "draft_length": options.draft_length,
            "ignore_eos": every_position,
        }  # fmt: skip
        with (
            progress_bar("tokens", len(requests) * max_tokens) as bar,
            TraceRecorder(out, model.reader.spec, run, all_ranks) as recorder,
        ):
            for _ in model.engine.run(requests, recorder):
                bar(model.engine.statistics.committed)
    statistics = model.engine.statistics
    facts = statistics.as_dict()
    if as_json:
        print_json({"trace": str(out), "statistics": facts})
    else:
        click.echo(
            f"wrote {out}: {counted(statistics.committed, 'token')}, acceptance {percent(statistics.acceptance_rate)}"
        )


@command.command("show")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
def show(path: Path, as_json: bool) -> None:
    """Summarise a trace: rows, acceptance, locality.

    Acceptance is of the first tokens of drafts. Locality: how uneven the use of experts is, and how often a token uses
    experts of the token before it."""
    from elmoe.trace import read_trace
    from elmoe.trace.summary import summarise

    summary = summarise(read_trace(path))
    if as_json:
        print_json(summary)
        return
    print_table(
        str(path), ("", "value"), [(SUMMARY_WORDS.get(name, name), _shown(value)) for name, value in summary.items()]
    )


@command.command("policies")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--share", type=NumberRange(0, 1, min_open=True), default=0.5, show_default=True,
              help="Share of each layer's experts that the cache holds.")  # fmt: skip
@json_option
def policies(path: Path, share: float, as_json: bool) -> None:
    """Compare hit rates of the policies of `--policy` on a trace.

    PATH is a trace or a facts file. belady is the best that a cache can do if it knows the future."""
    from elmoe.trace import read_facts
    from elmoe.trace.replacement import hit_rates_of

    facts = read_facts(path)
    slots = max(1, round(share * facts.experts))
    rates = hit_rates_of(facts.chosen[facts.computed], facts.experts, slots)
    if as_json:
        print_json({"slots": slots, "hit_rates": rates})
        return
    title = f"{slots} of {facts.experts} experts per layer, whole experts, one token at a time"
    print_table(title, ("policy", "hits"), [(name, percent(rate)) for name, rate in rates.items()])


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return str(value)


for subcommand in (import_, fit, synthesise, profile):
    command.add_command(subcommand)
