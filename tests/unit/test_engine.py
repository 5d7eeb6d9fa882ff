"""The serving loop on tiny random models and the NumPy definition: losslessness, stops, budgets, counters, bad requests."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.kv_cache import CacheEntry, PagedCache
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import BudgetError, NumericsError, RequestError, TraceError
from elmoe.text import TextStream
from elmoe.trace import TraceRecorder, read_trace
from tests.tiny import TinyReader, tiny_spec

READER = TinyReader(tiny_spec())
PLAIN = EngineOptions(mode="plain", keep_kv_digest=True)


def requests(temperature: float = 0.0, lengths: tuple[int, ...] = (5, 1, 17, 30, 2)) -> list[Request]:
    rng = np.random.default_rng(1)
    sampling = SamplingParameters(temperature, seed=5, top_p=0.95 if temperature else 1.0)
    return [Request(tuple(rng.integers(1, 97, n).tolist()), 6 + 3 * i, sampling) for i, n in enumerate(lengths)]


SHAPES = (
    {},
    {"dense_layers": (1,)},
    {"tied_embeddings": False, "normalize": False, "kv_heads": 4},
    {"layers": 2, "dense_layers": (0,), "experts": 5, "top_k": 3},
)


@pytest.mark.parametrize(
    ("changes", "temperature"),
    [
        pytest.param(changes, temperature, marks=[] if (index % 2 == 0) == (temperature == 0) else [pytest.mark.full])
        for index, changes in enumerate(SHAPES)
        for temperature in (0.0, 0.8)
    ],
)
def test_every_mode_gives_the_plain_output(changes, temperature):
    reader = TinyReader(tiny_spec(**changes), seed=3)
    reference, _ = Engine(reader, bitslice, PLAIN).generate(requests(temperature))
    assert all(result.kv_digest for result in reference)
    for options in (
        EngineOptions(mode="plain", batch=3),
        EngineOptions(mode="cache", fast_memory=0.5, batch=2),
        EngineOptions(mode="elastic", fast_memory=0.0, draft_length=1),
        EngineOptions(mode="elastic", fast_memory=0.3, draft_length=4, batch=5, split="whole_experts"),
        EngineOptions(mode="elastic", fast_memory=1.0, draft_length=8, batch=2, draft_offset=0.0),
        EngineOptions(mode="elastic", fast_memory=0.6, batch=2, draft_top_k=1, draft_rescale=False),
        EngineOptions(mode="elastic", fast_memory=0.6, draft_length=3, draft_bits=8),
    ):
        results, statistics = Engine(reader, bitslice, replace(options, keep_kv_digest=True)).generate(requests(temperature))
        assert results == reference, options
        assert statistics.draft_slow_reads == 0
        assert statistics.committed == sum(len(result.tokens) for result in results)


def test_drafting_with_everything_resident_is_accepted():
    """All experts and all bits: the draft is the target, so every judged token is accepted."""
    options = EngineOptions(mode="elastic", fast_memory=1.0, draft_length=4, draft_bits=8)
    lengths = (120, 120)  # a prefill long enough to make every expert resident
    _, statistics = Engine(READER, bitslice, options).generate(requests(lengths=lengths))
    assert statistics.accepted > 0 and statistics.rejected == 0


def test_counters_agree_with_the_trace(tmp_path):
    options = EngineOptions(mode="elastic", fast_memory=0.5, draft_length=3, batch=2, keep_kv_digest=True)
    reference, _ = Engine(READER, bitslice, options).generate(requests())
    with TraceRecorder(tmp_path / "run.trace", READER.spec, {"mode": "elastic"}) as recorder:
        results, statistics = Engine(READER, bitslice, options).generate(requests(), recorder=recorder)
    assert results == reference
    trace = read_trace(tmp_path / "run.trace")
    phase, target, draft = trace.column("phase"), trace.column("target"), trace.column("draft")
    counted = {name: counters.tokens for name, counters in statistics.phases.items()}
    assert counted["draft"] == np.count_nonzero(phase == "draft") and counted["verify"] == np.count_nonzero(
        phase == "verify"
    )
    assert counted["mixed"] > 0  # a prompt beside a sequence that decodes: its rows are of both phases
    rest = counted["prefill"] + counted["plain"] + counted["mixed"]
    assert rest == np.count_nonzero((phase == "prefill") | (phase == "plain"))
    assert statistics.drafted == np.count_nonzero(phase == "draft") == np.count_nonzero((phase == "verify") & (draft >= 0))
    # accepted: the prefix of each verification on which draft and target agree
    verify = [(int(s), int(q), int(p), int(t), int(d)) for s, q, p, t, d, f in zip(
        trace.column("step"), trace.column("sequence"), trace.column("position"), target, draft, phase, strict=True
    ) if f == "verify"]  # fmt: skip
    accepted = 0
    for key in {row[:2] for row in verify}:
        for row in sorted(row for row in verify if row[:2] == key):
            if row[4] < 0 or row[3] != row[4]:
                break
            accepted += 1
    assert statistics.accepted <= accepted <= statistics.accepted + 3 * len(results)  # the end of a sequence cuts judging
    # experts used by the target rows, by step and layer, give the bytes of both tiers
    experts = trace.routing()[:, :, : READER.spec.top_k]
    counters = statistics.phases["verify"]
    active = sum(
        len(np.unique(experts[(phase == "verify") & (trace.column("step") == step), layer]))
        for step in np.unique(trace.column("step")[phase == "verify"])
        for layer in range(experts.shape[1])
    )
    assert counters.msb_hits + counters.msb_misses == active == counters.lsb_hits + counters.lsb_misses
    layout = READER.expert_layout(0)
    assert counters.fast_bytes + counters.slow_bytes == active * (layout.msb_bytes + layout.lsb_bytes)
    assert counters.slow_bytes == counters.msb_misses * layout.msb_bytes + counters.lsb_misses * layout.lsb_bytes


@pytest.mark.parametrize("options", [replace(PLAIN, batch=2), EngineOptions(draft_length=2, batch=3)], ids=str)
def test_passes_accounted_together_count_as_one_by_one(options, monkeypatch):
    """All layers in one call leave their accounts for later; layer by layer, each pass is accounted at its end."""
    monkeypatch.setattr("elmoe.engine.tier.ACCOUNTED_TOGETHER", 3)
    later, at_once = (
        Engine(READER, backend, options).generate(requests())[1].as_dict()["phases"] for backend in (kernels, bitslice)
    )
    for phase in later:
        for key in ("seconds", "waited_seconds"):
            del later[phase][key], at_once[phase][key]
    assert later == at_once and later["prefill"]["msb_hits"] + later["prefill"]["msb_misses"] > 0


def words_of(ids):
    return "".join(f"<{i}>" for i in ids)


def test_stop_conditions():
    base = requests(lengths=(12,))[0]
    (result,), _ = Engine(READER, bitslice, PLAIN).generate([replace(base, max_tokens=12)])
    assert result.finish == "length" and len(result.tokens) == 12
    decode = "".join
    words = [f"<{token}>" for token in result.tokens]
    stop = "".join(words[4:6])[1:-1]
    first = next(i for i in range(1, 13) if stop in decode(words[:i]))
    for options in (PLAIN, EngineOptions(mode="elastic", fast_memory=1.0, draft_length=8, keep_kv_digest=True)):
        engine = Engine(READER, bitslice, options, text=lambda prompt, stop: TextStream(words_of, prompt, stop))
        (stopped,), _ = engine.generate([replace(base, max_tokens=12, stop=("never", stop))])
        assert stopped.finish == "stop" and stopped.tokens == result.tokens[:first]
    eos = TinyReader(tiny_spec(eos_tokens=(result.tokens[5],)))
    for options in (PLAIN, EngineOptions(mode="elastic", fast_memory=1.0, draft_length=8)):
        (ended,), _ = Engine(eos, bitslice, options).generate([replace(base, max_tokens=12)])
        assert ended.finish == "eos" and ended.tokens == result.tokens[: result.tokens.index(result.tokens[5]) + 1]
        (ignored,), _ = Engine(eos, bitslice, options).generate([replace(base, max_tokens=12, ignore_eos=True)])
        assert ignored.tokens == result.tokens


def test_the_context_ends_a_sequence():
    reader = TinyReader(tiny_spec(max_positions=20))
    for options in (PLAIN, EngineOptions(mode="elastic", fast_memory=1.0, draft_length=8)):
        (result,), _ = Engine(reader, bitslice, options).generate([Request(tuple(range(1, 13)), 50)])
        assert result.finish == "length" and len(result.tokens) == 8


@pytest.mark.parametrize(
    "request_,message",
    [
        (Request(()), "empty"),
        (Request(tuple([1] * 256)), "context"),
        (Request((97,)), "outside"),
        (Request((1,), max_tokens=0), "max_tokens"),
        (Request((1,), sampling=SamplingParameters(-1.0)), "temperature"),
        (Request((1,), sampling=SamplingParameters(float("nan"))), "temperature"),
        (Request((1,), sampling=SamplingParameters(1.0, top_p=0.0)), "top_p"),
        (Request((1,), sampling=SamplingParameters(1.0, min_p=2.0)), "min_p"),
        (Request((1,), sampling=SamplingParameters(1.0, top_k=-1)), "top_k"),
        (Request((1,), stop=("",)), "stop"),
        (Request((1,), stop=("x",)), "tokenizer"),
    ],
)
def test_bad_requests_name_what_is_wrong(request_, message):
    with pytest.raises(RequestError, match=message):
        Engine(READER, bitslice, PLAIN).generate([request_])


@pytest.mark.parametrize("changes", [{"batch": 0}, {"batch": 65}, {"draft_length": -1}, {"draft_top_k": 3}])
def test_bad_options_are_refused(changes):
    with pytest.raises(RequestError):
        Engine(READER, bitslice, EngineOptions(**changes))


def test_a_budget_below_the_minimum_is_refused():
    with pytest.raises(BudgetError, match="minimum"):
        Engine(READER, bitslice, EngineOptions(fast_memory=1000)).generate(requests())


def test_an_engine_survives_a_failed_request():
    engine = Engine(READER, bitslice, PLAIN)
    reference, _ = engine.generate(requests())
    with pytest.raises(RequestError):
        engine.generate([Request(())])
    assert engine.generate(requests())[0] == reference
    assert engine.generate([])[0] == []


def test_nan_weights_surface_as_an_error_not_as_text():
    reader = TinyReader(tiny_spec())
    reader._arrays["final_norm"][3] = np.nan
    with pytest.raises(NumericsError):
        Engine(reader, bitslice, PLAIN).generate(requests())


def test_kv_pages_are_returned_and_reused():
    cache, first, second = PagedCache(tiny_spec(), 2, 200, pages=4), CacheEntry(), CacheEntry()
    cache.bind(first)
    cache.reserve(first, 130)
    cache.reserve(second, 1)
    cache.bind(second)
    assert cache.bytes_in_use == 4 * cache.page_bytes and cache.free_pages == 0
    with pytest.raises(BudgetError):
        cache.reserve(second, 65)
    assert len(second.pages) == 1
    cache.release(first)
    assert cache.bytes_touched == 4 * cache.page_bytes and cache.bytes_in_use == cache.page_bytes
    assert cache.shrink() == 3 * cache.page_bytes and cache.bytes_touched == cache.page_bytes
    cache.reserve(second, 65)
    assert len({*cache.kernels.table[second.row, :2].tolist()}) == 2 and (cache.kernels.table[0] == -1).all()
    cache.trim(second, 64)
    assert cache.free_pages == 3 and cache.kernels.table[second.row, 1] == -1


def test_copies_share_full_pages_and_own_the_last():
    cache, prompt = PagedCache(tiny_spec(), 3, 200), CacheEntry()
    cache.bind(prompt)
    cache.reserve(prompt, 100)
    cache.kernels.keys[prompt.pages] = 1.5
    copy = cache.fork(prompt, 70)
    assert copy.pages[0] == prompt.pages[0] and copy.pages[1] != prompt.pages[1] and copy.row == -1
    assert (cache.kernels.keys[copy.pages[1]] == 1.5).all() and cache.bytes_in_use == 3 * cache.page_bytes
    cache.release(prompt)
    assert cache.bytes_in_use == 2 * cache.page_bytes
    cache.bind(copy)
    assert cache.kernels.table[copy.row, :2].tolist() == copy.pages
    cache.release(copy)
    assert cache.bytes_in_use == 0 and cache.free_rows == 3


def test_a_recording_of_all_ranks_tells_what_drafts_ran(tmp_path):
    """The masked choice of a draft is a function of two facts: the whole ranking and the resident set."""
    ran: list[np.ndarray] = []

    def forward(*arguments, draft=None, **named):
        routings = bitslice.forward(*arguments, draft=draft, **named)
        if draft is not None:
            ran.extend(routings.experts)
        return routings

    backend = SimpleNamespace(**(vars(bitslice) | {"forward": forward}))
    options = EngineOptions(mode="elastic", fast_memory=0.3, draft_length=3, batch=3)
    reference, _ = Engine(READER, bitslice, options).generate(requests(0.8))
    with TraceRecorder(tmp_path / "t", READER.spec, all_ranks=True) as recorder:
        results, _ = Engine(READER, backend, replace(options, all_ranks=True)).generate(requests(0.8), recorder=recorder)
    assert results == reference
    trace = read_trace(tmp_path / "t")
    assert trace.header.ranks == READER.spec.experts
    ranked = trace.routing().astype(np.int32)[trace.column("phase") == "draft"]
    assert (np.sort(ranked, axis=2) == np.arange(READER.spec.experts)).all()
    packed = trace.table.column("resident").filter(trace.column("phase") == "draft").to_pylist()
    starts = [row for row, bits in enumerate(packed) if bits is not None]
    passes = iter(ran)
    for first, last in zip(starts, [*starts[1:], len(packed)], strict=True):
        resident = np.unpackbits(np.frombuffer(packed[first], np.uint8))[:24].reshape(3, 8).astype(bool)
        for layer in range(3):
            for expected, order in zip(next(passes), ranked[first:last, layer], strict=True):
                chosen = order[resident[layer][order]][: READER.spec.top_k]
                assert np.array_equal(np.sort(chosen), expected)
    assert next(passes, None) is None and len(starts) > 5
    with (
        pytest.raises(TraceError, match="takes 8 ranks"),
        TraceRecorder(tmp_path / "u", READER.spec, None, True) as recorder,
    ):
        Engine(READER, bitslice, options).generate(requests(0.8), recorder=recorder)
