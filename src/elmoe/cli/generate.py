"""``elmoe generate``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import Serving, json_option, print_json, serving_options
from elmoe.units import format_bytes


@click.command("generate")
@click.argument("store")
@click.option("--prompt", required=True, multiple=True, help="Text to continue; give it several times for a batch.")
@click.option("--chat", is_flag=True, help="Put each prompt through the store's chat template as a user message.")
@click.option("--mode", type=click.Choice(["plain", "cache", "elastic"]), default="elastic", show_default=True)
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--batch", type=click.IntRange(1, 64), help="Sequences served at once [default: all prompts, up to 16].")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=int, default=0, show_default=True, help="0 is off.")
@click.option("--top-p", type=float, default=1.0, show_default=True)
@click.option("--min-p", type=float, default=0.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--stop", multiple=True, help="End the text before this string; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Do not stop at the end-of-sequence token.")
@click.option("--trace", "trace_path", type=click.Path(dir_okay=False), help="Record the run's routing facts (Parquet).")
@click.option("--timeline", "timeline_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write when passes, waits and reads happened (Chrome trace events, for Perfetto).")  # fmt: skip
@serving_options
@json_option
def command(
    store: str, prompt: tuple[str, ...], chat: bool, mode: Any, max_tokens: int, batch: int | None, temperature: float,
    top_k: int, top_p: float, min_p: float, seed: int, stop: tuple[str, ...], ignore_eos: bool, trace_path: str | None,
    timeline_path: Path | None, serving: Serving, as_json: bool,
) -> None:  # fmt: skip
    """Generate text from STORE (a path, or ``demo``). The output is the target model's in every mode."""
    from elmoe.bitslice import SamplingParameters
    from elmoe.engine.request import Request
    from elmoe.store import peak_memory

    options = serving.options(mode, batch or min(len(prompt), 16))
    with serving.session(store, options) as session:
        click.echo(session.reader_note, err=True)
        sampling = SamplingParameters(temperature, top_k, top_p, min_p, seed)
        texts = [session.chat_prompt([{"role": "user", "content": text}]) if chat else text for text in prompt]
        requests = [Request(session.encode(text), max_tokens, sampling, stop, ignore_eos) for text in texts]
        recorder: Any = nullcontext()
        if trace_path is not None:
            from elmoe.trace import TraceRecorder

            recorder = TraceRecorder(trace_path, session.reader.spec, {"mode": mode, "store": session.path.name})
        timeline = None
        if timeline_path is not None:
            from elmoe.engine.observe import Timeline

            timeline = Timeline()
        with recorder:
            results, statistics = session.generate(requests, recorder if trace_path else None, timeline=timeline)
        if timeline_path is not None and timeline is not None:
            timeline.write(timeline_path)
        answers = [
            {
                "prompt": text,
                "text": session.text_of(request, result),
                "token_ids": list(result.tokens),
                "logprobs": list(result.logprobs),
                "finish_reason": result.finish,
            }
            for text, request, result in zip(prompt, requests, results, strict=True)
        ]
    facts = statistics.as_dict()
    tier = session.tier
    if as_json:
        first = answers[0] if len(answers) == 1 else {"results": answers}
        print_json({**first, "mode": mode, "tier": tier, "peak_memory_bytes": peak_memory(), "statistics": facts})
        return
    for answer in answers:
        click.echo(f"{answer['prompt']}{answer['text']}")
    rate = facts["tokens_per_second"]
    click.echo(
        f"[{mode}; {tier}] {statistics.committed} tokens"
        + (f", {rate:.0f} tokens/s" if isinstance(rate, float) else "")
        + (f", acceptance {facts['acceptance_rate']:.1%}" if facts["acceptance_rate"] is not None else "")
        + f", peak memory {format_bytes(peak_memory())}",
        err=True,
    )
