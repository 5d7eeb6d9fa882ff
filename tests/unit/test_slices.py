"""Expert slices whose sizes differ by layer: the mechanism alone, how slots are shared out, and a tier over such a model."""

from __future__ import annotations

import ctypes
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from elmoe import bitslice, kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.direct_tier import slots_held
from elmoe.engine.engine import Engine, EngineOptions
from elmoe.engine.request import Request
from elmoe.engine.tier import tier_sizes
from elmoe.kernels.reads import ReadPool
from elmoe.kernels.slices import ExpertArena, ExpertSlices
from elmoe.models.spec import ModelSpec
from elmoe.store import open_direct, open_store
from elmoe.store.synthetic import synthesize
from tests.tiny import tiny_spec

PAGE = 4096
CLASSES = [(2 * PAGE, PAGE), (3 * PAGE, 0), (PAGE, 3 * PAGE)]
CLASS_OF_ROW = [0, 1, 2, 1, 0]
EXPERTS = 6


@pytest.fixture
def mixed(tmp_path):
    """Slices of three size classes, one of them without LSB slices, over files with a pattern in every record."""
    pool, rng, files, offsets, records = ReadPool(3), np.random.default_rng(0), [], [], []
    tables = [np.zeros((EXPERTS, 2), np.int64) for _ in CLASS_OF_ROW]
    for row, index in enumerate(CLASS_OF_ROW):
        size = sum(CLASSES[index])
        data = rng.integers(0, 256, (EXPERTS, size), np.uint8)
        path = tmp_path / f"row-{row}"
        path.write_bytes(data.tobytes())
        files.append(os.open(path, os.O_RDONLY))
        offsets.append([expert * size for expert in range(EXPERTS)])
        records.append(data)
    names = [f"row-{row}" for row in range(len(files))]
    slices = ExpertSlices(pool, CLASSES, CLASS_OF_ROW, names, files, offsets, tables, 1)
    pool.inject_delay(0.0005, 3)
    yield SimpleNamespace(slices=slices, tables=tables, records=records)
    slices.finish()
    for file in files:
        os.close(file)


def content(address: int, size: int) -> bytes:
    return ctypes.string_at(int(address), size)


def compute(mixed, row: int, experts: list[int]) -> None:
    """Go through a row's stretches; every expert's slices hold its record."""
    msb, lsb = CLASSES[CLASS_OF_ROW[row]]
    mixed.slices.begin(row, np.array([experts], np.int32))
    seen = []
    while ready := mixed.slices.next():
        for expert in ready:
            addresses = mixed.tables[row][expert]
            assert content(addresses[0], msb) == mixed.records[row][expert, :msb].tobytes()
            if lsb:
                assert content(addresses[1], lsb) == mixed.records[row][expert, msb:].tobytes()
            else:
                assert addresses[1] == 0
        seen += ready
    assert seen == sorted(set(experts))


def test_slices_of_several_sizes_arrive_stay_and_move(mixed):
    slices, arena = mixed.slices, mixed.slices.arena
    assert [arena.size(kind) for kind in range(6)] == [size for sizes in CLASSES for size in sizes]
    slices.resize([(3, 2), (2, 0), (2, 2)])
    assert arena.capacity == 3 * 2 * PAGE + 2 * PAGE + 2 * 3 * PAGE + 2 * PAGE + 2 * 3 * PAGE
    rng = np.random.default_rng(1)
    for _ in range(3):
        for row in range(5):
            compute(mixed, row, rng.integers(0, EXPERTS, 4).tolist())
    assert arena.used == 0
    flags = np.zeros((2, EXPERTS), bool)
    flags[:, 4] = True
    for row in (1, 2, 4):  # one resident of each class; the last one goes to a row that has an equal in another
        slices.begin(row, np.array([[4]], np.int32))
        slices.keep(row, flags[0], flags[1])
        while slices.next():
            pass
    assert arena.used == sum(sum(sizes) for sizes in CLASSES)
    slices.resize([(1, 1), (1, 0), (1, 1)])
    for row in (1, 2, 4):
        msb, lsb = CLASSES[CLASS_OF_ROW[row]]
        assert content(mixed.tables[row][4, 0], msb) == mixed.records[row][4, :msb].tobytes()
        assert lsb == 0 or content(mixed.tables[row][4, 1], lsb) == mixed.records[row][4, msb:].tobytes()
    with pytest.raises(RuntimeError, match="do not fit"):
        slices.resize([(0, 1), (1, 0), (1, 1)])


def test_planned_reads_fill_each_class_and_are_used(mixed):
    slices = mixed.slices
    slices.resize([(4, 4), (4, 0), (4, 4)])
    ranked = np.tile(np.array([1, 3, 5], np.int32), (5, 1, 1))
    slices.foresee(0, ranked, 2)
    for row in range(5):
        compute(mixed, row, [1, 3])
    assert slices.foreseen_hits > 5
    slices.forget_plans()
    assert slices.arena.used == 0


def test_rows_that_contradict_themselves_are_refused(tmp_path):
    tables = [np.zeros((2, 2), np.int64)]
    good = [[(PAGE, PAGE)], [0], ["a"], [0], [[0, 0]], tables, 1]
    ExpertSlices(ReadPool(1), *good)
    for place, bad in (
        (0, [(0, PAGE)]), (0, [(PAGE, -1)]), (1, [1]), (1, [-1]), (1, []), (2, []), (3, [0, 0]), (4, [[0]]),
        (5, [np.zeros((2, 3), np.int64)]), (5, []), (0, [(1 << 62, PAGE)]),
    ):  # fmt: skip
        with pytest.raises((ValueError, OverflowError, RuntimeError)):
            ExpertSlices(ReadPool(1), *[bad if i == place else one for i, one in enumerate(good)])
    for sizes, slots in (([1 << 40], [1 << 30]), ([1 << 62], [4]), ([0], [1]), ([PAGE], []), ([], [])):
        with pytest.raises((ValueError, RuntimeError)):
            ExpertArena(sizes, slots)
    arena = ExpertArena([PAGE], [2])
    for call in (lambda: arena.size(1), lambda: arena.take(-1), lambda: arena.address(0, 2), lambda: arena.resize(0, -1)):
        with pytest.raises(ValueError):
            call()
    slices = ExpertSlices(ReadPool(1), *good)
    with pytest.raises(ValueError):
        slices.resize([(1, 1), (1, 1)])
    for row, experts in ((1, [[0]]), (-1, [[0]]), (0, [[2]]), (0, [[-1]])):
        with pytest.raises(ValueError, match="out of range"):
            slices.begin(row, np.array(experts, np.int32))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=3, unique=True),
    st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(1, 8), st.integers(0, 400), st.randoms(),
)  # fmt: skip
def test_slots_fit_the_capacity_and_every_class_can_be_computed(classes, rows, experts, extra, random):
    class_of_row = np.array([*range(len(classes)), *(row % len(classes) for row in rows)])
    kept = []
    for index in class_of_row:
        msb = random.randint(0, experts)
        kept.append((msb, random.randint(0, msb) if classes[index][1] else 0))
    held = [tuple(sum(kept[r][k] for r in np.flatnonzero(class_of_row == c)) for k in (0, 1)) for c in range(len(classes))]
    bytes_held = sum(m * a + x * b for (m, x), (a, b) in zip(held, classes, strict=True))
    capacity = bytes_held + sum(map(sum, classes)) + extra  # residents, one expert of every class, and more
    slots = slots_held(capacity, classes, class_of_row, kept, experts)
    assert sum(m * a + x * b for (m, x), (a, b) in zip(slots, classes, strict=True)) <= capacity
    for index, ((msb, lsb), (kept_msb, kept_lsb)) in enumerate(zip(slots, held, strict=True)):
        all_slices = experts * int((class_of_row == index).sum())
        assert min(kept_msb + 1, all_slices) <= msb <= all_slices
        if classes[index][1]:
            assert min(kept_lsb + 1, all_slices) <= lsb <= all_slices
        else:
            assert lsb == 0


WIDTHS = (32, 64, 96, 32, 160)


def mixed_spec() -> ModelSpec:
    """A model whose expert widths differ from layer to layer, the second layer dense."""
    spec = tiny_spec(layers=len(WIDTHS), dense_layers=(1,), experts=12, top_k=3)
    layers = [
        structs.replace(layer, feed_forward=structs.replace(layer.feed_forward, width=width))
        for layer, width in zip(spec.layers, WIDTHS, strict=True)
    ]
    return structs.replace(spec, layers=tuple(layers))


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    synthesize(folder / "store", mixed_spec())
    with open_store(folder / "store") as memory, open_direct(folder / "store") as direct:
        yield memory, direct


def requests(count: int = 4, tokens: int = 16) -> list[Request]:
    rng = np.random.default_rng(2)
    return [
        Request(tuple(rng.integers(1, 97, 3 + 7 * i).tolist()), tokens, SamplingParameters(0.8, seed=i))
        for i in range(count)
    ]


PLAIN = EngineOptions(mode="plain", keep_kv_digest=True)


@pytest.fixture(scope="module")
def reference(readers):
    """By the definition in NumPy."""
    return Engine(readers[0], bitslice, replace(PLAIN, batch=4)).generate(requests())[0]


@pytest.mark.parametrize("options", [
    replace(PLAIN, batch=2),
    replace(PLAIN, mode="cache", fast_memory=0.3, split="whole_experts", batch=3),
    replace(PLAIN, mode="elastic", fast_memory=0.0, split="msb_first", draft_length=2, staging_experts=1),
    replace(PLAIN, mode="elastic", fast_memory=0.5, split="msb_first", draft_length=3, batch=4, staging_experts=24),
    replace(PLAIN, mode="elastic", fast_memory=0.6, batch=2),
], ids=["plain", "whole experts", "least budget", "MSB first", "planned"])  # fmt: skip
def test_a_tier_over_layers_of_different_sizes(readers, reference, options):
    _, direct = readers
    engine = Engine(direct, kernels, options)
    engine.tier._pool.inject_delay(0.0005, 7)
    budget = engine.budget(engine.sizes(requests()))
    for _ in range(2):
        results, statistics = engine.generate(requests())
        assert results == reference and statistics.draft_slow_reads == 0
    arena, resident = engine.tier.arena, engine.tier.resident
    layouts = [direct.expert_layout(layer) for layer in direct.spec.moe_layers]
    held = [(len(np.flatnonzero(m)), len(np.flatnonzero(x))) for m, x in zip(resident.msb, resident.lsb, strict=True)]
    used = sum(m * layout.msb_bytes + x * layout.lsb_bytes for (m, x), layout in zip(held, layouts, strict=True))
    assert arena.used == (0 if options.mode == "plain" else used)
    assert arena.used <= arena.capacity <= budget - direct.dense_bytes
    if options.mode == "plain":
        assert statistics.read_bytes == sum(phase.slow_bytes for phase in statistics.phases.values())


def test_both_tiers_count_alike_where_layers_differ(readers):
    options = EngineOptions(mode="elastic", fast_memory=0.5, split="msb_first", draft_length=3, batch=4)
    accounted, enforced = (Engine(one, kernels, options).generate(requests())[1].as_dict()["phases"] for one in readers)
    for phase in accounted:
        for key in ("seconds", "waited_seconds"):
            del accounted[phase][key], enforced[phase][key]
    assert accounted == enforced


def test_staging_holds_an_expert_of_every_size(readers):
    memory = readers[0]
    experts = {layout.msb_bytes + layout.lsb_bytes for layout in map(memory.expert_layout, memory.spec.moe_layers)}
    assert len(experts) > 2
    assert tier_sizes(memory, 0, 0, staging_experts=1).staging == sum(experts)
    assert tier_sizes(memory, 0, 0, 16).staging == 16 * max(experts)
