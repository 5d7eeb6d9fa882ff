"""What is fuzzed: readers of files that others wrote. Each takes bytes and may fail with an ElmoeError only."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.fuzz import model_targets, simulation_targets
from tests.fuzz.target import Target, nothing

TARGETS = {target.name: target for target in (*model_targets.TARGETS, *simulation_targets.TARGETS)}


def _run_selftest(_: Path, raw: bytes) -> None:
    """What the harness must notice."""
    import ctypes
    import time

    kind, kept = raw.decode(), []
    if kind == "raise":
        raise ValueError(kind)
    if kind == "crash":
        ctypes.string_at(0)
    while kind == "memory" and len(kept) < 25:
        kept.append(b"x" * (1 << 26))
    while kind == "hang":
        pass
    if kind == "wait":
        time.sleep(60)


SELFTEST = Target("selftest", "text", nothing, lambda _: [b"nothing"], _run_selftest)


def prepared(target: Target, folder: Path) -> list[bytes]:
    """The seeds of a target whose folder is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    target.prepare(folder)
    seeds = target.seeds(folder)
    assert seeds
    return seeds


def is_expected(error: Any) -> bool:
    """Whether an input may end so."""
    from elmoe.errors import ElmoeError

    return isinstance(error, ElmoeError)
