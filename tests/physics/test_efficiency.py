"""The closed form of refresh against Ramulator 2.1's streaming reads."""

from __future__ import annotations

import msgspec
import pytest

from elmoe.hw.efficiency import efficiency_of, efficiency_of_refresh, streaming_bandwidth
from elmoe.schema.constants import Ratio, Seconds
from elmoe.schema.hardware import Memory, Refresh, load_hardware, preset_names
from elmoe.schema.validation import load_validation

# Nanoseconds: tREFI, tRFCab, and tRTP, tRP, tRCD as clocks times the clock period, from Ramulator 2.1's own presets
# (python/ramulator/dram/*.py at c5b1c3a478b6).
TIMINGS = {
    "LPDDR5-6400 x16": (3906, 210, (8 + 17 + 15) * 1.25),  # LPDDR5_8Gb_x16, LPDDR5_6400 (nRPab)
    "DDR5": (3900, 295, (18 + 34 + 34) * 0.416),  # DDR5_16Gb_x8, DDR5_4800AN (which rate ran is not recorded)
    "HBM3-6400": (3900, 350, (9 + 26 + 31) * 0.625),  # HBM3_16Gb_8hi: 8 Gb a channel
    "GDDR7": (1900, 315 * 0.571, (4 + 30 + 30) * 0.571),  # GDDR7_28000_PAM3
}


def seconds(nanoseconds: float) -> Seconds:
    return Seconds(nanoseconds * 1e-9, "here", "derived")


def refresh(interval: float, duration: float, reopen: float) -> Refresh:
    return Refresh(interval=seconds(interval), duration=seconds(duration), reopen=seconds(reopen))


@pytest.mark.parametrize("kind", TIMINGS)
def test_within_two_points_of_ramulator(kind):
    measured = {row.memory: row.efficiency for row in load_validation("ramulator").rows}[kind]
    assert efficiency_of_refresh(refresh(*TIMINGS[kind])) == pytest.approx(measured, abs=0.02)


def test_the_timings_of_the_other_density_are_as_near():
    """Which density of HBM3 ran is not recorded: 4 Gb a channel (tRFC 260 ns) is off by as much to the other side."""
    assert efficiency_of_refresh(refresh(3900, 260, 66 * 0.625)) == pytest.approx(0.912, abs=0.02)


def test_closed_form():
    assert efficiency_of_refresh(refresh(1000, 150, 50)) == pytest.approx(0.8)


def test_stated_efficiency_and_none():
    memory = load_hardware("elmoe3d_8gb").fast
    assert memory is not None
    assert efficiency_of(memory) == pytest.approx(0.97)
    assert streaming_bandwidth(memory) == pytest.approx(0.97 * 1638.4e9)
    assert efficiency_of(msgspec.structs.replace(memory, efficiency=None)) == 1.0
    half = msgspec.structs.replace(memory, efficiency=Ratio(0.5, "here", "assumed"))
    assert efficiency_of(half) == 0.5


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_streams_most_of_its_peak(name):
    hardware = load_hardware(name)
    memories: list[Memory] = [memory for memory in (hardware.main, hardware.fast) if memory is not None]
    assert all(0.8 < efficiency_of(memory) < 1 for memory in memories)


def test_more_refresh_is_never_faster():
    shares = [efficiency_of_refresh(refresh(3900, duration, 40)) for duration in (130, 180, 210, 280, 380)]
    assert shares == sorted(shares, reverse=True)
