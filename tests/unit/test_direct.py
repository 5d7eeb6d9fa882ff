"""The enforced tier on a real store on disk: the same output under every policy, budget and order of reads; faults."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import numpy as np
import pytest

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.observe import Timeline
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import BudgetError, RequestError, StoreError, TraceError
from elmoe.kernels.slices import LSB, MSB, ExpertArena
from elmoe.policy.residency import ResidencyParameters
from elmoe.store import open_direct, open_store
from elmoe.store.synthetic import synthesize
from elmoe.trace import TraceRecorder, draft_facts_of_trace, read_trace
from tests.tiny import tiny_spec

SPEC = tiny_spec(layers=4, dense_layers=(1,), experts=16, top_k=3, max_positions=1024)
PLAIN = EngineOptions(mode="plain", keep_kv_digest=True)
POLICIES = ("decayed", "lru", "lfu", "static", "random")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("direct") / "store"
    synthesize(path, SPEC, 5, lambda done, total: None)
    return path


@pytest.fixture
def reader(store):
    with open_direct(store) as one:
        yield one


def requests(temperature: float = 0.8, count: int = 5, tokens: int = 20) -> list[Request]:
    rng = np.random.default_rng(2)
    return [
        Request(tuple(rng.integers(1, 97, 3 + 11 * i).tolist()), tokens + i, SamplingParameters(temperature, seed=i))
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def reference(store):
    with open_store(store) as memory:
        return {t: Engine(memory, kernels, PLAIN).generate(requests(t))[0] for t in (0.0, 0.8)}


CASES = [
    replace(PLAIN, batch=3),
    replace(PLAIN, mode="cache", fast_memory=0.0),
    replace(PLAIN, mode="cache", fast_memory=0.4, split="whole_experts", batch=4),
    *(
        EngineOptions(
            mode="elastic", fast_memory=budget, split=split, batch=batch, draft_length=length, keep_kv_digest=True,
            residency=ResidencyParameters(policy), staging_experts=staging, prefetch=prefetch,
        )
        for policy, budget, split, batch, length, staging, prefetch in zip(
            POLICIES * 3, (0.0, 0.25, 0.5, 1.0) * 4, ("auto", "msb_first", "whole_experts") * 5, (1, 3, 8, 16, 2) * 3,
            (1, 2, 4, 8, None, None) * 3, (16, 3, 2) * 5, (True, True, False) * 5, strict=False,
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        pytest.param(
            options, temperature, id=f"{index}-{temperature}",
            marks=[] if (index % 2 == 0) == (temperature == 0) else [pytest.mark.full],
        )
        for index, options in enumerate(CASES) for temperature in (0.0, 0.8)
    ],
)  # fmt: skip
def test_every_policy_gives_the_plain_output(reader, reference, options, temperature):
    engine = Engine(reader, kernels, options)
    engine.tier._pool.inject_delay(0.0005, 7)  # reads complete in random order
    for _ in range(2):  # cold and warm
        results, statistics = engine.generate(requests(temperature))
        assert results == reference[temperature]
        assert statistics.draft_slow_reads == 0
        arena = engine.tier.arena
        assert arena.used <= arena.capacity
    if options.mode == "plain":
        assert arena.used == 0
    else:  # what the arena holds is what is resident
        resident = engine.tier.resident
        assert arena.used == resident.msb.sum() * arena.size(MSB) + resident.lsb.sum() * arena.size(LSB)
        assert not (resident.lsb & ~resident.msb).any() and resident.msb.any()


def test_naive_decoding_reads_each_active_expert_once_a_step(reader):
    _, statistics = Engine(reader, kernels, replace(PLAIN, batch=3)).generate(requests())
    assert statistics.read_bytes == sum(phase.slow_bytes for phase in statistics.phases.values()) > 0


def test_without_drafts_what_is_missed_is_what_is_read(reader):
    options = EngineOptions(mode="cache", fast_memory=0.5, split="whole_experts", batch=2)
    _, statistics = Engine(reader, kernels, options).generate(requests())
    assert statistics.read_bytes == sum(phase.slow_bytes for phase in statistics.phases.values())
    assert statistics.phases["plain"].msb_hits > 0


def test_both_tiers_count_the_same_hits_and_bytes(store, reader):
    options = EngineOptions(mode="elastic", fast_memory=0.5, split="msb_first", draft_length=3, batch=5)
    with open_store(store) as memory:
        simulated, enforced = (
            Engine(one, kernels, options).generate(requests())[1].as_dict()["phases"] for one in (memory, reader)
        )
    for phase in simulated:
        for key in ("seconds", "waited_seconds"):
            del simulated[phase][key], enforced[phase][key]
    assert simulated == enforced


def test_drafts_read_ahead_what_verification_needs(reader):
    # Whole experts in half of the memory leave the rest of it to reads ahead.
    options = EngineOptions(mode="elastic", fast_memory=0.5, split="msb_first", draft_length=4, batch=2, staging_experts=30)
    ahead, without = (
        Engine(reader, kernels, replace(options, prefetch=prefetch)).generate(requests())[1] for prefetch in (True, False)
    )
    assert ahead.foreseen_hits > 0 and without.foreseen_hits == 0
    assert ahead.read_bytes >= without.read_bytes  # a foreseen slice that is not needed is read in vain


@pytest.mark.parametrize("error,words", [(errno.EIO, "Input/output error"), (errno.ENODATA, "No data available")])
@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_a_failing_read_fails_its_request_only(reader, reference, error, words, after):
    engine = Engine(reader, kernels, EngineOptions(fast_memory=0.4, draft_length=3, batch=2, keep_kv_digest=True))
    engine.tier._pool.inject_failure(error, after)
    with pytest.raises(StoreError, match=f"layer-00.*expert.*{words}") as caught:
        engine.generate(requests())
    assert caught.value.hint
    assert engine.generate(requests())[0] == reference[0.8]


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_direct_reads_late_is_told_with_the_mend(reader, error):
    engine = Engine(reader, kernels, EngineOptions(fast_memory=0.4, draft_length=3, batch=2))
    engine.tier._pool.inject_failure(error, 5)
    with pytest.raises(StoreError, match=rf"layer-00\d\.experts.*{os.strerror(error)}") as caught:
        engine.generate(requests())
    assert "--reader memory" in str(caught.value.hint)


def test_a_file_truncated_while_open(store, tmp_path, reference):
    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    with open_direct(copy) as reader:
        engine = Engine(reader, kernels, replace(PLAIN, mode="cache", fast_memory=0.3))
        assert engine.generate(requests())[0] == reference[0.8]
        file = copy / "layer-002.experts"
        whole = file.read_bytes()
        os.truncate(file, len(whole) // 2)
        with pytest.raises(StoreError, match=r"layer-002\.experts"):
            Engine(reader, kernels, PLAIN).generate(requests())
        file.write_bytes(whole)
        assert engine.generate(requests())[0] == reference[0.8]


def test_a_slow_disk_is_as_slow_as_it_says(reader, reference):
    rate = 20e6
    engine = Engine(reader, kernels, replace(PLAIN, batch=5, slow_bandwidth=rate))
    began = perf_counter()
    results, statistics = engine.generate(requests())
    seconds = perf_counter() - began
    assert results == reference[0.8]
    assert seconds > 0.9 * statistics.read_bytes / rate
    assert sum(phase.waited_seconds for phase in statistics.phases.values()) <= seconds


def test_budgets_below_the_minimum_are_refused_before_anything_is_read(reader):
    for mode in ("plain", "cache", "elastic"):
        engine = Engine(reader, kernels, EngineOptions(mode=mode, fast_memory=100_000))
        with pytest.raises(BudgetError, match="minimum of"):
            engine.generate(requests())
        assert engine.tier.bytes_read == 0
    with pytest.raises(RequestError, match="8 bits"):
        Engine(reader, kernels, EngineOptions(draft_bits=8))


@pytest.mark.parametrize("split", ["auto", "msb_first"])
def test_the_cache_of_keys_and_values_comes_first(store, reader, split):
    """A long context takes memory from experts in steps; nothing stalls, no token changes, the budget is kept throughout."""
    long = [Request(tuple(range(1, 40)), 700, SamplingParameters(0.8, seed=1), ignore_eos=True)]
    with open_store(store) as memory:
        expected = Engine(memory, kernels, PLAIN).generate(long)[0]
    engine = Engine(reader, kernels, EngineOptions(fast_memory=0.5, split=split, draft_length=2, keep_kv_digest=True))
    budget = engine.fitting.budget(sizes := engine.fitting.sizes(long))
    slices, totals, results = [], [], []
    for outputs in engine.run(long):
        slices.append(int(engine.tier.resident.msb.sum() + engine.tier.resident.lsb.sum()))
        totals.append(sizes.dense + engine.cache.bytes_touched + engine.tier.arena.capacity)
        results += [output.result for output in outputs if output.result is not None]
    assert results == expected
    assert max(totals) <= budget
    assert max(slices[: len(slices) // 2]) > slices[-1]
    assert engine.cache.bytes_in_use == 0


def test_the_disk_fills_up_under_a_trace(reader, reference, tmp_path):
    engine = Engine(reader, kernels, EngineOptions(fast_memory=0.5, draft_length=2, keep_kv_digest=True))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # a write beyond it fails as on a full disk
    try:
        with pytest.raises(TraceError, match=r"run\.trace"), TraceRecorder(tmp_path / "run.trace", SPEC, {}) as recorder:
            for _ in range(60):
                engine.generate(requests(), recorder=recorder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert engine.generate(requests())[0] == reference[0.8]


def test_a_timeline_shows_passes_kernels_waits_and_reads(reader, tmp_path):
    import json

    timeline = Timeline()
    engine = Engine(reader, kernels, EngineOptions(fast_memory=0.4, draft_length=2))
    engine.generate(requests(count=1))
    warm = engine.tier
    _, statistics = engine.generate(requests(count=1), timeline=timeline)
    assert engine.tier is warm  # what a run left warm stays
    timeline.write(tmp_path / "run.json")
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    names = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"passes", "kernels", "waits", "read 0"} <= names
    passes = sum(phase.steps for phase in statistics.phases.values())
    for layer in range(len(SPEC.layers)):  # of every pass, the dense layer's too
        for part in ("attention", "routing", "experts"):
            assert sum(event["name"] == f"{part} {layer}" for event in events) == passes
    assert sum(event["name"] == "logits" for event in events) == passes - statistics.phases["prefill"].steps
    assert sum(event["name"].startswith("read") for event in events if event["ph"] == "X") == statistics.slow_reads
    assert 0 <= timeline.hidden_share() <= 1


def test_a_replay_drives_other_weights_by_the_trace(store, reader, tmp_path):
    """Routing, tokens and acceptance are the trace's in every mode; what is compared is hashes of real logits."""
    from elmoe.measure.replay import ReplayBackend

    target = tiny_spec(layers=6, experts=16, top_k=6, vocabulary=97)
    synthesize(tmp_path / "wide", target, 9, lambda done, total: None)
    record = EngineOptions(fast_memory=0.5, draft_length=16, commit_limit=1, batch=4)
    path = tmp_path / "facts.trace"
    recorded = [replace(request, ignore_eos=True) for request in requests(count=4)]
    with open_store(store) as memory, TraceRecorder(path, SPEC, {"commit_limit": 1}) as recorder:
        results, _ = Engine(memory, kernels, record).generate(recorded, recorder=recorder)
    facts = draft_facts_of_trace(read_trace(path))
    with open_direct(tmp_path / "wide") as wide:
        replay = ReplayBackend(kernels, target, [facts])
        begin, overrule = replay.begin, replay.routed
        passes: list[tuple[str, list[tuple[int, int, int]], list[np.ndarray]]] = []
        replay.begin = lambda phase, rows, *rest: (passes.append((phase, rows, [])), begin(phase, rows, *rest))[1]

        def routed(row, routings, draft):
            overrule(row, routings, draft)
            passes[-1][2].append(routings.experts[row].copy())

        replay.routed = routed
        digests = []
        for options in (
            PLAIN, replace(PLAIN, mode="cache", fast_memory=0.5), EngineOptions(fast_memory=0.4, draft_length=4, batch=4),
            EngineOptions(fast_memory=0.6, batch=3),
        ):  # fmt: skip
            passes.clear()
            again, _ = Engine(wide, replay, options, replay).generate(replay.requests([0, 1, 2, 3], 12))
            assert [one.tokens for one in again] == [one.tokens[:12] for one in results]
            digests.append(replay.committed_digests())
            # target rows run the best of the recorded ranking: an even layer as recorded, the odd one behind it permuted
            for phase, rows, experts in passes:
                for row, (sequence, last, position) in enumerate(rows):
                    if phase == "draft":
                        continue
                    start = position if phase == "prefill" else last
                    ranked = facts.target_routes[sequence, start, position - start, 1, :6]
                    assert experts[2][row].tolist() == sorted(ranked.tolist())
                    assert experts[3][row].tolist() == sorted(replay._permutation[ranked].tolist())
        assert len(digests[0]) == 4 * 12 and all(one == digests[0] for one in digests)
        with pytest.raises(TraceError, match="drafts of 16 tokens"):
            Engine(wide, replay, EngineOptions(fast_memory=0.5, draft_length=17), replay).generate(replay.requests([0], 20))
        with pytest.raises(TraceError, match="has 23 tokens"):
            replay.requests([0], 21)


def test_a_trace_without_a_draft_from_every_position_is_refused(reader, tmp_path):
    with TraceRecorder(tmp_path / "t", SPEC, {}) as recorder:
        Engine(reader, kernels, EngineOptions(fast_memory=0.5, draft_length=2)).generate(requests(), recorder=recorder)
    with pytest.raises(TraceError, match="every position"):
        draft_facts_of_trace(read_trace(tmp_path / "t"))


def test_the_arena_gives_back_its_last_slots_and_keeps_what_is_used():
    arena = ExpertArena([8192, 4096], [6, 6])
    assert not arena.has_room(MSB) and not arena.has_room(LSB)
    arena.resize(MSB, 3)
    arena.resize(LSB, 2)
    assert arena.capacity == 3 * 8192 + 2 * 4096
    slots = [arena.take(MSB) for _ in range(3)]
    assert not arena.has_room(MSB) and arena.has_room(LSB, 1) and not arena.has_room(LSB, 2)
    assert len({arena.address(MSB, slot) for slot in slots}) == 3
    with pytest.raises(RuntimeError, match="full"):
        arena.take(MSB)
    content = ctypes.c_char * 8192
    content.from_address(arena.address(MSB, 2)).value = b"kept"
    arena.give(MSB, 0)
    with pytest.raises(RuntimeError, match="do not fit"):
        arena.resize(MSB, 2)
    arena.move(MSB, 2, 0)
    arena.resize(MSB, 2)
    assert content.from_address(arena.address(MSB, 0)).value == b"kept"
    assert arena.used == 2 * 8192 and arena.capacity == 2 * 8192 + 2 * 4096


def test_files_are_read_past_the_page_cache_where_the_file_system_allows_it(store, tmp_path):
    try:
        os.close(os.open(store / "dense.bin", os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system refuses O_DIRECT")
    with open_direct(store) as reader:
        handle, _ = reader.extent(0, 0)
        assert not reader.buffered and fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT
