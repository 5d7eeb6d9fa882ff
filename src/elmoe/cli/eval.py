"""``elmoe eval``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import NumberRange, backend_option, json_option, print_json, store_dir_option, threads_option
from elmoe.terminal import percent, print_table, progress_bar

TEXT_LIMIT = 1 << 30
"""Largest text to score, bytes."""


@click.command("eval")
@click.argument("store")
@click.option("--text", "text_path", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="Text file to score.")  # fmt: skip
@click.option("--window", type=click.IntRange(2), default=256, show_default=True, help="Tokens per window.")
@click.option("--windows", type=click.IntRange(1), help="Score only this many windows.")
@click.option("--draft-experts", type=NumberRange(0, 1), default=1.0, show_default=True,
              help="Share of each layer's experts that the draft may use.")  # fmt: skip
@store_dir_option
@threads_option
@backend_option
@json_option
def command(
    store: str, text_path: Path, window: int, windows: int | None, draft_experts: float, store_dir: Path | None,
    threads: int | None, backend: Any, as_json: bool,
) -> None:  # fmt: skip
    """Measure the perplexity of STORE and of its 4-bit draft on a text file."""
    from elmoe.engine.options import EngineOptions
    from elmoe.errors import RequestError
    from elmoe.llm import load
    from elmoe.measure.perplexity import evaluate
    from elmoe.untrusted import read_text

    text = read_text(text_path, RequestError, TEXT_LIMIT, "text", "convert it, for example with iconv -t utf-8")
    opened = load(store, EngineOptions(), backend=backend, threads=threads, store_dir=store_dir)
    with opened as model, progress_bar("windows", windows) as bar:
        result = evaluate(model, text, window, windows, draft_experts, lambda done, total: bar(done))
        dense = not model.spec.moe_layers
    data = {"target_perplexity": result.target, "draft_perplexity": result.draft, **asdict(result)}
    if as_json:
        print_json(data)
        return
    draft = (f"draft (4 bits, {draft_experts:.0%} of experts)", f"{result.draft_nats:.4f}", f"{result.draft:.3f}")
    print_table(
        f"{result.tokens} positions in windows of {window}",
        ("model", "nats per token", "perplexity"),
        [
            ("target (all bits, natural routing)", f"{result.target_nats:.4f}", f"{result.target:.3f}"),
            *([] if dense else [draft]),
        ],
    )
    if not dense:
        click.echo(f"same most likely token: {percent(result.agreement)}")
