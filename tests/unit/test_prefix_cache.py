"""Texts that begin alike are computed once: the same answers and bytes, no page lost, room given up when it is needed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.fitting import Fitting
from elmoe.engine.kv_cache import CacheEntry, PagedCache
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request, Result
from elmoe.errors import BudgetError, RequestError
from elmoe.store import open_direct
from elmoe.store.synthetic import synthesize
from elmoe.trace import TraceRecorder, read_trace
from tests.tiny import TinyReader, tiny_spec

SPEC = tiny_spec(max_positions=600)
READER = TinyReader(SPEC)
PAGE = 64 * SPEC.kv_bytes_per_position
OPTIONS = EngineOptions(mode="plain", keep_kv_digest=True, prefix_cache=True)
TEXT = tuple(np.random.default_rng(0).integers(1, 97, 400).tolist())


def alone(request: Request) -> list[Result]:
    return Engine(READER, kernels, replace(OPTIONS, prefix_cache=False)).generate([request])[0]


def ask(prompt, tokens: int = 5, **changes) -> Request:
    return Request(tuple(prompt), tokens, SamplingParameters(0.8, seed=1), ignore_eos=True, **changes)


def test_a_prompt_that_was_computed_is_not_computed_again():
    engine = Engine(READER, kernels, OPTIONS)
    for prompt, cached in ((TEXT[:200], 0), (TEXT[:200], 192), (TEXT[:129], 128), (TEXT[:128], 64), (TEXT[:300], 192),
                           (TEXT[:100] + (1, 2) * 60, 64), ((1, *TEXT[:200]), 0), (TEXT[:20], 0)):  # fmt: skip
        results, statistics = engine.generate([ask(prompt)])
        assert results == alone(ask(prompt)) and results[0].cached_tokens == cached
        assert statistics.cached_tokens == cached and statistics.prompt_tokens == len(prompt)
        assert statistics.phases["prefill"].tokens == len(prompt) - 1 - cached
    assert engine.cache.bytes_in_use == engine.cache.bytes_resting > 0
    assert engine.cache.free_pages == engine.cache.pages


@pytest.mark.parametrize("mode", ["plain", "elastic"])
def test_a_chat_that_returns_finds_its_answers_too(mode):
    """Drafts wrote in the pages of the answer before verification did: what is kept are the target's bytes."""
    options = replace(OPTIONS, mode=mode, fast_memory=0.3, draft_length=4)
    engine, text = Engine(READER, kernels, options), TEXT[:70]
    for turn in range(4):
        (result,), statistics = engine.generate([ask(text, 50)])
        assert [result] == alone(ask(text, 50))
        assert result.cached_tokens == (len(TEXT[:70]) + 62 * turn - 13) // 64 * 64 if turn else result.cached_tokens == 0
        assert mode == "plain" or statistics.rejected > 0
        text = (*text, *result.tokens, *TEXT[turn * 12 : turn * 12 + 12])


def test_those_who_come_together_share_what_the_first_computes():
    requests = [ask(TEXT[: 260 + 7 * i]) for i in range(5)]
    for batch, chunk, second in ((5, 256, 256), (3, 100, 192)):  # of 100, the second begins beside the end of the first
        engine = Engine(READER, kernels, replace(OPTIONS, batch=batch, prefill_chunk=chunk))
        results, statistics = engine.generate(requests)
        assert results == [result for request in requests for result in alone(request)]
        assert [result.cached_tokens for result in results] == [0, second, 256, 256, 256]
        assert statistics.cached_tokens == second + 3 * 256
        assert statistics.phases["prefill"].tokens + statistics.phases["mixed"].tokens < 450


def test_copies_go_on_sharing():
    engine = Engine(READER, kernels, replace(OPTIONS, batch=4))
    request = ask(TEXT[:193], 70, copies=3)
    expected = alone(request)
    for cached in (0, 192):
        results, statistics = engine.generate([request])
        assert results == expected and [result.cached_tokens for result in results] == [cached] * 3
        assert statistics.prompt_tokens == 193 and statistics.cached_tokens == cached
    assert engine.cache.bytes_in_use == engine.cache.bytes_resting
    engine.cache.forget_prefixes()
    assert engine.cache.bytes_in_use == 0


def test_pages_that_rest_are_given_up_for_those_who_run_the_oldest_first():
    engine = Engine(READER, kernels, replace(OPTIONS, kv_memory=7 * PAGE))
    first, second, long = TEXT[:130], TEXT[130:270], TEXT[:350]
    assert [engine.generate([ask(p)])[0][0].cached_tokens for p in (first, second, first)] == [0, 0, 128]
    assert engine.cache.bytes_resting == 4 * PAGE
    results = engine.generate([ask(long)])[0]  # takes six pages, of which two are there, three free, and one is the second's
    assert results == alone(ask(long)) and results[0].cached_tokens == 128
    assert engine.generate([ask(second)])[0][0].cached_tokens == 64, "its last page went first"
    assert engine.cache.free_pages == engine.cache.pages == 7


def test_bytes_are_a_ceiling_of_what_rests():
    engine = Engine(READER, kernels, replace(OPTIONS, prefix_cache=2 * PAGE))
    engine.generate([ask(TEXT[:390])])
    assert engine.cache.bytes_resting == 2 * PAGE == engine.cache.bytes_in_use
    assert engine.generate([ask(TEXT[:390])])[0][0].cached_tokens == 128, "the beginning is kept longest"
    with pytest.raises(BudgetError, match=f"one page of the KV cache, {PAGE} bytes"):
        Engine(READER, kernels, replace(OPTIONS, prefix_cache=PAGE - 1))
    with pytest.raises(RequestError, match="prefix_cache is -1"):
        Engine(READER, kernels, replace(OPTIONS, prefix_cache=-1))
    off = Engine(READER, kernels, replace(OPTIONS, prefix_cache=0))
    assert [off.generate([ask(TEXT[:100])])[0][0].cached_tokens for _ in range(2)] == [0, 0]
    assert off.cache.bytes_in_use == 0


def test_who_gives_way_finds_his_pages_again_and_they_do_not_count_as_cached():
    requests = [ask(TEXT[60 * i : 60 * i + 100], 100) for i in range(3)]
    engine = Engine(READER, kernels, replace(OPTIONS, batch=3, kv_memory=7 * PAGE))
    found, adopt = [], engine.cache.adopt
    engine.cache.adopt = lambda *arguments: found.append(adopt(*arguments)) or found[-1]
    results, statistics = engine.generate(requests)
    assert results == [result for request in requests for result in alone(request)]
    assert any(found) and statistics.cached_tokens == 0 and [result.cached_tokens for result in results] == [0] * 3
    assert engine.cache.free_pages == 7


def test_an_enforced_budget_holds_with_prefixes(tmp_path):
    synthesize(tmp_path / "store", tiny_spec(max_positions=600, experts=16, expert_width=512), seed=1)
    options = EngineOptions(prefix_cache=True, batch=2, draft_length=2, staging_experts=4)
    with open_direct(tmp_path / "store") as reader:
        budget = Fitting(reader, options).sizes_beside(0).minimum + 16 * PAGE
        engine, cached, totals = Engine(reader, kernels, replace(options, fast_memory=budget)), 0, []
        for first in (0, 0, 50, 90, 0, 50, 150, 200):
            results, _ = engine.generate([ask(TEXT[first : first + 130]), ask(TEXT[first : first + 110])])
            cached += sum(result.cached_tokens for result in results)
            totals.append(reader.dense_bytes + engine.cache.bytes_touched + engine.tier.arena.capacity)
        assert cached > 100 and budget - 2 * PAGE < max(totals) <= budget
        assert 0 < engine.cache.bytes_resting <= engine.fitting.prefix_pages * PAGE < engine.cache.pages * PAGE


def test_a_recording_computes_every_position(tmp_path):
    engine = Engine(READER, kernels, OPTIONS)
    engine.generate([ask(TEXT[:200])])
    with TraceRecorder(tmp_path / "trace", SPEC) as recorder:
        results, _ = engine.generate([ask(TEXT[:200])], recorder=recorder)
    assert results[0].cached_tokens == 0 and engine.generate([ask(TEXT[:200])])[0][0].cached_tokens == 192
    assert (read_trace(tmp_path / "trace").column("phase") == "prefill").sum() == 199


def test_pages_of_random_texts_are_counted_right():
    """Against a plain account: who holds what; a page that is known holds its tokens; none is lost."""
    rng = np.random.default_rng(5)
    cache, texts, entries = PagedCache(SPEC, 6, 600, 24, resting=9), {}, []
    content: dict[int, tuple[int, ...]] = {}
    for _ in range(3000):
        if len(entries) < 6 and rng.random() < 0.5:
            text = tuple(rng.integers(0, 2, 6).repeat(64).tolist())[: int(rng.integers(30, 384))]
            entry = CacheEntry()
            cache.bind(entry)
            found = cache.adopt(entry, text, len(text) - 1)
            assert found == 64 * len(entry.pages) < len(text)
            assert all(content[page] == text[: 64 * (i + 1)] for i, page in enumerate(entry.pages))
            texts[entry] = text
            entries.append(entry)
        elif entries:
            entry = entries[int(rng.integers(len(entries)))]
            text, held = texts[entry], len(entry.pages)
            if rng.random() < 0.6 and held * 64 < len(text) and cache.free_pages:
                cache.reserve(entry, min(len(text), 64 * held + 64))
                content[entry.pages[held]] = text[: 64 * held + 64]
                cache.keep(entry, text, min(len(text) - 1, 64 * held + 64))
            else:
                cache.release(entry)
                entries.remove(entry)
                assert entry.known == 0
        held = {page for entry in entries for page in entry.pages}
        assert cache.bytes_in_use - cache.bytes_resting == len(held) * cache.page_bytes
        assert cache.free_pages == 24 - len(held) and cache.bytes_resting <= 9 * cache.page_bytes
        for entry in entries:
            assert cache.kernels.table[entry.row, : len(entry.pages)].tolist() == entry.pages
    for entry in entries:
        cache.release(entry)
    cache.forget_prefixes()
    assert cache.bytes_in_use == 0 and cache.free_pages == 24 and not cache._prefixes._key and not cache._prefixes._page


def test_what_a_request_found_and_lost_before_it_began_is_not_counted():
    """It waits with pages that it found, and gives them to one that runs."""
    engine = Engine(READER, kernels, replace(OPTIONS, batch=2, kv_memory=5 * PAGE))
    engine.generate([ask(TEXT[:193], 1)])
    asked, results = [ask(TEXT[200:260], 200), ask(TEXT[:250], 20)], {}
    engine.add(asked[0])
    while not results or engine.has_work:
        results |= {output.request - 1: output.result for output in engine.step() if output.result is not None}
        if engine.statistics.committed == 10:
            engine.add(asked[1])
    assert [results[index] for index in range(2)] == [result for request in asked for result in alone(request)]
    statistics = engine.statistics
    assert statistics.prompt_tokens == 60 + 250
    assert statistics.cached_tokens == sum(result.cached_tokens for result in results.values()) < 192
    assert statistics.phases["prefill"].tokens == 59 + 249 - statistics.cached_tokens
