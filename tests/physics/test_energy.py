"""Joules in closed form: every component of a machine, and what systems add up from them.

The constants are those of ``machines.py``: main memory 4 pJ/bit, fast memory 0.4 pJ/bit, a multiply-accumulate 0.1 pJ, SRAM
0.5 pJ/B, links 0.1 pJ/bit, an elementwise operation 1 pJ. A wrong factor at any of them fails here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest

from elmoe.hw.cost import Cost
from elmoe.hw.machine import Machine, Multiply
from elmoe.schema.constants import Bandwidth, EnergyPerBit, EnergyPerOperation, OperationsPerByte, Ratio, Throughput
from elmoe.schema.drafters import load_drafters
from elmoe.schema.hardware import Features, Hardware, NearMemory, Processor, load_hardware
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.rows import row_of, static_watts
from elmoe.sim.simulate import Simulation
from elmoe.sim.workload import RoutingReplay
from elmoe.systems import elmoe3d, near_memory, xpu
from elmoe.systems.operations import Operation
from tests.physics.machines import EVERYTHING, MODEL, NOTHING, facts, hardware, known

MAIN, FAST, NEAR, LINKS = 4e-12, 0.4e-12, 0.7e-12, 0.1e-12
MAC, SRAM, VECTOR = 0.1e-12, 0.5e-12, 1e-12
ROWS, COLUMNS, TOKENS, BLOCKS = 96, 64, 6.0, 2.0
WORK = Multiply(ROWS, COLUMNS, np.array([TOKENS]), np.array([BLOCKS]), 2.0)
MACS = TOKENS * ROWS * COLUMNS
SRAM_BYTES = BLOCKS * ROWS * COLUMNS + TOKENS * (COLUMNS + 4 * ROWS)


def near(placement: str = "main", **changes: Any) -> NearMemory:
    base = NearMemory(
        placement=placement, bandwidth=known(Bandwidth, 400e9), intensity=known(OperationsPerByte, 2.0),
        energy=known(EnergyPerBit, NEAR),
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


def operation(
    dense: float = 0.0, msb: float = 0.0, lsb: float = 0.0, msb_hit: float = 0.0, lsb_hit: float = 0.0
) -> Operation:
    one = np.ones(1)
    return Operation(
        "test", one * dense, one * msb, one * lsb, one * msb_hit, one * lsb_hit, (WORK,), one * 50, one * 24
    )  # fmt: skip


def joules(cost: Cost) -> dict[str, float]:
    return {name: float(values.sum()) for name, values in cost.energy.items() if values.sum()}


def close(cost: Cost, **expected: float) -> None:
    found = {name.replace(" ", "_").replace("-", "_"): value for name, value in joules(cost).items()}
    assert found == pytest.approx(expected, rel=1e-12)


def test_memories():
    machine, count = Machine(hardware(EVERYTHING, fast=True)), np.array([1000.0])
    close(machine.read_main(count), main_memory=1000 * 8 * MAIN)
    close(machine.read_fast(count), fast_memory=1000 * 8 * FAST)
    close(machine.write_fast(count), fast_memory=1000 * 8 * FAST)


def test_products_on_the_array_take_half_for_half_of_the_bits():
    for passes in (2.0, 1.0, 4.0):
        cost = Machine(hardware()).multiply(replace(WORK, weight_passes=passes))
        weights = BLOCKS * ROWS * COLUMNS * passes / 2 + TOKENS * (COLUMNS + 4 * ROWS)
        close(cost, multiply=MACS * MAC * passes / 2, sram=weights * SRAM)


def test_products_on_a_processor():
    processor = Processor(throughput=known(Throughput, 1e12), mac_energy=known(EnergyPerOperation, 0.3e-12))
    close(Machine(hardware(compute=processor)).multiply(WORK), multiply=MACS * 0.3e-12, sram=SRAM_BYTES * SRAM)


def test_elementwise_work_and_links():
    machine = Machine(hardware())
    close(machine.elementwise(np.array([70.0])), vector=70 * VECTOR)
    close(machine.exchange(np.array([70.0])), links=70 * 8 * LINKS)


@pytest.mark.parametrize(("placement", "name"), [("main", "main_memory"), ("fast", "fast_memory")])
def test_products_beside_a_memory(placement, name):
    count = np.array([3000.0])
    machine = Machine(hardware(EVERYTHING, fast=True, near=near(placement)))
    close(machine.near(count, WORK), **{name: 3000 * 8 * NEAR, "multiply": MACS * MAC})
    own = near(placement, mac_energy=known(EnergyPerOperation, 0.9e-12), narrow="twice")
    machine = Machine(hardware(EVERYTHING, fast=True, near=own))
    close(machine.near(count, WORK), **{name: 3000 * 8 * NEAR, "multiply": MACS * 0.9e-12})
    half = machine.near(count, replace(WORK, weight_passes=1.0))
    close(half, **{name: 3000 * 8 * NEAR, "multiply": MACS * 0.9e-12 / 2})
    fp16 = machine.near(count, replace(WORK, weight_passes=4.0))
    close(fp16, **{name: 3000 * 8 * NEAR, "multiply": MACS * 0.9e-12})


@pytest.mark.parametrize(("placement", "energy"), [("main", MAIN), ("fast", FAST)])
def test_inputs_and_results_of_near_memory_compute_cross_the_interface_once(placement, energy):
    machine = Machine(hardware(EVERYTHING, fast=True, near=near(placement, interface=known(Bandwidth, 20e9))))
    cost, count = machine.hand_over(WORK), TOKENS * (COLUMNS + 4 * ROWS)
    close(cost, hand_over=count * 8 * energy)
    assert cost.latency.tolist() == [count / 20e9]
    free = Machine(hardware(EVERYTHING, fast=True, near=near(placement))).hand_over(WORK)
    assert not free.energy and free.latency.tolist() == [0.0]


def test_the_bare_processor_reads_multiplies_and_works_on_elements():
    cost = xpu.lower(Machine(hardware()), operation(dense=100, msb=30, lsb=20))
    close(cost, main_memory=150 * 8 * MAIN, multiply=MACS * MAC, sram=SRAM_BYTES * SRAM, vector=50 * VECTOR)


def test_two_memories_share_the_bytes_and_exchange_partial_sums():
    machine = Machine(hardware(EVERYTHING, fast=True))
    cost = elmoe3d.lower(machine, operation(dense=100, msb=30, lsb=20, msb_hit=12, lsb_hit=5))
    close(cost, fast_memory=117 * 8 * FAST, main_memory=33 * 8 * MAIN, multiply=MACS * MAC, sram=SRAM_BYTES * SRAM,
          vector=50 * VECTOR, links=24 * 8 * LINKS)  # fmt: skip
    alone = elmoe3d.lower(machine, operation(dense=100))  # nothing to exchange where one memory has it all
    assert "links" not in joules(alone)
    close(elmoe3d.refill(machine, np.array([40.0])), fast_memory=40 * 8 * FAST)


def fast_near(**changes: Any) -> Machine:
    """Near-memory compute so fast that it is always chosen."""
    place = near(changes.pop("placement", "main"), bandwidth=known(Bandwidth, 1e18), **changes)
    features = Features(fast_dense=True, expert_cache=True) if place.placement == "fast" else NOTHING
    return Machine(hardware(features, fast=place.placement == "fast", near=place))


def test_all_beside_the_main_memory():
    cost = near_memory.lower(fast_near(), operation(dense=100, msb=30, lsb=20))
    close(cost, main_memory=150 * 8 * NEAR, multiply=MACS * MAC, vector=50 * VECTOR)


def test_resident_shares_beside_the_fast_memory_and_the_rest_on_the_processor():
    cost = near_memory.lower(fast_near(placement="fast"), operation(msb=60, lsb=40, msb_hit=30, lsb_hit=20))
    close(cost, fast_memory=50 * 8 * NEAR, main_memory=50 * 8 * MAIN, multiply=MACS * MAC, sram=SRAM_BYTES / 2 * SRAM,
          vector=50 * VECTOR)  # fmt: skip


def test_dense_layers_on_the_processor_and_scores_and_experts_beside_the_memory():
    machine = fast_near(dense="processor")
    close(near_memory.lower(machine, operation(dense=150)), main_memory=150 * 8 * MAIN, multiply=MACS * MAC,
          sram=SRAM_BYTES * SRAM, vector=50 * VECTOR)  # fmt: skip
    close(near_memory.lower(machine, operation(msb=150)), main_memory=150 * 8 * NEAR, multiply=MACS * MAC,
          vector=50 * VECTOR)  # fmt: skip
    attention = replace(operation(dense=150), multiplies=(WORK, WORK), cached=np.array([40.0]))
    close(near_memory.lower(machine, attention), main_memory=110 * 8 * MAIN + 40 * 8 * NEAR, multiply=2 * MACS * MAC,
          sram=SRAM_BYTES * SRAM, vector=50 * VECTOR)  # fmt: skip


def test_experts_on_both_places_take_the_joules_of_their_shares_and_end_together():
    place = near(experts="both")
    machine = Machine(hardware(near=place))
    work = operation(msb=6e4)
    far = xpu.lower(machine, work)
    alone = near_memory.lower(Machine(hardware(near=near(bandwidth=known(Bandwidth, 400e9), dense="processor"))), work)
    seconds_near = max(6e4 / 400e9, 2 * MACS / 800e9) + 50 / 1e12
    seconds_far = float(far.latency.sum())
    share = seconds_far / (seconds_near + seconds_far)
    cost = near_memory.lower(machine, work)
    assert float(cost.latency.sum()) == pytest.approx(seconds_near * share, rel=1e-12)
    assert float(cost.latency.sum()) < float(alone.latency.sum())
    close(cost, main_memory=6e4 * 8 * (NEAR * share + MAIN * (1 - share)), multiply=MACS * MAC,
          sram=SRAM_BYTES * SRAM * (1 - share), vector=50 * VECTOR)  # fmt: skip


def test_hand_over_is_counted_for_weights_and_not_for_keys_and_values():
    machine = fast_near(interface=known(Bandwidth, 1e18))
    attention = replace(operation(dense=150), multiplies=(WORK, WORK), cached=np.array([40.0]))
    once = TOKENS * (COLUMNS + 4 * ROWS) * 8 * MAIN
    close(near_memory.lower(machine, attention), main_memory=150 * 8 * NEAR, multiply=2 * MACS * MAC, vector=50 * VECTOR,
          hand_over=once)  # fmt: skip


def test_efficiency_slows_reads_and_units_and_saves_nothing():
    count = np.array([3000.0])
    full, half = (Machine(hardware(near=near(efficiency=known(Ratio, share)))) for share in (1.0, 0.5))
    assert joules(full.near(count, WORK)) == joules(half.near(count, WORK))
    np.testing.assert_allclose(half.near(count, WORK).latency, 2 * full.near(count, WORK).latency, rtol=1e-12)
    np.testing.assert_allclose(half.near(count * 100, WORK).latency, 3e5 / 200e9, rtol=1e-12)


SIMULATION = Simulation(MODEL, RoutingReplay(facts()), load_drafters(), context=64, steps=16)


def test_a_run_of_plain_decoding_takes_the_joules_of_its_bytes_products_and_elements():
    """One sequence of the tiny model: four layers of attention, router and 4 of 32 experts, and the head."""
    run = SIMULATION.price(Machine(hardware()), "ar", 1)
    layer, spec = MODEL.layers[0], MODEL.spec
    dense = layer.attention_parameters + layer.router_parameters
    weights = 4 * (dense + 4 * layer.expert_parameters) + MODEL.embedding_parameters
    kv = 64 * spec.kv_bytes_per_position
    row = MODEL.embedding_bytes / spec.vocabulary
    bytes_ = 4 * layer.bytes + MODEL.head_bytes + 16 * layer.expert_bytes + kv + row
    scores = 4 * 64 * layer.attention_width
    found = {name: value / run.tokens for name, value in joules(run.whole).items()}
    assert found["main memory"] == pytest.approx(bytes_ * 8 * MAIN, rel=1e-12)
    assert found["multiply"] == pytest.approx((weights + 2 * scores) * MAC, rel=1e-12)
    attention = (2 * 512 + 64 * layer.attention_width / 128) * 10
    elements = 4 * (attention + 512 * 10 + 4 * (256 + 512) * 10) + 512 * 10
    assert found["vector"] == pytest.approx(elements * VECTOR, rel=1e-12)
    assert set(found) == {"main memory", "multiply", "vector", "sram"}


def test_static_power_is_a_share_of_the_reference_and_the_same_watts_everywhere():
    reference = SIMULATION.price(Machine(hardware()), "ar", 4)
    watts = static_watts(reference, 0.05, 0.2, 0.5)
    dynamic = float(reference.whole.joules.sum())
    assert watts["middle"] * reference.seconds == pytest.approx(0.25 * dynamic, rel=1e-12)
    machine = Machine(hardware(EVERYTHING, fast=True))
    priced = SIMULATION.price(machine, "ar", 4)
    row = row_of(priced, machine, {"batch": 4}, watts)
    expected = (float(priced.whole.joules.sum()) + watts["high"] * priced.seconds) / priced.tokens
    assert row["joules_per_token"]["high"] == pytest.approx(expected, rel=1e-12)


def test_the_order_of_systems_moves_no_joule():
    """The static power of all is that of the plain xPU, wherever it stands."""
    pair = [load_hardware(name) for name in ("xpu", "elmoe3d_8gb")]
    grids = [Grid(tuple(systems), ("olmoe-1b-7b",), ("gsm8k",), (1,), ("ar",), steps=2) for systems in (pair, pair[::-1])]
    first, second = ({row["system"]: row["joules_per_token"] for row in run_grid(grid, workers=1)} for grid in grids)
    assert first == second and len(first) == 2


def changed(name: str) -> Hardware:
    """The test machine with one energy doubled."""
    base = hardware(EVERYTHING, fast=True)
    part = getattr(base, name)
    key = "mac_energy" if name == "compute" else "energy"
    return msgspec.structs.replace(base, **{name: msgspec.structs.replace(part, **{key: getattr(part, key).at(
        2 * getattr(part, key).value)})})  # fmt: skip


@pytest.mark.parametrize("name", ["main", "fast", "compute", "sram", "links", "vector"])
def test_a_doubled_constant_doubles_its_component_and_nothing_else(name):
    component = {"main": "main memory", "fast": "fast memory", "compute": "multiply"}.get(name, name)
    base = SIMULATION.price(Machine(hardware(EVERYTHING, fast=True)), "ar", 4)
    twice = SIMULATION.price(Machine(changed(name)), "ar", 4)
    before, after = joules(base.whole), joules(twice.whole)
    assert after.pop(component) == pytest.approx(2 * before.pop(component), rel=1e-12)
    assert after == before and base.seconds == twice.seconds
