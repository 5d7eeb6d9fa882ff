"""``elmoe trace profile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import (
    backend_option,
    force_option,
    json_option,
    print_json,
    seed_type,
    temperature_type,
    threads_option,
)
from elmoe.terminal import percent, print_table, progress_bar

PROMPTS_LIMIT = 1 << 30
SHOWN = (1, 2, 4, 8, 16)


def read_prompts(path: Path) -> list[str]:
    """Lines of a text file that are not empty; RequestError if there is none."""
    from elmoe.errors import RequestError
    from elmoe.untrusted import read_text

    if path.suffix == ".jsonl":
        raise RequestError(f"'{path.name}' holds JSON lines", "write one prompt per line, as plain text, in a .txt file")
    text = read_text(path, RequestError, PROMPTS_LIMIT, "prompt file", "convert it, for example with iconv -t utf-8")
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise RequestError(f"'{path}' holds no prompt", "write one per line")
    return prompts


@click.command("profile")
@click.argument("store")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--prompts", "prompts_path", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Text file, one prompt per line.")  # fmt: skip
@click.option("--prompt-tokens", type=click.IntRange(1), help="Cut prompts after this many tokens.")
@click.option("--max-tokens", type=click.IntRange(2), default=96, show_default=True, help="Tokens of an answer at most.")
@click.option("--temperature", type=temperature_type, default=0.8, show_default=True, help="0 takes the most likely token.")
@click.option("--seed", type=seed_type, default=0, show_default=True, help="Prompt n is sampled with seed + n.")
@click.option("--batch", type=click.IntRange(1, 64), default=16, show_default=True, help="Sequences served at once.")
@click.option("--depth", type=click.IntRange(1, 64), default=16, show_default=True, help="Tokens per draft.")
@threads_option
@backend_option
@force_option
@json_option
def profile(
    store: str, out: Path, prompts_path: Path, prompt_tokens: int | None, max_tokens: int, temperature: float, seed: int,
    batch: int, depth: int, threads: int | None, backend: Any, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure how often drafts are accepted on STORE.

    By bits, share of the experts in memory, position in the draft, and confidence. OUT is JSON, for `elmoe simulate
    --acceptance`."""
    from elmoe.files import check_output

    check_output(out, force, "acceptance table")
    from elmoe.bitslice import SamplingParameters
    from elmoe.engine.options import EngineOptions
    from elmoe.engine.request import Request
    from elmoe.llm import load
    from elmoe.measure.acceptance import BITS, SHARES, profile_acceptance
    from elmoe.trace.acceptance import AcceptanceTable, save_acceptance

    prompts = read_prompts(prompts_path)
    options = EngineOptions(batch=min(batch, len(prompts)))
    with load(store, options, backend=backend, reader="memory", threads=threads) as model:
        requests = [
            Request(model.encode(text)[:prompt_tokens], max_tokens, SamplingParameters(temperature, seed=seed + index))
            for index, text in enumerate(prompts)
        ]
        with progress_bar("rows", len(BITS) * len(SHARES)) as bar:
            done = iter(range(1, 10**6))
            rows = profile_acceptance(model, requests, depth, lambda: bar(next(done)))
    source = f"store {store}; {len(prompts)} prompts x {max_tokens} tokens, temperature {temperature:g}, seed {seed}"
    table = AcceptanceTable(status="measured", source=source, rows=rows)
    save_acceptance(table, out)
    shown = [n for n in SHOWN if n <= depth]
    lines = [(row.bits, row.share, [table.probability(row.bits, row.share, n) for n in shown]) for row in rows]
    if as_json:
        names = ("bits", "share", "acceptance")
        print_json({"out": str(out), "depths": shown, "rows": [dict(zip(names, line, strict=True)) for line in lines]})
        return
    print_table(
        f"wrote {out}: acceptance by depth, where all before was accepted",
        ("bits", "resident", *(f"depth {n}" for n in shown)),
        [(bits, percent(share), *(percent(chance) for chance in chances)) for bits, share, chances in lines],
    )
