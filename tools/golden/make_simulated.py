"""Freeze numbers of the simulator: ``python -m tools.golden.make_simulated`` writes ``tests/golden/simulated.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from elmoe.schema.hardware import load_hardware, preset_names
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.modelling import BEFORE, TODAY, TREES
from elmoe.sim.paper import OWN_LOCALITY
from elmoe.sim.rival_checks import rival_checks
from elmoe.sim.rivals import Setting
from elmoe.sim.validation import box_checks, fused_moe_checks, preset_box_checks
from elmoe.systems.forms import FORMS, Odds

MODELS = ("qwen3-30b-a3b", "deepseek-v2-lite")
"""Grouped attention; latent attention, a dense layer and shared experts."""
TODAY_MODELS = {f"{name}, today": name for name in ("qwen3-30b-a3b", "gpt-oss-20b")}
"""Split by rate, reads ahead, trees and the planner, against published rivals; windows and experts of one slice."""
CASES = (*MODELS, *TODAY_MODELS, "measured systems", "rivals' own sources")


def numbers(case: str) -> dict[str, float]:
    """Numbers of a case by what they are."""
    if case in TODAY_MODELS:
        return _of_rows(_today(TODAY_MODELS[case]))
    if case not in MODELS:
        measured = [*fused_moe_checks(), *box_checks(), *preset_box_checks()]
        checks = rival_checks() if case == "rivals' own sources" else measured
        return {f"{index} {check.name}": check.predicted for index, check in enumerate(checks)}
    grid = Grid(
        tuple(load_hardware(name) for name in preset_names()), (case,), ("gsm8k",), (1, 6), FORMS,
        (Odds("0.6", 0.6, "assumed"),), steps=6, modelling=BEFORE,
    )  # fmt: skip
    return _of_rows(grid)


def _today(model: str) -> Grid:
    setting = Setting("published", "lru")
    return Grid(
        setting.systems(("xpu", "xpu_pim", "xpu_logicpim", "xpu_nmp", "hb_xpu", "elmoe3d_8gb")), (model,), (OWN_LOCALITY,),
        (1, 6), ("ar", "eagle", "small_lm", "elastic", "planned"), (Odds("0.8", 0.8, "assumed"),), steps=6,
        drafters=setting.drafters, setting=setting, modelling=replace(TODAY, lengths=(1, 3), trees=TREES),
    )  # fmt: skip


def _of_rows(grid: Grid) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in run_grid(grid, workers=1):
        name = f"{row['system']} {row['form']} {row['batch']}"
        found |= {f"{name} {key}": value for key, value in _numbers(row, "")}
    return found


def _numbers(data: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(data, dict):
        for key, value in data.items():
            if key not in ("low", "middle"):
                yield from _numbers(value, f"{path}.{key}" if path else key)
    elif isinstance(data, int | float) and not isinstance(data, bool):
        yield path, float(f"{data:.12g}")


def main() -> None:
    """Write the file."""
    path = Path(__file__).resolve().parents[2] / "tests" / "golden" / "simulated.json"
    path.write_text(json.dumps({case: numbers(case) for case in CASES}, separators=(",\n", ":")) + "\n")


if __name__ == "__main__":
    main()
