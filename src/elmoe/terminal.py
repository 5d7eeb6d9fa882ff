"""Tables, progress bars and numbers for people, on a terminal or in a log. Loads rich when something is shown.

Names are shown as they are: text in brackets is no markup. A table too wide for the terminal is written as a list, so that
no number is ever cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Timer
from typing import Any

from elmoe.units import format_bytes

PLAIN_WIDTH = 140
"""Columns of a table that goes to a pipe or a file."""
SHOWN_AFTER = 0.3
"""Seconds before a progress bar is shown, so that a refusal stands alone."""


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table to stdout; numbers right-aligned."""
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

    cells = [[Text("-" if cell is None else shown(cell)) for cell in row] for row in rows]
    table = Table()
    for index, column in enumerate(columns):
        # The first column holds names, which may wrap; numbers stay whole.
        table.add_column(Text(column), justify="left" if index == 0 else "right", no_wrap=index > 0, overflow="fold")
    for row in cells:
        table.add_row(*row)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH, highlight=False)
    console.print(Text(shown(title), style="italic"), soft_wrap=True)
    if Measurement.get(console, console.options.update(max_width=10_000), table).minimum <= console.width:
        console.print(table)
        return
    for row in cells:
        for column, cell in zip(columns, row, strict=True):
            console.print(Text(f"  {column}: " if column else "") + cell, soft_wrap=True)
        console.print()


def print_texts(prompts: Sequence[str], texts: Mapping[str, Sequence[str]], least: int) -> None:
    """Prompts, each with its continuations: side by side on a terminal of ``least`` columns; else only the last ones."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal or console.width < least:
        for prompt, text in zip(prompts, list(texts.values())[-1], strict=True):
            console.print(Text.assemble((shown(prompt), "bold"), shown(text) + "\n"), soft_wrap=True)
        return
    table = Table(box=None, expand=True, padding=(0, 2, 1, 0))
    for name in texts:
        table.add_column(name, ratio=1, overflow="fold")
    for prompt, *several in zip(prompts, *texts.values(), strict=True):
        table.add_row(*(Text.assemble((shown(prompt), "bold"), shown(text)) for text in several))
    console.print(table)


def shown(text: object) -> str:
    """Text that a terminal can show: control characters and halves of surrogate pairs as escapes."""
    return "".join(
        char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape", "backslashreplace").decode()
        for char in str(text)
    )


def percent(value: float | None) -> str | None:
    """``97.3 %``."""
    return None if value is None else f"{100 * value:.1f} %"


def counted(count: int, what: str) -> str:
    """``1 model``, ``2 models``."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def number(value: float | None, digits: int = 2) -> str | None:
    """A fixed number of digits."""
    return None if value is None else f"{value:.{digits}f}"


def small_number(value: float) -> str:
    """One digit after the point, and more where the number is below one."""
    return f"{value:.1f}" if value >= 1 or value == 0 else f"{value:.2g}"


def size(value: float | None) -> str | None:
    """Bytes for people."""
    return None if value is None else format_bytes(value)


@contextmanager
def progress_bar(
    description: str, total: float | None, bytes_: bool = False, rate: bool = False
) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, of bytes perhaps with their rate; yields a function of the amount done so far and, once
    known, the total."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    done = DownloadColumn() if bytes_ else MofNCompleteColumn()
    label = TextColumn("{task.description}", markup=False)
    columns = [label, BarColumn(), done, *([TransferSpeedColumn()] if rate else []), TimeRemainingColumn()]
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(shown(description), total=total)
    timer = Timer(SHOWN_AFTER, progress.start)
    timer.start()
    try:
        yield lambda completed, total=None: progress.update(task, completed=completed, total=total)
        progress.update(task, completed=progress.tasks[task].total)  # also where a text ended early
    finally:
        timer.cancel()
        timer.join()
        if progress.tasks[task].completed:
            progress.start()
        if progress.live.is_started:
            progress.stop()
