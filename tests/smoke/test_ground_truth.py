"""The engine is the simulator's ground truth: hits and bytes predicted from a trace equal what the engine counted."""

from __future__ import annotations

import pytest

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.llm import load
from elmoe.policy.residency import ResidencyParameters
from elmoe.sim.recorded import Counts, predict
from elmoe.store import open_store
from elmoe.store.synthetic import synthesize
from elmoe.trace import TraceRecorder, read_trace
from tests.unit.test_format_stores import SPEC, STORES, requests

PROMPTS = ("The history of the city", "def add(a, b):", "Q: How many apples", "Once upon a time", "In physics, energy is")


def recorded(tmp_path, **named):
    """An engine run on the demo model with its trace; (options, sizes, slots, statistics, trace)."""
    with load("demo") as model:
        ids = [model.encode(text) for text in PROMPTS]
    options = EngineOptions(all_ranks=True, **named)
    asked = [Request(i, 24, SamplingParameters(0.8, seed=n)) for n, i in enumerate(ids)]
    with open_store("demo") as reader:
        return recorded_of(reader, options, asked, tmp_path / "run.trace")


def recorded_of(reader, options, asked, path):
    engine = Engine(reader, kernels, options)
    with TraceRecorder(path, reader.spec, {}, all_ranks=True) as recorder:
        _, statistics = engine.generate(asked, recorder=recorder)
    sizes = engine.fitting.sizes(asked)
    return options, sizes, engine.fitting.slots(sizes), statistics, read_trace(path)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("mode", ["plain", "cache", "elastic"])
def test_hits_and_bytes_are_predicted_exactly(tmp_path, mode, share):
    run = recorded(tmp_path, mode=mode, fast_memory=share, batch=3, draft_length=4)
    assert_exact(run)


@pytest.mark.parametrize("policy", ["decayed", "lru", "lfu", "static", "random"])
@pytest.mark.parametrize("split", ["msb_first", "whole_experts"])
def test_every_policy_and_split_is_predicted_exactly(tmp_path, policy, split):
    run = recorded(
        tmp_path,
        mode="elastic",
        fast_memory=0.4,
        batch=2,
        draft_length=3,
        split=split,
        residency=ResidencyParameters(policy),
    )
    assert_exact(run)


def assert_exact(run):
    options, sizes, slots, statistics, trace = run
    predicted = predict(trace, slots, sizes, options.residency).phases
    for phase, counters in statistics.phases.items():
        mine = predicted.get(phase, Counts())
        assert mine.passes == counters.steps, phase
        for name in ("tokens", "msb_hits", "msb_misses", "lsb_hits", "lsb_misses", "fast_bytes", "slow_bytes"):
            assert getattr(mine, name) == getattr(counters, name), (phase, name)


@pytest.mark.parametrize("name", ["mixed", "table4_mx"])
@pytest.mark.parametrize("mode", ["plain", "cache", "elastic"])
def test_experts_of_several_formats_are_predicted_exactly(tmp_path, mode, name):
    """Layers whose experts differ in bytes, some with one slice."""
    synthesize(tmp_path / "store", SPEC, 3, formats=STORES[name])
    options = EngineOptions(mode=mode, fast_memory=0.4, batch=3, draft_length=4, all_ranks=True)
    with open_store(tmp_path / "store") as reader:
        run = recorded_of(reader, options, requests(), tmp_path / "run.trace")
    assert_exact(run)
