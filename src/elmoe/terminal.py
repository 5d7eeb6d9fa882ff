"""Tables, progress bars and numbers for people, on a terminal or in a log. Loads rich when something is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from elmoe.units import format_bytes


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
