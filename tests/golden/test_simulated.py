"""Frozen numbers of the simulator: every hardware preset, form and kind of attention, and what it says of measured systems.

A change of a constant or of a formula shows here; whether it is right, the tests in tests/physics and the validation say.
It is made anew by ``python -m tools.golden.make_simulated``, in a commit that says why the numbers changed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tools.golden.make_simulated import CASES, numbers

FROZEN = json.loads((Path(__file__).parent / "simulated.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_simulated_numbers_are_those_of_before(case):
    assert numbers(case) == pytest.approx(FROZEN[case], rel=1e-9)


def test_every_case_is_frozen():
    assert list(FROZEN) == list(CASES) and all(FROZEN.values())
