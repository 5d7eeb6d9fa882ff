"""How much of the processor other programs use: runs on a shared machine wait for calm, and say what they did not get."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, sleep
from typing import TypeVar

Value = TypeVar("Value")
WINDOW = 0.3
"""Seconds over which use is observed."""
CALM = 0.15
"""Cores used by others below which the machine counts as calm."""
TICK = os.sysconf("SC_CLK_TCK")


def others_seconds() -> float:
    """Processor seconds used so far by the processes that are alive and neither this one nor its children."""
    usage, parents = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            process = int(folder.name)
            parents[process], usage[process] = int(fields[1]), (int(fields[11]) + int(fields[12])) / TICK

    def is_ours(process: int) -> bool:
        while process > 0:
            if process == os.getpid():
                return True
            process = parents.get(process, 0)
        return False

    return sum(seconds for process, seconds in usage.items() if not is_ours(process))


def wait_for_calm(patience: float) -> None:
    """Return once others use less than ``CALM`` cores, or after ``patience`` seconds."""
    began = perf_counter()
    while perf_counter() - began < patience:
        before, start = others_seconds(), perf_counter()
        sleep(WINDOW)
        if (others_seconds() - before) / (perf_counter() - start) < CALM:
            return


def observed(run: Callable[[], Value]) -> tuple[Value, float]:
    """What ``run`` returns, and how many cores others used meanwhile, on average."""
    before, began = others_seconds(), perf_counter()
    value = run()
    return value, max(0.0, others_seconds() - before) / (perf_counter() - began)
