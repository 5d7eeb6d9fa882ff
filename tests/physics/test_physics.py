"""The simulator obeys what must hold whatever the constants: closed forms, conservation, monotonicity, identities."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from elmoe.errors import BudgetError, HardwareError
from elmoe.hw.machine import Machine
from elmoe.models.sizes import ModelSizes
from elmoe.models.spec import Dense, LayerSpec
from elmoe.schema.constants import Bandwidth, Capacity
from elmoe.schema.drafters import load_drafters
from elmoe.schema.hardware import Features, Hardware
from elmoe.sim.modelling import BEFORE, TODAY
from elmoe.sim.simulate import Priced, Simulation
from elmoe.sim.workload import RoutingReplay
from elmoe.systems.forms import Odds, cost_of
from elmoe.systems.operations import operations, resample
from elmoe.systems.xpu import lower
from tests.physics.machines import EVERYTHING, MODEL, NOTHING, facts, hardware, known, memory

ROW = 512 * 8.5 / 8
"""Bytes of a row of the embedding table."""
SIMULATION = Simulation(MODEL, RoutingReplay(facts()), load_drafters(), context=64, steps=16)


def price(machine: Hardware, form: str = "ar", batch: int = 4, acceptance: float = 0.8, **named: object) -> Priced:
    odds = None if form == "ar" else Odds(f"{acceptance}", acceptance, "assumed")
    return SIMULATION.price(Machine(machine), form, batch, odds, **named)


def test_plain_decoding_of_one_sequence_is_active_bytes_over_bandwidth():
    """Memory-bound on the bare processor: closed form in bytes."""
    slow = hardware(main=memory(1e9, 64e9, 4e-12))
    run = price(slow, batch=1)
    layer = MODEL.layers[0]
    weights = 4 * layer.bytes + MODEL.head_bytes + 4 * 4 * layer.expert_bytes + ROW
    expected = (weights + 64 * MODEL.spec.kv_bytes_per_position) / 1e9
    assert run.seconds / run.tokens == pytest.approx(expected, rel=1e-12)


def test_compute_bound_operation_is_clocks_over_elements():
    fast = Machine(hardware(main=memory(1e15, 64e9, 4e-12)))
    workload = SIMULATION.replay.run(plan_of(batch=16))
    experts = next(op for op in operations(MODEL, workload.target, fast) if op.name == "experts")
    cost = lower(fast, experts)
    tiles = (512 // 32) * (512 // 32) + (512 // 32) * (256 // 32)
    clocks = workload.target.blocks * tiles * 2 / 32
    vector = workload.target.pairs * (256 + 512) * 10 / 1e12
    np.testing.assert_allclose(cost.latency, clocks / 1e9 + vector, rtol=1e-12)


def plan_of(batch: int):
    from elmoe.sim.workload import Plan

    return Plan(batch, context=64, steps=16)


@pytest.mark.parametrize("form", ["ar", "eagle", "small_lm", "quant"])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_all_features_off_equals_the_bare_processor_to_the_last_bit(form, batch):
    bare, off = price(hardware(), form, batch), price(hardware(NOTHING, fast=True), form, batch)
    assert np.array_equal(bare.whole.latency, off.whole.latency)
    assert np.array_equal(bare.whole.joules, off.whole.joules)


def test_bytes_are_conserved_between_the_memories():
    """Whatever the features, a target pass streams the same bytes in all."""
    for features in (NOTHING, EVERYTHING, Features(fast_dense=True), Features(expert_cache=True)):
        run = price(hardware(features, fast=True), batch=8)
        bare = price(hardware(), batch=8)
        read = run.target.traffic["main"] + run.target.traffic["fast"]
        np.testing.assert_allclose(read, bare.target.traffic["main"], rtol=1e-12)


def test_layers_that_differ_cost_what_each_of_them_costs_alone():
    """Two kinds of attention, a dense layer and one without shared experts: bytes of the whole are the sum of the parts."""
    plain = MODEL.spec.layers[0]
    wide = msgspec.structs.replace(plain.attention, heads=16)
    shared = msgspec.structs.replace(plain.feed_forward, shared_width=128)
    kinds = (
        plain,
        LayerSpec(attention=wide, feed_forward=plain.feed_forward),
        LayerSpec(attention=plain.attention, feed_forward=shared),
        LayerSpec(attention=wide, feed_forward=Dense(width=640)),
    )
    machine, passes = Machine(hardware()), SIMULATION.replay.run(plan_of(batch=4)).target

    def model(*layers: LayerSpec) -> ModelSizes:
        return msgspec.structs.replace(MODEL, spec=msgspec.structs.replace(MODEL.spec, layers=layers))

    def seconds(model: ModelSizes) -> np.ndarray:
        return cost_of(machine, [op for op in operations(model, passes, machine) if op.name != "head"]).latency

    mixed = (kinds[0], kinds[3], kinds[1], kinds[2], kinds[0], kinds[3])
    whole = operations(model(*mixed), passes, machine)
    assert sum(op.repeat for op in whole if op.starts_layer) == len(mixed)
    fixed = sum(op.dense * op.repeat for op in whole if op.name != "experts")
    sizes = model(*mixed)
    cached = passes.cached * sizes.spec.kv_bytes_per_position
    np.testing.assert_allclose(fixed, sum(one.bytes for one in sizes.layers) + sizes.head_bytes + cached, rtol=1e-12)
    np.testing.assert_allclose(seconds(model(*mixed)), sum(seconds(model(one)) for one in mixed), rtol=1e-12)


@pytest.mark.parametrize("form", ["ar", "eagle", "quant", "elastic"])
def test_joules_sum_to_their_parts_and_no_resource_works_over_time(form):
    run = price(hardware(EVERYTHING, fast=True), form)
    whole = run.whole
    np.testing.assert_allclose(sum(whole.energy.values()), whole.joules, rtol=1e-12)
    for name, busy in whole.busy.items():
        assert (busy <= whole.latency * (1 + 1e-12)).all(), name
    assert all((values >= 0).all() for values in whole.energy.values())


@pytest.mark.parametrize("form", ["ar", "elastic"])
def test_more_bandwidth_is_never_slower(form):
    for tier in ("main", "fast"):
        rates = []
        for bandwidth in (50e9, 100e9, 400e9, 3200e9):
            machine = hardware(EVERYTHING, fast=True)
            changed = msgspec.structs.replace(getattr(machine, tier), bandwidth=known(Bandwidth, bandwidth))
            run = price(msgspec.structs.replace(machine, **{tier: changed}), form)
            rates.append(run.tokens / run.seconds)
        assert rates == sorted(rates)


def test_more_capacity_is_never_slower_in_plain_decoding_and_hits_grow():
    seconds, hits = [], []
    for capacity in (16e6, 24e6, 48e6, 1e9):
        machine = hardware(EVERYTHING, fast=True)
        machine = msgspec.structs.replace(
            machine, fast=msgspec.structs.replace(machine.fast, capacity=known(Capacity, capacity))
        )
        run = price(machine)
        seconds.append(run.seconds / run.tokens)
        hits.append(run.workload.msb_hit_rate)
    assert seconds == sorted(seconds, reverse=True)
    assert hits == sorted(hits) and hits[-1] > 0.98  # what the prompts never used was not there at first


def test_higher_acceptance_is_never_slower():
    rates = []
    for acceptance in (0.1, 0.33, 0.6, 0.91):
        run = price(hardware(EVERYTHING, fast=True), "elastic", 8, acceptance)
        rates.append(run.tokens / run.seconds)
    assert rates == sorted(rates)


def test_acceptance_asked_for_is_the_acceptance_that_happens():
    run = price(hardware(EVERYTHING, fast=True), "elastic", 16, 0.7, lengths=(4,))
    assert run.workload.accepted / run.workload.judged == pytest.approx(0.7, abs=0.05)


def test_drafts_read_no_weights_from_the_main_memory():
    """Nothing at all, or the embedding rows of their tokens."""
    for modelling, row in ((replace(TODAY, read_ahead=False), ROW), (BEFORE, 0)):
        simulation = Simulation(MODEL, RoutingReplay(facts()), load_drafters(), 64, 16, modelling)
        run = simulation.price(Machine(hardware(EVERYTHING, fast=True)), "elastic", 4, Odds("0.8", 0.8, "assumed"))
        drafted = 4 * run.workload.draft_passes * run.workload.steps
        assert run.draft.traffic["main"].sum() == drafted * row and run.draft.traffic["fast"].sum() > 0


def test_a_model_that_does_not_fit_is_refused_by_name():
    small = hardware(main=memory(1e9, 1e6, 4e-12))
    with pytest.raises(HardwareError, match=r"'tiny' needs .* 'test' has"):
        price(small)
    with pytest.raises(BudgetError):
        price(tiny_fast())


def tiny_fast() -> Hardware:
    machine = hardware(EVERYTHING, fast=True)
    return msgspec.structs.replace(machine, fast=memory(1600e9, 1e6, 0.4e-12))


def test_bytes_of_a_mixed_model_are_those_of_its_tensors():
    """Half of the layers with 4-bit experts of one slice, queries in 4 + 2 bits, a head of MXFP4: a closed form, in plain
    decoding and in a draft of MSB slices."""
    formats = {"layers.0.experts": "table4_mx", "layers.2.experts": "affine4_k+affine4_k+planes6", "head": "table4_mx",
               "layers.1.query_key_value": "planes6"}  # fmt: skip
    mixed = msgspec.structs.replace(MODEL, formats=formats)
    slow = hardware(main=memory(1e9, 64e9, 4e-12))
    run = Simulation(mixed, RoutingReplay(facts()), load_drafters(), context=64, steps=16).price(Machine(slow), "ar", 1)
    layer, weights = MODEL.layers[0], MODEL.layers[0].expert_parameters
    attention = MODEL.spec.layers[1].attention
    queries = MODEL.spec.hidden * (attention.query_width + 2 * attention.kv_width)
    fixed = 4 * layer.bytes - queries * (8.5 - 6.5625) / 8 + MODEL.embedding_parameters * 4.25 / 8
    bits = 4.25 + 8.5 + (2 * 4.625 + 6.5625) / 3 + 8.5
    expected = fixed + 4 * weights * bits / 8 + ROW + 64 * MODEL.spec.kv_bytes_per_position
    assert run.seconds / run.tokens * 1e9 == pytest.approx(expected, rel=1e-12)
    passes = SIMULATION.replay.run(plan_of(batch=1)).target
    draft = next(op for op in operations(mixed, passes, Machine(slow), draft=True) if op.name == "experts")
    msb = [4.25, 4.5, (2 * 4.625 + 4.5625) / 3, 4.5]
    np.testing.assert_allclose(draft.msb[0] / passes.active[0], [weights * each / 8 for each in msb], rtol=1e-12)
    assert draft.multiplies[0].weight_passes.tolist() == [1, 1, 1, 1] and not draft.lsb.any()
    full = next(op for op in operations(mixed, passes, Machine(slow)) if op.name == "experts")
    np.testing.assert_allclose(full.multiplies[0].weight_passes, [1, 2, 4 / 3, 2])


def test_a_few_layers_stand_for_stretches_of_many():
    assert resample([1, 2, 3, 4], 2).tolist() == [1.5, 3.5] and resample([5] * 7, 3).tolist() == [5, 5, 5]
    stretched = resample([1.0, 1, 1, 4, 4], 2)
    np.testing.assert_allclose(stretched, [(1 + 1 + 0.5) / 2.5, (0.5 + 8) / 2.5])
    assert stretched.sum() * 5 / 2 == pytest.approx(11)
