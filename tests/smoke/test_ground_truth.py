"""The engine is the simulator's ground truth: hits and bytes predicted from a trace equal what the engine counted."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.bitslice.expert import PAGE
from elmoe.engine.cache_layout import PAGE_POSITIONS, layout_of
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.llm import load
from elmoe.measure.slots import slots_by_step
from elmoe.models import spec_of_config
from elmoe.models.load import load_model
from elmoe.policy.residency import ResidencyParameters
from elmoe.sim.recorded import Counts, _kept_rows, predict
from elmoe.store import open_direct, open_store
from elmoe.store.synthetic import synthesize
from elmoe.trace import TraceRecorder, read_trace
from tests.family_configs import CONFIGS
from tests.schedules import windowed_spec
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


KINDS = {
    "grouped": SPEC, "windows": windowed_spec(), "latent": spec_of_config(CONFIGS["deepseek_v3"]),
    "windows and one slice": spec_of_config(CONFIGS["gpt_oss"]),
}  # fmt: skip
FORMATS = {"windows and one slice": "table4_mx"}


@pytest.fixture(params=KINDS)
def of_kind(request, tmp_path):
    """A random store of each kind of attention, one of them with MXFP4 experts: its name, folder and spec."""
    spec = KINDS[request.param]
    formats = {f"layers.{i}.experts": FORMATS[request.param] for i in spec.moe_layers} if request.param in FORMATS else None
    synthesize(tmp_path / "store", spec, 3, formats=formats)
    return request.param, tmp_path / "store", spec


def long_requests(count: int = 4, tokens: int = 40) -> list[Request]:
    """Texts that leave windows of 20 and 90 positions behind."""
    rng = np.random.default_rng(5)
    return [
        Request(tuple(rng.integers(1, 96, 30 + 25 * i).tolist()), tokens, SamplingParameters(0.8, seed=i))
        for i in range(count)
    ]


@pytest.mark.parametrize("mode", ["cache", "elastic"])
def test_every_kind_of_attention_is_predicted_exactly(tmp_path, of_kind, mode):
    """Bytes of experts by tier; then of what the fast memory holds beside them."""
    name, store, _ = of_kind
    options = EngineOptions(mode=mode, fast_memory=0.4, batch=3, draft_length=4, all_ranks=True)
    with open_store(store) as reader:
        run = recorded_of(reader, options, long_requests(), tmp_path / "run.trace")
    assert_exact(run)
    _, sizes, _, statistics, _ = run
    model = load_model(store)
    for counted, kind in ((sizes.msb, "msb_bytes"), (sizes.lsb, "lsb_bytes")):  # but for the ends of pages
        assert counted == tuple(-(-int(getattr(layer, kind)) // PAGE) * PAGE for layer in model.moe_layers)
    assert (sum(sizes.lsb) == 0) == (name in FORMATS)
    assert statistics.phases["verify" if mode == "elastic" else "plain"].slow_bytes > 0


def test_the_fast_memory_holds_the_keys_that_the_engine_keeps(of_kind):
    """At every context, of layers with a window the positions that a token still sees, also where several are computed."""
    _, store, spec = of_kind
    model, layout = load_model(store), layout_of(spec)
    position = layout.page_bytes // PAGE_POSITIONS
    for context in (1, 19, 20, 21, 63, 90, 91, 300):
        for computed in (1, 5):
            if computed <= context:
                kept = (context - layout.first_seen(group, context - computed) for group in range(layout.groups))
                assert model.cache_bytes(context, computed) == position * sum(kept)


@pytest.mark.parametrize("share", [0.2, 0.5])
@pytest.mark.parametrize("name", ["grouped", "windows", "latent", "windows and one slice", "demo"])
def test_reads_ahead_and_splits_by_rate_are_predicted_exactly(tmp_path, name, share):
    """A run that reads from disk, whose planner splits the memory anew as it learns, and whose drafts have slices read."""
    store = files("elmoe.presets") / "demo"
    if name != "demo":
        store, formats = tmp_path / "store", {}
        if name in FORMATS:
            formats = {f"layers.{i}.experts": FORMATS[name] for i in KINDS[name].moe_layers}
        synthesize(store, KINDS[name], 3, formats=formats)
    options = EngineOptions(
        mode="elastic", fast_memory=share, batch=2, draft_length=3, all_ranks=True, split="auto", prefetch=True
    )
    with open_direct(store) as reader:
        engine = Engine(reader, kernels, options)
        slots = slots_by_step(engine)
        with TraceRecorder(tmp_path / "run.trace", reader.spec, {}, all_ranks=True) as recorder:
            _, statistics = engine.generate(long_requests(3, 60), recorder=recorder)
        sizes = engine.fitting.sizes(long_requests(3, 60))
    trace = read_trace(tmp_path / "run.trace")
    assert_exact((options, sizes, slots, statistics, trace))
    predicted = predict(trace, slots, sizes, options.residency).phases
    foreseen = sum(counts.foreseen for counts in predicted.values())
    assert foreseen == statistics.foreseen_hits > 0
    assert foreseen <= predicted["verify"].msb_misses + predicted["verify"].lsb_misses


def test_slices_that_sequences_make_room_for_as_they_end_are_predicted_exactly(tmp_path):
    """Of an enforced budget; the sequences go on behind end tokens, as the trace says."""
    with load("demo") as model:
        ids = [model.encode(text) for text in PROMPTS * 3]
    asked = [Request(i, 16 + 4 * n, SamplingParameters(0.8, seed=900 + n), ignore_eos=True) for n, i in enumerate(ids)]
    options = EngineOptions(mode="elastic", fast_memory=0.5, split="msb_first", batch=15, draft_length=4, all_ranks=True)
    with open_direct("demo") as reader:
        engine = Engine(reader, kernels, options)
        slots = slots_by_step(engine)
        with TraceRecorder(tmp_path / "run.trace", reader.spec, {"ignore_eos": True}, all_ranks=True) as recorder:
            _, statistics = engine.generate(asked, recorder=recorder)
        sizes = engine.fitting.sizes(asked)
    trace = read_trace(tmp_path / "run.trace")
    assert len(set(slots.values())) > 1
    assert_exact((options, sizes, slots, statistics, trace))
    kept = _kept_rows(trace).sum()
    trace.header.run["ignore_eos"] = False
    assert kept > _kept_rows(trace).sum()  # an end token within a last verification
