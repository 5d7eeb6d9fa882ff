"""What the studies share: arguments, the paper's models and systems, progress, and writing a section."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from elmoe.files import check_output
from elmoe.report.headline import setting_words
from elmoe.report.section import Section, labelled, write_section
from elmoe.schema.hardware import Hardware
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.paper import EXPERT_CACHES, MODELS, OWN_LOCALITY, PROMPTS, RIVAL_DRAFTS, RIVAL_SETS, SYSTEMS
from elmoe.sim.rivals import Setting
from elmoe.terminal import progress_bar
from elmoe.trace.batches import BATCH_ROUTINGS, BatchRouting

FOLDER = Path("build/experiments")


@dataclass(frozen=True)
class Scope:
    """What a study covers: everything, or with ``--quick`` one model, one prompt set and two batch sizes. ``setting``: the
    rivals, of the studies that compare with them."""

    models: tuple[str, ...] = MODELS
    prompts: tuple[str, ...] = (OWN_LOCALITY,)
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch_routing: BatchRouting = "fitted"
    setting: Setting = field(default_factory=Setting)


QUICK = Scope(("qwen3-30b-a3b",), batches=(1, 8))


def systems(scope: Scope, names: Iterable[str] = SYSTEMS) -> tuple[Hardware, ...]:
    """Presets by name, rivals among them as the scope has them."""
    return scope.setting.systems(names)


def rows_of(scope: Scope, hardware: Iterable[Hardware], **named: Any) -> list[dict[str, Any]]:
    """Rows of a grid with the scope's rivals' drafts, and a progress bar."""
    shared = {"setting": scope.setting, "drafters": scope.setting.drafters, "batch_routing": scope.batch_routing}
    grid = Grid(tuple(hardware), scope.models, scope.prompts, scope.batches, **(shared | named))
    with progress_bar("models x prompts", len(scope.models) * len(scope.prompts)) as bar:
        return run_grid(grid, lambda done, total: bar(done, total))


Option = Literal["locality", "batch-routing", "rivals"]
OPTIONS: tuple[Option, ...] = ("locality", "batch-routing", "rivals")


def study(
    name: str, run: Callable[[Scope], Section], usual: Scope | None = None, labels: bool = False,
    options: Collection[Option] = OPTIONS,
) -> None:  # fmt: skip
    """The command line of a study: ``--quick`` and ``--out``; of ``options`` those that its numbers depend on: whose
    locality the routing has, how much the sequences of a batch agree, and the rivals that it compares with; ``--all`` where
    it usually covers less than everything. ``labels``: its tables name their rivals themselves."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--quick", action="store_true", help="one model, batch 1 and 8")
    parser.add_argument("--out", type=Path, default=FOLDER / f"{name}.json", help="section for `elmoe report`")
    scope = _options(parser, options, usual)
    arguments = parser.parse_args()
    check_output(arguments.out, force=True, what="section", folders=True)
    chosen = scope(arguments)
    section = run(chosen)
    if "rivals" in options and not labels:
        section = labelled(section, f"rivals: {setting_words(chosen.setting.labels)}")
    write_section(section, arguments.out)
    print(f"{section.title}\n{section.verdict}\nwrote {arguments.out}; `elmoe report {arguments.out}` makes a page")


def _options(
    parser: argparse.ArgumentParser, options: Collection[Option], usual: Scope | None
) -> Callable[[argparse.Namespace], Scope]:
    """Add the options of a study; what it covers, by the arguments."""
    if "locality" in options:
        parser.add_argument(
            "--locality", action="append", metavar="NAME",
            help="in place of each model's own: a prompt set, `prompts` for all four, a model, or a file",
        )  # fmt: skip
    if "batch-routing" in options:
        parser.add_argument("--batch-routing", choices=BATCH_ROUTINGS, default="fitted", help="how much sequences agree")
    if "rivals" in options:
        parser.add_argument("--rivals", choices=RIVAL_SETS, default="generous", help="how prior systems are described")
        parser.add_argument("--expert-cache", choices=EXPERT_CACHES, help="whole experts in their fast memory")
        parser.add_argument("--rival-drafts", choices=RIVAL_DRAFTS, default="all", help="what they draft with")
    if usual is not None:
        parser.add_argument("--all", action="store_true", help="all batch sizes")

    def scope(arguments: argparse.Namespace) -> Scope:
        found = QUICK if arguments.quick else Scope() if usual is None or arguments.all else usual
        if "locality" in options and arguments.locality:
            names = (PROMPTS if name == "prompts" else (name,) for name in arguments.locality)
            found = replace(found, prompts=tuple(one for each in names for one in each))
        if "batch-routing" in options:
            found = replace(found, batch_routing=arguments.batch_routing)
        if "rivals" in options:
            setting = Setting(arguments.rivals, arguments.expert_cache, arguments.rival_drafts)
            found = replace(found, setting=setting)
        return found

    return scope


def mean(values: Iterable[float]) -> float:
    """Arithmetic mean."""
    values = list(values)
    return sum(values) / len(values)


def select(rows: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    """Rows with these values, those that did not fit left out."""
    return [row for row in rows if "error" not in row and all(row[key] == value for key, value in wanted.items())]
