"""What the studies share: arguments, the paper's models and systems, progress, and writing a section."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from elmoe.report.section import Section, write_section
from elmoe.schema.hardware import Hardware, load_hardware
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.paper import MODELS, PROMPTS, SYSTEMS
from elmoe.terminal import progress_bar
from elmoe.trace.batches import BATCH_ROUTINGS, BatchRouting

FOLDER = Path("build/experiments")


@dataclass(frozen=True)
class Scope:
    """What a study covers: everything, or with ``--quick`` one model, one prompt set and two batch sizes."""

    models: tuple[str, ...] = MODELS
    prompts: tuple[str, ...] = PROMPTS
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_routing: BatchRouting = "fitted"


QUICK = Scope(("qwen3-30b-a3b",), ("mt_bench",), (1, 8))


def systems(names: Iterable[str] = SYSTEMS) -> tuple[Hardware, ...]:
    """Presets by name."""
    return tuple(load_hardware(name) for name in names)


def rows_of(scope: Scope, hardware: Iterable[Hardware], **named: Any) -> list[dict[str, Any]]:
    """Rows of a grid, with a progress bar."""
    grid = Grid(
        tuple(hardware), scope.models, scope.prompts, scope.batches, batch_routing=scope.batch_routing, **named
    )  # fmt: skip
    with progress_bar("models x prompts", len(scope.models) * len(scope.prompts)) as bar:
        return run_grid(grid, lambda done, total: bar(done, total))


def study(name: str, run: Callable[[Scope], Section], usual: Scope | None = None) -> None:
    """The command line of a study: ``--quick``, ``--out``, and whose locality the routing has; ``--all`` where it usually
    covers less than everything."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, one prompt set, batch 1 and 8")
    parser.add_argument("--out", type=Path, default=FOLDER / f"{name}.json", help="section for `elmoe report`")
    parser.add_argument(
        "--locality", action="append", metavar="NAME", help="in place of the prompt sets; `model` is each model's own"
    )
    parser.add_argument("--batch-routing", choices=BATCH_ROUTINGS, default="fitted", help="how much sequences agree")
    if usual is not None:
        parser.add_argument("--all", action="store_true", help="all prompt sets and batch sizes")
    arguments = parser.parse_args()
    whole = usual is None or arguments.all
    scope = QUICK if arguments.quick else Scope() if whole else usual
    scope = replace(scope, batch_routing=arguments.batch_routing)
    section = run(replace(scope, prompts=tuple(arguments.locality)) if arguments.locality else scope)
    write_section(section, arguments.out)
    print(f"{section.title}\n{section.verdict}\nwrote {arguments.out}; `elmoe report {arguments.out}` makes a page")


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def select(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Rows with these values, those that did not fit left out."""
    return [row for row in rows if "error" not in row and all(row[key] == value for key, value in wanted.items())]
