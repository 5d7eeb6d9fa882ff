"""``elmoe generate``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elmoe.cli.common import PromptText, Serving, force_option, json_option, print_json, seed_type, serving_options
from elmoe.units import format_bytes

if TYPE_CHECKING:
    from elmoe.engine.request import Request, Result
    from elmoe.engine.session import Session

ENDED = {"eos": "the model ended it", "stop": "a stop string", "length": "--max-tokens"}
"""Why a text ended, in words."""


@click.command("generate")
@click.argument("store")
@click.option(
    "--prompt", required=True, multiple=True, type=PromptText(), help="Text to continue; give it several times for a batch."
)
@click.option("--chat", is_flag=True, help="Put each prompt through the store's chat template as a user message.")
@click.option("--mode", type=click.Choice(["plain", "cache", "elastic"]), default="elastic", show_default=True)
@click.option("--max-tokens", type=click.IntRange(1, 1 << 24), default=128, show_default=True)
@click.option("--batch", type=click.IntRange(1, 64), help="Sequences served at once [default: all prompts, up to 16].")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(0, 1 << 24), default=0, show_default=True, help="0 is off.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--seed", type=seed_type, default=0, show_default=True)
@click.option("--stop", multiple=True, type=PromptText(), help="End the text before this string; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Do not stop at the end-of-sequence token.")
@click.option("--trace", "trace_path", type=click.Path(dir_okay=False), help="Record the run's routing facts (Parquet).")
@click.option("--timeline", "timeline_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write when passes, waits and reads happened (Chrome trace events, for Perfetto).")  # fmt: skip
@force_option
@serving_options
@json_option
def command(
    store: str, prompt: tuple[str, ...], chat: bool, mode: Any, max_tokens: int, batch: int | None, temperature: float,
    top_k: int, top_p: float, min_p: float, seed: int, stop: tuple[str, ...], ignore_eos: bool, trace_path: str | None,
    timeline_path: Path | None, force: bool, serving: Serving, as_json: bool,
) -> None:  # fmt: skip
    """Generate text from STORE (a path, or ``demo``). The output is the target model's in every mode."""
    from elmoe.bitslice import SamplingParameters
    from elmoe.engine.request import Request
    from elmoe.files import check_output
    from elmoe.store import peak_memory

    check_output(trace_path, force, "trace")
    check_output(timeline_path, force, "timeline")
    options = serving.options(mode, batch or min(len(prompt), 16))
    with serving.session(store, options) as session:
        click.echo(session.reader_note, err=True)
        sampling = SamplingParameters(temperature, top_k, top_p, min_p, seed)
        texts = [session.chat_prompt([{"role": "user", "content": text}]) if chat else text for text in prompt]
        requests = [Request(session.encode(text, rendered=chat), max_tokens, sampling, stop, ignore_eos) for text in texts]
        recorder: Any = nullcontext()
        if trace_path is not None:
            from elmoe.trace import TraceRecorder

            recorder = TraceRecorder(trace_path, session.reader.spec, {"mode": mode, "store": session.path.name})
        timeline = None
        if timeline_path is not None:
            from elmoe.engine.observe import Timeline

            timeline = Timeline()
        committed: list[list[int]] = [[] for _ in requests]
        with recorder:
            try:
                results, statistics = session.generate(
                    requests,
                    recorder if trace_path else None,
                    lambda index, tokens: committed[index].extend(tokens),
                    timeline,
                )
            except KeyboardInterrupt:
                if not as_json:
                    _print_texts(prompt, [session.decode(tokens) for tokens in committed])
                raise
            # The text comes first: what else is written may fail.
            answers = _answers(session, prompt, requests, results)
            facts = statistics.as_dict()
            if as_json:
                told = {"mode": mode, "tier": session.tier, "peak_memory_bytes": peak_memory(), "statistics": facts}
                print_json({**answers[0], "results": answers, **told})
            else:
                _print_texts(prompt, [answer["text"] for answer in answers])
        if timeline_path is not None and timeline is not None:
            timeline.write(timeline_path)
    if as_json:
        return
    rate = facts["tokens_per_second"]
    click.echo(
        f"[{mode}; {session.tier}] {statistics.committed} tokens"
        + (f", {rate:.0f} tokens/s" if isinstance(rate, float) else "")
        + (f", acceptance {facts['acceptance_rate']:.1%}" if facts["acceptance_rate"] is not None else "")
        + f", peak memory {format_bytes(peak_memory())}; ended by: {_ends(requests, results)}",
        err=True,
    )


def _answers(
    session: Session, prompts: Sequence[str], requests: Sequence[Request], results: Sequence[Result]
) -> list[dict[str, Any]]:  # fmt: skip
    return [
        {
            "prompt": text,
            "text": session.text_of(request, result),
            "token_ids": list(result.tokens),
            "logprobs": list(result.logprobs),
            "finish_reason": result.finish,
        }
        for text, request, result in zip(prompts, requests, results, strict=True)
    ]


def _print_texts(prompts: Sequence[str], texts: Sequence[str]) -> None:
    for prompt, text in zip(prompts, texts, strict=True):
        click.echo(f"{prompt}{text}")
    if sys.stdout is not None:
        sys.stdout.flush()


def _ends(requests: Sequence[Request], results: Sequence[Result]) -> str:
    """Why the texts ended: ``--max-tokens``, or with several texts ``2 x --max-tokens, 1 x a stop string``."""
    reasons: Counter[str] = Counter()
    for request, result in zip(requests, results, strict=True):
        reason = ENDED.get(result.finish, result.finish)
        if result.finish == "length" and len(result.tokens) < request.max_tokens:
            reason = "the context is full"
        if result.finish == "eos" and len(result.tokens) <= 1:
            reason = "the model ended it at once"
        reasons[reason] += 1
    if len(results) == 1:
        return next(iter(reasons))
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
