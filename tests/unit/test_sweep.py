"""Constants of described hardware that are changed one at a time."""

from __future__ import annotations

import pytest

from elmoe.errors import HardwareError
from elmoe.schema.hardware import load_hardware
from elmoe.sim.sweep import changed, constants, ranged

HARDWARE = load_hardware("elmoe3d_8gb")


def test_a_change_is_of_one_constant():
    before = {one.path: one.constant for one in constants(HARDWARE)}
    assert {"main.bandwidth", "fast.energy", "compute.mac_energy"} <= before.keys()
    for path, constant in before.items():
        value = 0.9 * constant.value
        after = {one.path: one.constant for one in constants(changed(HARDWARE, path, value))}
        assert after == before | {path: constant.at(value)} and after[path].value == value
        assert (after[path].low, after[path].source) == (constant.low, constant.source)


def test_a_range_is_what_sources_disagree_about():
    found = ranged(HARDWARE)
    assert found and all(one.constant.low < one.constant.high for one in found)
    rest = {one.path for one in constants(HARDWARE)} - {one.path for one in found}
    pinned = {one.path: one.constant for one in constants(HARDWARE)}
    assert rest and all(pinned[path].low == pinned[path].high for path in rest)


@pytest.mark.parametrize("path", ["", "main", "main.colour", "main.bandwidth.value", "colour.bandwidth", "name"])
def test_a_path_to_no_constant_is_refused_by_name(path):
    with pytest.raises(HardwareError, match=rf"'{path}' is no constant") as error:
        changed(HARDWARE, path, 1.0)
    assert error.value.hint


def test_hardware_that_cannot_be_is_refused_by_the_name_of_its_constant():
    with pytest.raises(HardwareError, match=r"'main.refresh.duration' cannot be 1: refresh never ends"):
        changed(HARDWARE, "main.refresh.duration", 1.0)
