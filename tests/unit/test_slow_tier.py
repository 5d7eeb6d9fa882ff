"""Stores that are read and not mapped: evaluation, file systems that refuse direct reads, files that shrink."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from elmoe.cli.main import cli
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import BudgetError, ElmoeError, RequestError, StoreError
from elmoe.llm import load
from elmoe.measure.perplexity import STRETCH, evaluate
from elmoe.opening import HEADROOM, _choose_reader
from elmoe.store.synthetic import synthesize
from tests.descriptors import open_below
from tests.tiny import tiny_spec

TEXT = "The whale was white, and the sea was not. " * 20


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("slow") / "store"
    synthesize(path, tiny_spec(vocabulary=300, layers=4, experts=STRETCH + 3, top_k=3, dense_layers=(1,)))
    return path


@pytest.mark.parametrize("share", [1.0, 0.4])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_evaluation_of_a_store_on_disk_is_that_of_one_in_memory(store, backend, share):
    windows = 2 if backend == "native" else 1
    results = []
    for reader in ("memory", "direct"):
        with load(store, backend=backend, reader=reader) as model:
            results.append(evaluate(model, TEXT, 40, windows, share))
    assert results[0] == results[1] and np.isfinite(results[0].draft_nats)


def test_evaluation_names_a_file_that_shrinks(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    with load(tmp_path / "store", reader="direct") as model:
        os.truncate(tmp_path / "store" / "layer-002.experts", 4096)
        with pytest.raises(StoreError, match=r"layer-002\.experts"):
            evaluate(model, TEXT, 40, 1)


def test_a_mapped_file_that_has_shrunk_is_named_before_work(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    with load(tmp_path / "store", reader="memory") as model:
        os.truncate(tmp_path / "store" / "layer-002.experts", 4096)
        with pytest.raises(StoreError, match=r"layer-002\.experts' has 4096 bytes"):
            model.engine.generate([Request((5, 6), 3)])
        with pytest.raises(StoreError, match=r"layer-002\.experts' has 4096 bytes"):
            evaluate(model, TEXT, 40, 1)


SHRINKS_BETWEEN_STEPS = """
import os, sys
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import StoreError
from elmoe.llm import load

with load(sys.argv[1], EngineOptions(mode="plain"), reader="memory") as model:
    try:
        for count, _ in enumerate(model.engine.run([Request((5, 6), 40)])):
            if count == 3:
                for layer in (0, 2, 3):
                    os.truncate(f"{sys.argv[1]}/layer-{layer:03d}.experts", 4096)
    except StoreError as error:
        print(error)
"""


def test_a_mapped_file_that_shrinks_during_a_run_is_named_and_no_crash(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    command = [sys.executable, "-c", SHRINKS_BETWEEN_STEPS, str(tmp_path / "store")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.returncode
    assert "layer-000.experts' has 4096 bytes" in run.stdout


def test_a_mapped_file_that_is_replaced_by_renaming_stays(store, tmp_path):
    shutil.copytree(store, tmp_path / "store")
    with load(tmp_path / "store", reader="memory") as model:
        expected = model.engine.generate([Request((5, 6), 3)])[0]
        (tmp_path / "short").write_bytes(b"x")
        os.replace(tmp_path / "short", tmp_path / "store" / "layer-002.experts")
        assert model.engine.generate([Request((5, 6), 3)])[0] == expected


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("when", ["open", "read"])
def test_a_file_system_that_refuses_direct_reads_is_read_through_the_page_cache(store, tmp_path, monkeypatch, when, code):
    shutil.copytree(store, tmp_path / "store")
    options = EngineOptions(fast_memory=1 << 30)
    with load(store, options, reader="memory") as model:
        expected = model.engine.generate([Request((5, 6, 7), 8)])[0]
    real_open, real_preadv = os.open, os.preadv

    def refuse_open(path, flags, *more, **named):
        if flags & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real_open(path, flags, *more, **named)

    def refuse_read(handle, buffers, offset, *more):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(code, os.strerror(code))
        return real_preadv(handle, buffers, offset, *more)

    monkeypatch.setattr(os, when if when == "open" else "preadv", refuse_open if when == "open" else refuse_read)
    with load(tmp_path / "store", options, reader="direct") as model:
        assert "this file system refuses O_DIRECT" in model.tier
        assert [one.tokens for one in model.engine.generate([Request((5, 6, 7), 8)])[0]] == [one.tokens for one in expected]
    assert open_below(tmp_path) == []


def test_another_error_of_the_disk_is_told(store, monkeypatch):
    def refuse(*more):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(ElmoeError, match=r"'dense\.bin' cannot be opened: Input/output error"):
        load(store, reader="direct")


def test_inspect_tells_the_smallest_budget_that_serves(store):
    done = CliRunner().invoke(cli, ["inspect", str(store), "--json"])
    least = json.loads(done.output)["minimum_fast_memory"]
    with load(store, EngineOptions(fast_memory=least), reader="direct") as model:
        assert len(model.engine.generate([Request((5, 6, 7), 60)])[0][0].tokens) >= 1
    with pytest.raises(BudgetError, match=f"budget of {least - 1:,} bytes is below the minimum of {least:,} bytes "):
        load(store, EngineOptions(fast_memory=least - 1), reader="direct").engine.generate([Request((5, 6, 7), 60)])


@pytest.mark.parametrize("reader", ["memory", "direct"])
def test_a_load_that_is_refused_leaves_no_file_open(store, tmp_path, reader):
    shutil.copytree(store, tmp_path / "store")
    with pytest.raises(RequestError, match="draft_top_k is 9"):
        load(tmp_path / "store", EngineOptions(draft_top_k=9), reader=reader)
    assert open_below(tmp_path) == []


def test_further_engines_on_an_open_model_have_caches_of_their_own(store):
    with load(store, reader="memory") as model:
        other = model.new_engine(EngineOptions(mode="plain", batch=1))
        answer = model.generate([5, 6, 7], max_tokens=8, ignore_eos=True)
        request = Request((5, 6, 7), 8, ignore_eos=True)
        (result,), _ = other.generate([request])
        assert (result.tokens, model.text_of(request, result)) == (answer.token_ids, answer.text)
        assert other.cache is not model.engine.cache and model.engine.options.batch == 16


def test_the_choice_of_the_reader_leaves_room_for_everything_else():
    available = 8 << 30
    for more, kind in ((0, "memory"), (1, "direct")):
        assert _choose_reader(EngineOptions(), available - HEADROOM + more, available) == kind
    assert _choose_reader(EngineOptions(fast_memory=1 << 20), 1, available) == "direct"
    assert _choose_reader(EngineOptions(fast_memory=0.5), 1, available) == "memory"


def test_direct_reads_are_tried_at_the_begin_of_pages(store, monkeypatch):
    offsets, real = [], os.preadv

    def preadv(handle, buffers, offset, *more):
        offsets.append(offset)
        return real(handle, buffers, offset, *more)

    monkeypatch.setattr(os, "preadv", preadv)
    with load(store, reader="direct"):
        assert offsets and all(offset % 4096 == 0 for offset in offsets)
