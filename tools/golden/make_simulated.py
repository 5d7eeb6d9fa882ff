"""Freeze numbers of the simulator: ``python -m tools.golden.make_simulated`` writes ``tests/golden/simulated.json``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elmoe.schema.hardware import load_hardware, preset_names
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.modelling import BEFORE
from elmoe.sim.validation import box_checks, fused_moe_checks, preset_box_checks
from elmoe.systems.forms import FORMS, Odds

MODELS = ("qwen3-30b-a3b", "deepseek-v2-lite")
"""Grouped attention; latent attention, a dense layer and shared experts."""
CASES = (*MODELS, "measured systems")


def numbers(case: str) -> dict[str, float]:
    """Numbers of a case by what they are."""
    if case not in MODELS:
        checks = [*fused_moe_checks(), *box_checks(), *preset_box_checks()]
        return {f"{index} {check.name}": check.predicted for index, check in enumerate(checks)}
    grid = Grid(
        tuple(load_hardware(name) for name in preset_names()), (case,), ("gsm8k",), (1, 6), FORMS,
        (Odds("0.6", 0.6, "assumed"),), steps=6, modelling=BEFORE,
    )  # fmt: skip
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
