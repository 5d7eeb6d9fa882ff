"""Layers with a window: their pages are bounded, given back, shared and hashed; drafts and prompts cross their edges."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.cache_layout import PAGE_POSITIONS, layout_of
from elmoe.engine.engine import Engine
from elmoe.engine.fitting import Fitting
from elmoe.engine.kv_cache import CacheEntry, PagedCache
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.store import open_direct
from elmoe.store.synthetic import synthesize
from tests.schedules import windowed_spec
from tests.tiny import TinyReader, tiny_spec


def windowed(windows, **changes):
    """A tiny model whose layers have these windows, None for none."""
    spec = tiny_spec(layers=len(windows), **changes)
    layers = tuple(
        msgspec.structs.replace(layer, attention=msgspec.structs.replace(layer.attention, window=window, sinks=True))
        for layer, window in zip(spec.layers, windows, strict=True)
    )
    return msgspec.structs.replace(spec, layers=layers)


@pytest.mark.parametrize(
    ("windows", "groups", "layers"),
    [([None] * 3, 1, 3), ([20] * 3, 1, 3), ([20, None] * 2, 2, 2), ([None, None, 20], 3, 1), ([9, None, 20, None], 4, 1)],
)
def test_layers_of_a_kind_share_pages(windows, groups, layers):
    spec = windowed(windows)
    layout = layout_of(spec)
    assert (layout.groups, layout.layers) == (groups, layers)
    assert layout.page_bytes * groups == PAGE_POSITIONS * spec.kv_bytes_per_position
    if layout.places is None:
        return
    assert len({tuple(place) for place in layout.places.tolist()}) == len(windows)
    assert [layout.windows[group] for group in layout.places[:, 0]] == windows


def test_pages_of_windows_are_bounded_at_4000_positions():
    """As many pages as window, chunk and draft need, while layers without one keep all."""
    spec = windowed([100, None] * 2, max_positions=4096)
    reader, chunk = TinyReader(spec), 48
    engine = Engine(reader, kernels, EngineOptions(mode="elastic", batch=1, prefill_chunk=chunk, draft_length=8))
    engine.add(Request(tuple(int(token) for token in np.random.default_rng(0).integers(1, 97, 3950)), 50, ignore_eos=True))
    cache, most = engine.cache, 0
    bound = -(-(100 - 1 + chunk) // PAGE_POSITIONS) + 1
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running:
            held = [page for page in sequence.entry.pages[:: cache.layout.groups] if page >= 0]
            most = max(most, len(held))
            length = sequence.computed
            assert cache.bytes_in_use <= cache.page_bytes * (bound + -(-(length + 9) // PAGE_POSITIONS))
    assert 2 <= most <= bound and engine.statistics.drafted > 0
    assert cache.free_pages == cache.pages and cache.layout.pages(4000, chunk) == bound + 63


def requests():
    rng = np.random.default_rng(3)
    lengths = (1, 15, 63, 64, 65, 130, 200)
    sampling = [SamplingParameters(), SamplingParameters(0.8, seed=4)]
    return [
        Request(tuple(rng.integers(1, 97, n).tolist()), 70, sampling[i % 2], ignore_eos=True, copies=1 + (n == 130))
        for i, n in enumerate(lengths)
    ]


@pytest.mark.parametrize("windows", [(3, None, 3), (17, 64, None), (70, 70, 70)], ids=str)
def test_every_mode_gives_the_plain_output(windows):
    """Windows shorter than a draft, of a page, and longer; pages so few that sequences are computed again."""
    reader = TinyReader(windowed(windows), seed=3)
    plain = EngineOptions(mode="plain", keep_kv_digest=True)
    reference, _ = Engine(reader, kernels, plain).generate(requests())
    page = reader.spec.kv_bytes_per_position * PAGE_POSITIONS
    for options in (
        EngineOptions(mode="plain", batch=3, prefill_chunk=5),
        EngineOptions(mode="elastic", fast_memory=0.4, draft_length=8, batch=4),
        EngineOptions(mode="elastic", fast_memory=1.0, draft_length=5, draft_bits=8, batch=2, prefill_chunk=33),
        EngineOptions(mode="elastic", fast_memory=0.6, draft_length=2, batch=5, kv_memory=9 * page),
    ):
        engine = Engine(reader, kernels, replace(options, keep_kv_digest=True))
        assert engine.generate(requests())[0] == reference, options
        assert engine.cache.free_pages == engine.cache.pages
    few = requests()[:3]
    expected = Engine(reader, kernels, plain).generate(few)[0]
    assert Engine(reader, bitslice, replace(plain, batch=3)).generate(few)[0] == expected


def test_a_fork_shares_what_the_window_left():
    cache = PagedCache(windowed([10, None]), 2, 512)
    entry = CacheEntry()
    cache.bind(entry)
    cache.reserve(entry, 300)
    cache.forget(entry, 300)
    assert entry.pages[0:8:2] == [-1] * 4 and min(entry.pages[1::2]) >= 0 and entry.pages[8] >= 0
    used = cache.bytes_in_use
    copy = cache.fork(entry, 300)
    assert cache.bytes_in_use == used + 2 * cache.page_bytes and copy.pages[:8] == entry.pages[:8]
    cache.release(copy)
    cache.release(entry)
    assert cache.free_pages == cache.pages and (cache.kernels.table == -1).all()


def test_drafts_keep_within_the_share_of_the_cache(tmp_path, monkeypatch):
    """A draft takes pages of all groups of layers, behind the plan that gave the rest of the budget to slices."""
    synthesize(tmp_path / "store", windowed_spec())
    with open_direct(tmp_path / "store") as reader:
        engine = Engine(reader, kernels, EngineOptions(batch=4, fast_memory=600_000, draft_length=6))
        cache, manager, grown = engine.cache, engine._manager, []
        grow = engine.scheduler.grow

        def watched(sequence, positions):
            found = grow(sequence, positions)
            grown.append(cache.bytes_touched - manager._sizes.kv)
            return found

        monkeypatch.setattr(engine.scheduler, "grow", watched)
        prompts = [np.random.default_rng(seed).integers(6, 95, 50 + 5 * seed).tolist() for seed in range(4)]
        engine.generate([Request(tuple(prompt), 150, ignore_eos=True) for prompt in prompts])
    assert len(grown) > 100 and max(grown) <= 0


def test_no_room_is_set_aside_for_prefixes_that_windows_do_not_leave():
    reader = TinyReader(windowed_spec())
    pages = {
        kept: Fitting(reader, EngineOptions(batch=2, kv_memory=64 << 20, prefix_cache=kept)).cache_pages
        for kept in (False, True)
    }
    assert pages[True] == pages[False] < (64 << 20) // layout_of(reader.spec).page_bytes
