"""``elmoe generate``."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elmoe.cli.common import (
    LogitBias,
    NumberRange,
    PromptText,
    Serving,
    force_option,
    json_option,
    penalty_type,
    print_json,
    seed_type,
    serving_options,
    temperature_type,
)
from elmoe.terminal import counted
from elmoe.units import format_bytes

if TYPE_CHECKING:
    from elmoe.cli.prompts import PromptLine
    from elmoe.engine.request import Output, Request, Result
    from elmoe.grammar import Grammar
    from elmoe.llm import Model

ENDED = {"eos": "the model", "stop": "a stop string", "length": "--max-tokens"}
"""Why a text ended, in words."""


@click.command("generate")
@click.argument("store")
@click.option("--prompt", multiple=True, type=PromptText(),
              help="Text to continue; - is standard input, @FILE a file, @@ begins a text with @. Give it several times for "
              "a batch.")  # fmt: skip
@click.option("--prompts", "prompts_path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help='A file of JSON lines: "text", {"prompt": ...} or {"messages": [...]}.')  # fmt: skip
@click.option("--chat", is_flag=True, help="Each prompt is a message of the user, written with the model's chat template.")
@click.option("--system", type=PromptText(), help="System message before each prompt of --chat.")
@click.option("--mode", type=click.Choice(["plain", "cache", "elastic"]), default="elastic", show_default=True,
              help="plain: no drafts, nothing is kept in memory. cache: the experts used most are kept. elastic: these also "
              "draft.")  # fmt: skip
@click.option("--max-tokens", type=click.IntRange(1, 1 << 24), default=128, show_default=True,
              help="Tokens of an answer at most.")  # fmt: skip
@click.option("--batch", type=click.IntRange(1, 64), help="Sequences served at once [default: all prompts, up to 16].")
@click.option("--temperature", type=temperature_type, default=0.0, show_default=True, help="0 takes the most likely token.")
@click.option("--top-k", type=click.IntRange(0, 1 << 24), default=0, show_default=True,
              help="Sample among the k most likely tokens; 0 is off.")  # fmt: skip
@click.option("--top-p", type=NumberRange(0, 1, min_open=True), default=1.0, show_default=True,
              help="Sample among the most likely tokens that have this probability together; 1 is off.")  # fmt: skip
@click.option("--min-p", type=NumberRange(0, 1), default=0.0, show_default=True,
              help="Sample among tokens with this share of the highest probability; 0 is off.")  # fmt: skip
@click.option("--presence-penalty", type=penalty_type, default=0.0, show_default=True,
              help="Lower the logits of tokens that the answer holds.")  # fmt: skip
@click.option("--frequency-penalty", type=penalty_type, default=0.0, show_default=True,
              help="Lower them as often as the answer holds the token.")  # fmt: skip
@click.option("--repetition-penalty", type=NumberRange(0.001, 100), default=1.0, show_default=True,
              help="Divide logits of tokens that prompt or answer hold; 1 is off.")  # fmt: skip
@click.option("--logit-bias", type=LogitBias(), multiple=True, help="Add to the logit of a token id; may be repeated.")
@click.option("--json-schema", "schema_path", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The answer is JSON of the schema in this file.")  # fmt: skip
@click.option("--seed", type=seed_type, default=0, show_default=True, help="Equal seeds give equal answers.")
@click.option("--n", "copies", type=click.IntRange(1, 64), default=1, show_default=True, help="Answers to each prompt.")
@click.option("--stop", multiple=True, type=PromptText(), help="End the text before this string; may be repeated.")
@click.option("--ignore-eos", is_flag=True, help="Do not stop at the end-of-sequence token.")
@click.option("--trace", "trace_path", type=click.Path(dir_okay=False), help="Record the run's routing facts (Parquet).")
@click.option("--timeline", "timeline_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write when passes, waits and reads happened (Chrome trace events, for Perfetto).")  # fmt: skip
@click.option("--quiet", is_flag=True, help="Print the answers alone: no prompts, no notes.")
@force_option
@serving_options
@json_option
def command(
    store: str, prompt: tuple[str, ...], prompts_path: Path | None, chat: bool, system: str | None, mode: Any,
    max_tokens: int, batch: int | None, temperature: float, top_k: int, top_p: float, min_p: float, presence_penalty: float,
    frequency_penalty: float, repetition_penalty: float, logit_bias: tuple[tuple[int, float], ...], schema_path: Path | None,
    seed: int, copies: int,
    stop: tuple[str, ...], ignore_eos: bool, trace_path: str | None, timeline_path: Path | None, quiet: bool, force: bool,
    serving: Serving, as_json: bool,
) -> None:  # fmt: skip
    """Generate text from STORE: a store, a GGUF file, a Hugging Face folder, or `demo`.

    The output is the same in every mode.
    """
    from elmoe.bitslice import SamplingParameters
    from elmoe.cli.prompts import collect_prompts
    from elmoe.engine.request import Request, numbered
    from elmoe.files import check_output, same_file
    from elmoe.store import peak_memory, resolve_store
    from elmoe.tokenizer import split_stops

    serving.check_mode(mode)
    if trace_path is not None:
        import elmoe.trace  # noqa: F401 - what it needs is told before a model is converted
    check_output(trace_path, force, "trace")
    check_output(timeline_path, force, "timeline")
    if same_file(trace_path, timeline_path):
        raise click.UsageError("--trace and --timeline name the same file")
    if not os.path.exists(store):
        resolve_store(store)  # a prompt given in its place is told as such, before a prompt is missed
    prompts = collect_prompts(prompt, prompts_path, chat, system)
    options = serving.options(mode, batch or min(len(prompts) * copies, 16))
    with serving.load(store, options) as model:
        if not quiet:
            click.echo(f"reader: {model.reader_note}", err=True)
        sampling = SamplingParameters(
            temperature, top_k, top_p, min_p, seed, 0, presence_penalty, frequency_penalty, repetition_penalty, logit_bias
        )
        grammar = None if schema_path is None else _grammar(model, schema_path)
        strings, stop_tokens = split_stops(model.tokenizer, stop)
        asked = partial(Request, max_tokens=max_tokens, sampling=sampling, stop=strings, ignore_eos=ignore_eos,
                        stop_tokens=stop_tokens, copies=copies, text=not as_json, grammar=grammar)  # fmt: skip
        requests = numbered(asked(line.tokens(model)) for line in prompts)
        shown = [line.shown for line in prompts for _ in range(copies)]
        served = [request for request in requests for _ in range(copies)]
        recorder: Any = nullcontext()
        if trace_path is not None:
            from elmoe.trace import TraceRecorder

            recorder = TraceRecorder(
                trace_path, model.reader.spec, {"mode": mode, "store": model.path.name, "ignore_eos": ignore_eos}
            )
        timeline = None
        if timeline_path is not None:
            from elmoe.engine.observe import Timeline

            timeline = Timeline()
        writer = _Writer([""] * len(shown) if quiet else _headings(prompts, copies), silent=as_json)
        results: list[Result | None] = [None] * len(served)
        with recorder:
            try:
                for outputs in model.engine.run(requests, recorder if trace_path else None, timeline):
                    for output in outputs:
                        place = output.request * copies + output.choice
                        writer.take(output, place)
                        results[place] = output.result
                        if output.result is not None and output.result.error is not None:
                            raise output.result.error
            finally:
                writer.close()  # the text comes first: what else is written may fail
            used = model.engine.options.mode  # plain where there are no experts
            statistics, finished = model.engine.statistics, [result for result in results if result is not None]
            facts = statistics.as_dict()
            if as_json:
                answers = _answers(model, shown, served, finished)
                told = {"mode": used, "tier": model.tier, "peak_memory_bytes": peak_memory(), "statistics": facts}
                print_json({**answers[0], "results": answers, **told})
        if timeline_path is not None and timeline is not None:
            timeline.write(timeline_path)
    if not as_json and not quiet:
        _tell(model, mode, _ends(served, finished))


def _tell(model: Model, mode: str, ends: str) -> None:
    """How it went; ``mode`` was asked for."""
    from elmoe.store import peak_memory

    used, statistics = model.engine.options.mode, model.engine.statistics
    rate, judged = statistics.as_dict()["tokens_per_second"], statistics.accepted + statistics.rejected
    if used != mode:
        click.echo(f"mode {used} in place of {mode}: this model has no experts to cache or to draft with", err=True)
    click.echo(
        f"[{used}; {model.tier}] {counted(statistics.committed, 'token')}"
        + (f", {rate:.0f} tokens/s" if isinstance(rate, float) else "")
        + (f", {statistics.accepted} of {judged} draft tokens accepted" if judged else "")
        + f", peak memory {format_bytes(peak_memory())}; ended by: {ends}",
        err=True,
    )


def _grammar(model: Model, path: Path) -> Grammar:
    from elmoe.errors import RequestError
    from elmoe.grammar import MAX_SCHEMA_BYTES
    from elmoe.untrusted import read_text, short

    text = read_text(path, RequestError, MAX_SCHEMA_BYTES, "JSON schema", "convert it, for example with iconv -t utf-8")
    try:
        return model.grammars.json(text)
    except RequestError as error:
        raise RequestError(f"'{short(path)}': {error}", error.hint or "see json-schema.org") from None


def _answers(
    model: Model, prompts: Sequence[str], requests: Sequence[Request], results: Sequence[Result]
) -> list[dict[str, Any]]:  # fmt: skip
    return [
        {
            "prompt": text,
            "text": model.text_of(request, result),
            "token_ids": list(result.tokens),
            "logprobs": list(result.logprobs),
            "finish_reason": result.finish,
        }
        for text, request, result in zip(prompts, requests, results, strict=True)
    ]


def _headings(prompts: Sequence[PromptLine], copies: int) -> list[str]:
    """What is printed before each answer: a text that is continued as it is, a message on a line of its own."""
    return [line.shown if line.messages is None else f"{line.shown}\n" for line in prompts for _ in range(copies)]


class _Writer:
    """Prints texts in the order of their prompts, each as it is made; texts behind the one being printed wait."""

    def __init__(self, prompts: Sequence[str], silent: bool) -> None:
        self._prompts, self._silent = prompts, silent
        self._waiting, self._ended = ["" for _ in prompts], [False for _ in prompts]
        self._current, self._begun = 0, False

    def take(self, output: Output, place: int) -> None:
        """Print what can be printed of an output; ``place``: of its text among all."""
        self._waiting[place] += output.text
        self._ended[place] |= output.result is not None
        while not self._silent and self._current < len(self._prompts):
            text, self._waiting[self._current] = self._waiting[self._current], ""
            if text or self._ended[self._current]:
                self._print(text)
            if not self._ended[self._current]:
                break
            self._end()

    def close(self) -> None:
        """Print what is left of texts that did not end; of those that did not begin, nothing."""
        while not self._silent and self._current < len(self._prompts):
            if self._begun or self._waiting[self._current]:
                self._print(self._waiting[self._current])
                self._end()
            else:
                self._current += 1

    def _print(self, text: str) -> None:
        click.echo(text if self._begun else f"{self._prompts[self._current]}{text}", nl=False)
        self._begun = True
        if sys.stdout is not None:
            sys.stdout.flush()

    def _end(self) -> None:
        click.echo()
        self._current, self._begun = self._current + 1, False


def _ends(requests: Sequence[Request], results: Sequence[Result]) -> str:
    """Why the texts ended: ``--max-tokens``, or with several texts ``2 x --max-tokens, 1 x a stop string``."""
    reasons: Counter[str] = Counter()
    for request, result in zip(requests, results, strict=True):
        reason = ENDED.get(result.finish, result.finish)
        if result.finish == "length" and len(result.tokens) < request.max_tokens:
            reason = "the context is full"
        if result.finish == "stop" and request.grammar is not None and not (request.stop or request.stop_tokens):
            reason = "the end of the JSON"
        if result.finish == "eos" and len(result.tokens) <= 1:
            reason = "the model, at once"
        reasons[reason] += 1
    if len(results) == 1:
        return next(iter(reasons))
    return ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
