"""Result files of simulations, and what tables and reports take from them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elmoe.errors import HardwareError
from elmoe.files import json_text, write_whole
from elmoe.schema.constants import Constant
from elmoe.schema.provenance import constants
from elmoe.sim.grid import Grid
from elmoe.sim.modelling import Modelling
from elmoe.sim.rows import check_row
from elmoe.systems.forms import Odds, TableOdds
from elmoe.trace.acceptance import load_acceptance
from elmoe.units import format_quantity
from elmoe.untrusted import load_object, read_bytes, short

RESULT_VERSION = 1
SIZE_LIMIT = 64 << 20
LABEL = "simulated"


def odds_of(text: str) -> Odds | TableOdds:
    """``0.6``, or the name or file of an acceptance table; HardwareError for a number that is no probability."""
    try:
        value = float(text)
    except ValueError:
        if "," in text:
            raise HardwareError(f"the acceptance '{short(text, 60)}' is several", "repeat --acceptance for each") from None
        return TableOdds(Path(text).stem, load_acceptance(text))
    if not 0 <= value < 1:
        raise HardwareError(f"the acceptance {short(text, 60)} is no probability below 1", "give for example 0.6, or `demo`")
    return Odds(f"{value:g}", value, "assumed")


@dataclass(frozen=True)
class SimulationResult:
    """Rows and what they were made from."""

    conditions: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def of(cls, grid: Grid, rows: list[dict[str, Any]], command: str = "", date: str = "") -> SimulationResult:
        """With the grid's conditions and every system's constants. ``command``: what the user typed; ``date``: when."""
        told = {name: text for name, text in (("command", command), ("date", date)) if text}
        return cls(
            told
            | {
                "systems": [hardware.name for hardware in grid.systems], "models": list(grid.models),
                "prompts": list(grid.prompts), "batches": list(grid.batches), "forms": list(grid.forms),
                "batch_routing": grid.batch_routing, "modelling": _modelling(grid.modelling),
                **({} if grid.trace is None else {"trace": str(grid.trace)}),
                "acceptances": [{"label": odds.label, "status": odds.status} for odds in grid.odds],
                "context": grid.context, "draft_lengths": list(grid.lengths or grid.modelling.lengths), "steps": grid.steps,
                "reference": grid.systems[0].name, **grid.setting.labels,
                "drafters": [
                    {"drafter": path, **_stated(item)} for path, item in constants(grid.drafters)
                ],
                "constants": [
                    {"system": hardware.name, "constant": path, **_stated(item)}
                    for hardware in grid.systems for path, item in constants(hardware)
                ],
            },
            rows,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For ``--json`` and files."""
        return {"version": RESULT_VERSION, "label": LABEL, "conditions": self.conditions, "rows": self.rows}


def _modelling(modelling: Modelling) -> dict[str, Any]:
    """As JSON gives it back."""
    trees = [asdict(tree) for tree in modelling.trees]
    return asdict(modelling) | {"lengths": list(modelling.lengths), "trees": trees}


def _stated(item: Constant) -> dict[str, str]:
    """A constant's value, range, status and source, as text."""
    value, low, high = (format_quantity(number, item.dimension) for number in (item.value, item.low, item.high))
    return {"value": value, "low": low, "high": high, "status": item.status, "source": item.source}


def write_result(result: SimulationResult, path: Path) -> None:
    """Write a result file; it appears when it is whole."""
    write_whole(path, json_text(result.as_dict()).encode())


def read_result(path: Path) -> SimulationResult:
    """Read a result file; HardwareError names what is wrong with it."""
    hint = "write one with `elmoe simulate --out`"
    data = load_object(read_bytes(path, HardwareError, SIZE_LIMIT, "result file", hint), str(path), HardwareError, hint)
    return result_of(data, str(path))


def result_of(data: dict[str, Any], where: str) -> SimulationResult:
    """A decoded result file; HardwareError names ``where``, the row and the key that is wrong."""
    hint = "write it anew with `elmoe simulate --out`"
    conditions, rows = data.get("conditions", {}), data.get("rows")
    if data.get("version") != RESULT_VERSION or not isinstance(rows, list) or not isinstance(conditions, dict):
        raise HardwareError(f"'{where}' is not a result file of version {RESULT_VERSION}", hint)
    for index, row in enumerate(rows):
        try:
            check_row(row)
        except ValueError as error:
            raise HardwareError(f"'{where}', row {index + 1}: {short(error)}", hint) from None
    return SimulationResult(conditions, rows)


Key = tuple[str, str, str | None]


def averaged(rows: list[dict[str, Any]]) -> dict[tuple[Key, int], tuple[float, float]]:
    """Mean over prompts of (tokens/s, speed-up) by ((system, form, acceptance), batch)."""
    groups: dict[tuple[Key, int], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if "error" not in row:
            groups[(row["system"], row["form"], row["acceptance"]), row["batch"]].append(row)
    return {
        key: tuple(sum(row[name] for row in group) / len(group) for name in ("tokens_per_second", "speedup"))
        for key, group in groups.items()
    }
