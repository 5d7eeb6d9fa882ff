"""Options shared by the verbs, and JSON output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import wraps
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from elmoe.errors import ElmoeError
from elmoe.units import parse_bandwidth, parse_bytes, parse_fast_memory
from elmoe.untrusted import short

if TYPE_CHECKING:
    from elmoe.engine.options import EngineOptions
    from elmoe.llm import Model


class Quantity(click.ParamType):
    """A value with a unit, read by a parser of ``elmoe.units``."""

    def __init__(self, name: str, parse: Callable[[str], int | float]) -> None:
        self.name, self._parse = name, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """Text to a number."""
        if isinstance(value, (int, float)):
            return value
        try:
            return self._parse(value)
        except ElmoeError as error:
            self.fail(f"{error} (hint: {error.hint})", param, ctx)


class NumberRange(click.FloatRange):
    """A range of numbers, to which "nan" does not belong."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Text to a number."""
        number: float = super().convert(value, param, ctx)
        if isnan(number):
            self.fail(f"'{value}' is no number", param, ctx)
        return number


class FolderPath(click.Path):
    """A folder, which may be there or not; an empty name is none."""

    def __init__(self) -> None:
        super().__init__(file_okay=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Text to a path."""
        if value == "":
            self.fail("the name is empty", param, ctx)
        return super().convert(value, param, ctx)


class PromptText(click.ParamType):
    """Text that is Unicode: bytes on the command line that are no UTF-8 are refused."""

    name = "TEXT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text as it is."""
        if any("\ud800" <= char <= "\udfff" for char in value):
            self.fail(f"'{short(value, 40)}' is not UTF-8: convert it, for example with iconv -t utf-8", param, ctx)
        return str(value)


class LogitBias(click.ParamType):
    """A token id and what is added to its logit."""

    name = "ID=VALUE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, float]:
        """Text to the pair."""
        if isinstance(value, tuple):
            return value
        token, _, bias = value.partition("=")
        try:
            if not (token.isascii() and token.isdigit() and len(token) <= 8):
                raise ValueError
            return int(token), NumberRange(-100, 100).convert(float(bias), param, ctx)
        except ValueError:
            self.fail(f"'{short(value, 40)}' is no token id and number, such as 42=-100", param, ctx)


class IntegerList(click.ParamType):
    """Comma-separated integers."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Text to a tuple."""
        if isinstance(value, tuple):
            return value
        parts = [part.strip() for part in value.split(",")]
        if not all(part.isascii() and part.isdigit() and len(part) <= 7 for part in parts):
            self.fail(f"'{short(value, 60)}' is not a list of whole numbers below 10 million such as 1,4,16", param, ctx)
        return tuple(int(part) for part in parts)


force_option = click.option("--force", is_flag=True, help="Replace output files that exist.")
seed_type = click.IntRange(0, (1 << 63) - 1)
temperature_type = NumberRange(0, 100)
penalty_type = NumberRange(-2, 2)
json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
store_dir_option = click.option(
    "--store-dir", type=FolderPath(),
    help="Where stores of GGUF files and Hugging Face folders are kept [default: elmoe/stores in $XDG_CACHE_HOME].",
)  # fmt: skip
threads_option = click.option("--threads", type=click.IntRange(1, 64), help="Kernel threads [default: all cores].")
backend_option = click.option(
    "--backend", type=click.Choice(["native", "reference"]), default="native", show_default=True,
    help="Native kernels, or their NumPy definition: the same bits, slowly.",
)  # fmt: skip


budget = Quantity("SIZE|PERCENT", parse_fast_memory)
SERVING_OPTIONS = (
    click.option(
        "--fast-memory", type=budget,
        help="Memory for the model: 2GiB, which is enforced, or 25% of the experts, which is simulated.",
    ),
    click.option(
        "--reader", type=click.Choice(["auto", "memory", "direct"]), default="auto", show_default=True,
        help="memory: the whole store in memory, a budget is simulated. direct: the budget is enforced, experts are "
        "read from disk. auto: direct for a budget in bytes, or a store larger than the memory available.",
    ),
    click.option(
        "--slow-bandwidth", type=Quantity("BYTES/S", parse_bandwidth),
        help="Read the disk no faster than this: 1.7GB/s (direct reader).",
    ),
    click.option(
        "--split", type=click.Choice(["auto", "msb_first", "whole_experts"]), default="auto", show_default=True,
        help="What fills the budget first: the upper bits of all experts (msb_first, as in the paper), all bits of fewer "
        "experts (whole_experts), or what promises more tokens/s (auto).",
    ),
    click.option(
        "--policy", type=click.Choice(["decayed", "lru", "lfu", "static", "random"]), default="decayed", show_default=True,
        help="Which experts stay in memory: those used often of late (decayed), last (lru), most (lfu), in the first "
        "step (static), or any (random).",
    ),
    click.option(
        "--kv-memory", type=Quantity("SIZE", parse_bytes),
        help="Largest KV cache, for example 1GiB; experts use the rest [default: enough for the batch with the whole "
        "context, but at most half of the memory available, or the rest of the budget].",
    ),
    click.option(
        "--prefill-chunk", type=click.IntRange(1, 1 << 16),
        help="Prompt tokens of one step: with fewer, other texts wait less; with more, prompts are faster [default: 256 "
        "in memory, up to 1024 if experts are read from disk].",
    ),
    click.option("--draft-length", type=int, help="Draft exactly this many tokens [default: chosen as it runs]."),
    click.option("--draft-top-k", type=int, help="Experts per token of the draft [default: the model's]."),
    store_dir_option,
    threads_option,
    backend_option,
)  # fmt: skip


@dataclass(frozen=True)
class Serving:
    """The options of :func:`serving_options`, by the names of ``EngineOptions`` and ``elmoe.load``."""

    fast_memory: int | float | None
    reader: Any
    slow_bandwidth: float | None
    split: Any
    policy: Any
    kv_memory: int | None
    prefill_chunk: int | None
    draft_length: int | None
    draft_top_k: int | None
    store_dir: Path | None
    threads: int | None
    backend: Any

    def check_mode(self, mode: Any) -> None:
        """UsageError for an option of drafts in a mode without any."""
        for name in ("draft_length", "draft_top_k"):
            if mode != "elastic" and getattr(self, name) is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --mode elastic: {mode} does not draft")

    def options(self, mode: Any, batch: int) -> EngineOptions:
        """How to serve."""
        from elmoe.engine.options import EngineOptions
        from elmoe.policy.residency import ResidencyParameters

        return EngineOptions(
            mode=mode, batch=batch, fast_memory=self.fast_memory, slow_bandwidth=self.slow_bandwidth, split=self.split,
            kv_memory=self.kv_memory, prefill_chunk=self.prefill_chunk, draft_length=self.draft_length,
            draft_top_k=self.draft_top_k, residency=ResidencyParameters(self.policy),
        )  # fmt: skip

    def load(self, store: str, options: EngineOptions) -> Model:
        """An open model with the kernels' threads set: all cores of this process by default."""
        from elmoe.llm import load

        return load(store, options, backend=self.backend, reader=self.reader, threads=self.threads, store_dir=self.store_dir)


def serving_options(command: Callable) -> Callable:
    """The options that shape decoding, handed to the command as one ``serving``."""
    names = [field.name for field in fields(Serving)]

    @wraps(command)
    def collect(**arguments: Any) -> Any:
        serving = Serving(**{name: arguments.pop(name) for name in names})
        return command(serving=serving, **arguments)

    result: Callable = collect
    for option in reversed(SERVING_OPTIONS):
        result = option(result)
    return result


def refuse_given(names: Iterable[str], why: str) -> None:
    """UsageError for the first of these options that is on the command line."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            option = next(one for one in context.command.params if one.name == name)
            raise click.UsageError(f"{option.opts[0]} {why}")


def print_json(data: Any) -> None:
    """Strict JSON to stdout."""
    from elmoe.files import json_text

    click.echo(json_text(data, indent=1))
