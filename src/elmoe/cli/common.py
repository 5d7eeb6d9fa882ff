"""Options and output shared by the verbs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from elmoe.errors import ElmoeError
from elmoe.units import format_bytes, parse_fast_memory


class FastMemory(click.ParamType):
    """A budget such as ``2GiB`` or ``25%``."""

    name = "SIZE|PERCENT"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        """Text to bytes or a share."""
        if isinstance(value, (int, float)):
            return value
        try:
            return parse_fast_memory(value)
        except ElmoeError as error:
            self.fail(f"{error} (hint: {error.hint})", param, ctx)


class IntegerList(click.ParamType):
    """Comma-separated integers."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Text to a tuple."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            self.fail(f"'{value}' is not a list of integers such as 1,4,16", param, ctx)


json_option = click.option("--json", "as_json", is_flag=True, help="Machine-readable output on stdout.")
threads_option = click.option("--threads", type=click.IntRange(1, 64), help="Kernel threads [default: all cores].")
backend_option = click.option(
    "--backend", type=click.Choice(["native", "reference"]), default="native", show_default=True,
    help="Native kernels, or their NumPy definition: the same bits, slowly.",
)  # fmt: skip


def elastic_options(command: Callable) -> Callable:
    """The options that shape elastic decoding."""
    for option in reversed(
        (
            click.option("--fast-memory", type=FastMemory(), help="Budget of the fast tier: 2GiB, or 25% of the experts."),
            click.option(
                "--split", type=click.Choice(["msb_first", "whole_experts"]), default="msb_first", show_default=True,
                help="How the budget is divided: all MSB slices first (paper), or whole experts.",
            ),
            click.option("--draft-length", type=int, help="Draft exactly this many tokens [default: chosen as it runs]."),
            click.option("--draft-top-k", type=int, help="Experts per token of the draft [default: the model's]."),
            threads_option,
            backend_option,
        )
    ):  # fmt: skip
        command = option(command)
    return command


def use_threads(backend: str, threads: int | None) -> None:
    """Set the kernels' thread count, all cores of this process by default."""
    if backend == "native":
        import os

        from elmoe import kernels

        kernels.set_threads(threads or min(64, len(os.sched_getaffinity(0))))


def tier_label(fast_memory: int | float | None) -> str:
    """How the tier's numbers of a ``memory`` reader are to be read."""
    return "memory, no budget" if fast_memory is None else "simulated tier: budget accounted, not enforced"


def print_json(data: Any) -> None:
    """JSON to stdout."""
    click.echo(json.dumps(data, indent=1))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table to stdout; numbers right-aligned."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*("-" if cell is None else str(cell) for cell in row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=140).print(table)


def percent(value: float | None) -> str | None:
    """``97.3 %``."""
    return None if value is None else f"{100 * value:.1f} %"


def number(value: float | None, digits: int = 2) -> str | None:
    """A fixed number of digits."""
    return None if value is None else f"{value:.{digits}f}"


def size(value: float | None) -> str | None:
    """Bytes for people."""
    return None if value is None else format_bytes(value)


@contextmanager
def progress_bar(description: str, total: float | None, bytes_: bool = False) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields a function of the amount done so far and, once known, the total."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = DownloadColumn() if bytes_ else MofNCompleteColumn()
    with Progress(
        TextColumn("{task.description}"), BarColumn(), done, TimeRemainingColumn(), console=Console(stderr=True)
    ) as progress:  # fmt: skip
        task = progress.add_task(description, total=total)
        yield lambda completed, total=None: progress.update(task, completed=completed, total=total)
