"""A target of the fuzzing, and seeds that are files of the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from tests.fuzz.mutation import Kind


@dataclass(frozen=True)
class Target:
    """``prepare`` makes what a folder needs, ``seeds`` valid inputs in it; ``run`` reads an input in the folder."""

    name: str
    kind: Kind
    prepare: Callable[[Path], None]
    seeds: Callable[[Path], list[bytes]]
    run: Callable[[Path, bytes], None]


def nothing(folder: Path) -> None:
    pass


def presets(folder: str, *names: str) -> Callable[[Path], list[bytes]]:
    def seeds(_: Path) -> list[bytes]:
        found = [path for path in (files("elmoe.presets") / folder).iterdir() if path.name.endswith((".yaml", ".json"))]
        return [path.read_bytes() for path in sorted(found, key=lambda path: path.name) if not names or path.name in names]

    return seeds
