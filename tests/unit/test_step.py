"""The step: what is scheduled, who shares what, who fails, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from threading import Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elmoe import bitslice, kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.kv_cache import CacheEntry, PagedCache
from elmoe.engine.options import EngineOptions
from elmoe.engine.passes import most_likely
from elmoe.engine.request import Request
from elmoe.engine.sequence import judge
from elmoe.engine.statistics import PhaseCounters
from elmoe.errors import BudgetError, RequestError
from elmoe.units import format_bytes
from tests.tiny import TinyReader, tiny_spec

READER = TinyReader(tiny_spec())
PAGE = 64 * READER.spec.kv_bytes_per_position
PLAIN = EngineOptions(mode="plain", keep_kv_digest=True)


def engine(**options) -> Engine:
    return Engine(READER, kernels, replace(PLAIN, **options))


def finish(one: Engine) -> dict:
    results = {}
    while one.has_work:
        results |= {(o.request, o.choice): o.result for o in one.step() if o.result is not None}
    return results


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), min_size=7, max_size=7), st.integers(1, 8))
def test_samples_stand_up_to_the_first_disagreement(draft, target, limit):
    samples = target[: len(draft) + 1]
    agreeing = next((i for i, (d, s) in enumerate(zip(draft, samples, strict=False)) if d != s), len(draft))
    stand, accepted = judge(draft, samples)
    assert stand == agreeing + 1
    assert accepted == [True] * agreeing + [False] * (agreeing < len(draft))
    cut, judged = judge(draft, samples, limit)
    assert cut == min(stand, limit) and judged == accepted[:limit]


def test_a_prompt_enters_in_chunks_while_others_decode():
    one = engine(batch=2, prefill_chunk=10)
    first = one.add(Request((1, 2, 3), 40, ignore_eos=True))
    assert one.step() == [] and len(one.step()) == 1  # the prompt, then a token
    second = one.add(Request(tuple(range(1, 62)), 5, ignore_eos=True))
    for _ in range(6):  # 60 positions: a token of the first beside every chunk
        assert [(output.request, len(output.tokens)) for output in one.step()] == [(first, 1)]
    assert {output.request for output in one.step()} == {first, second}
    assert one.statistics.phases["mixed"].steps == 6 and one.statistics.phases["mixed"].tokens == 66


def test_copies_compute_their_prompt_once_and_draw_by_their_index():
    prompt = tuple(range(1, 81))
    one = engine(batch=3)
    one.add(Request(prompt, 6, SamplingParameters(1.0, seed=4), ignore_eos=True, copies=3))
    results = finish(one)
    phases = one.statistics.phases
    assert phases["prefill"].tokens == 79 and phases["mixed"].tokens == 0  # there copies would compute it
    answers = [results[0, choice] for choice in range(3)]
    assert len({answer.tokens for answer in answers}) == 3
    for choice, answer in enumerate(answers):
        alone = engine().generate([Request(prompt, 6, SamplingParameters(1.0, seed=4, choice=choice), ignore_eos=True)])
        assert answer == alone[0][0]


def test_the_youngest_gives_way_when_pages_run_out_and_nothing_changes():
    requests = [Request(tuple(range(1 + i, 40 + i)), 60, ignore_eos=True) for i in range(3)]
    expected = engine().generate(requests)[0]
    one = engine(batch=3, kv_memory=4 * PAGE)
    for request in requests:
        one.add(request)
    results = finish(one)
    assert [results[number, 0] for number in range(3)] == expected
    assert (
        one.statistics.phases["prefill"].tokens + one.statistics.phases["mixed"].tokens > 3 * 38
    )  # positions computed again
    assert one.cache.free_pages == 4


def test_an_aborted_request_leaves_at_once_with_what_it_wrote():
    one = engine(batch=2)
    kept, gone = (one.add(Request((1, 2, seed), 20, ignore_eos=True)) for seed in (3, 4))
    for _ in range(4):
        one.step()
    one.abort(gone)
    assert one.cache.free_rows == 1
    outputs = {output.request: output for output in one.step()}
    assert (
        outputs[gone].result.finish == "aborted" and len(outputs[gone].result.tokens) == 3 == len(outputs[gone].tokens) + 3
    )
    results = finish(one)
    assert results[kept, 0] == engine().generate([Request((1, 2, 3), 20, ignore_eos=True)])[0][0]
    with pytest.raises(RequestError, match=f"no request {gone}"):
        one.abort(gone)
    with pytest.raises(RequestError, match="no request 99"):
        one.abort(99)


def test_more_of_the_cache_than_there_is_is_refused_by_its_size():
    one = engine(kv_memory=2 * PAGE)
    with pytest.raises(
        BudgetError, match=f"129 positions need {format_bytes(3 * PAGE)} .*{format_bytes(2 * PAGE)}"
    ) as caught:
        one.add(Request((1,), 128))
    assert "--kv-memory" in caught.value.hint
    one.add(Request((1,), 127))
    assert len(finish(one)) == 1


def test_counters_can_be_read_while_a_step_adds_to_them():
    """As a server's metrics do."""
    counters, one = PhaseCounters(), np.ones(3, np.int64)

    class Growing:
        def __matmul__(self, sizes):
            counters.count("lsb", one, one, sizes)
            return 7

    counters.count("msb", one, one, one)
    counters.slices["msb"].hits = counters.slices["msb"].misses = Growing()
    assert (counters.fast_bytes, set(counters.slices)) == (7, {"msb", "lsb"})
    del counters.slices["lsb"]
    assert (counters.slow_bytes, set(counters.slices)) == (7, {"msb", "lsb"})


def test_a_ceiling_below_one_page_is_refused():
    with pytest.raises(BudgetError, match=re.escape(f"one page of 64 positions, {format_bytes(PAGE)}")):
        engine(kv_memory=PAGE - 1)
    assert engine(kv_memory=PAGE).cache.pages == 1


@pytest.mark.parametrize("changes", [{"prefill_chunk": 0}, {"kv_memory": 0}])
def test_options_out_of_range_are_named(changes):
    with pytest.raises(RequestError, match=next(iter(changes))):
        engine(**changes)


@pytest.mark.parametrize("changes", [{"copies": 0}, {"copies": 65}, {"alternatives": -1}, {"alternatives": 21}])
def test_requests_out_of_range_are_named(changes):
    with pytest.raises(RequestError, match=next(iter(changes))):
        engine().add(replace(Request((1, 2)), **changes))


def test_one_thread_steps():
    one = engine()
    one.add(Request((1, 2), 2))
    inside, errors = [], []
    passes = one._passes.run

    def other() -> None:
        try:
            one.step()
        except RequestError as error:
            errors.append(error)

    def run(*arguments, **named):
        if not inside:
            inside.append(True)
            thread = Thread(target=other)
            thread.start()
            thread.join()
        return passes(*arguments, **named)

    one._passes.run = run
    finish(one)
    assert "another thread" in str(errors[0])


def test_a_closed_set_waits_for_nobody():
    one = engine()
    one.add(Request((1, 2), 3))
    with pytest.raises(RequestError, match="other requests"):
        one.generate([Request((1, 2), 2)])
    finish(one)
    assert one.generate([Request((1, 2), 2)])[0]


def test_a_run_that_is_left_early_leaves_nothing_behind():
    one = engine(batch=2)
    run = one.run([Request((1, 2, 3), 50, ignore_eos=True) for _ in range(4)])
    next(run), next(run)
    run.close()
    assert not one.has_work and one.cache.free_pages == one.cache.pages and one.cache.free_rows == 2
    assert one.generate([Request((1, 2, 3), 5)])[0] == engine().generate([Request((1, 2, 3), 5)])[0]


@pytest.mark.parametrize("backend", [bitslice, kernels])
def test_alternatives_are_the_likeliest_with_their_logprobs(backend):
    request = Request((1, 2, 3), 6, SamplingParameters(1.0, seed=1), ignore_eos=True, alternatives=97 and 20)
    (result,), _ = Engine(READER, backend, PLAIN).generate([request])
    greedy = Engine(READER, backend, PLAIN).generate([Request((1, 2, 3), 1)])[0][0]
    assert len(result.alternatives) == 6 and all(len(one) == 20 for one in result.alternatives)
    assert result.alternatives[0][0] == (greedy.tokens[0], greedy.logprobs[0])
    for token, logprob, likely in zip(result.tokens, result.logprobs, result.alternatives, strict=True):
        assert [value for _, value in likely] == sorted((value for _, value in likely), reverse=True)
        assert dict(likely).get(token, logprob) == logprob
    assert most_likely(np.zeros(97, np.float32), 3)[2][0] == 2


@pytest.mark.parametrize("option", ["batch", "draft_length", "draft_top_k", "prefill_chunk"])
def test_the_bounds_that_a_refusal_names_are_allowed(option):
    def check(value):
        replace(PLAIN, **{option: value}).check(READER.spec, False)

    with pytest.raises(RequestError, match=f"{option} is -1") as told:
        check(-1)
    least, most = map(int, re.search(r"allowed is (\d+)\.\.(\d+)", str(told.value)).groups())
    check(least)
    check(most)
    for value in (least - 1, most + 1):
        with pytest.raises(RequestError, match=f"{option} is {value}, allowed is {least}..{most}"):
            check(value)


def test_a_draft_of_one_token_is_drafted():
    requests = [Request((1, 2, 3), 12, ignore_eos=True)]
    plain, _ = engine().generate(requests)
    drafting, statistics = engine(mode="elastic", draft_length=1).generate(requests)
    assert drafting == plain and 0 < statistics.drafted <= 12
    assert statistics.verifications == statistics.drafted  # one token each
    assert statistics.verified == statistics.verifications + statistics.accepted


def test_a_row_of_the_table_holds_so_many_pages_and_no_more():
    cache = PagedCache(READER.spec, 1, 128, pages=8)
    entry = CacheEntry()
    cache.bind(entry)
    cache.reserve(entry, 64)
    with pytest.raises(BudgetError, match="no page left"):
        cache.reserve(entry, 192)
    assert len(entry.pages) == 1 and cache.free_pages == 7
