"""Readers of files of others: inputs that once failed stay mended, and a minute of changed inputs finds nothing new.

Each target runs in a process with limits of time and memory, so that a crash is seen and its input is known.
"""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmoe.errors import ElmoeError
from elmoe.models import spec_of_config
from elmoe.store.reader import read_manifest
from elmoe.untrusted import load_json, load_yaml
from tests.fuzz.mutation import VALUES
from tests.fuzz.run import CORPUS, fuzz, replay, run_child
from tests.fuzz.targets import TARGETS

MINUTE = 60.0
"""Seconds of processor time of all targets, two at a time."""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


def test_every_target_has_a_corpus_of_small_inputs():
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == set(TARGETS)
    assert all(path.stat().st_size <= 8192 for path in files)


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_inputs_of_the_corpus_are_read_or_refused(target, tmp_path):
    files = sorted((CORPUS / target).iterdir())
    outcome = replay(target, files, tmp_path / "kept")
    assert not outcome.faults and outcome.inputs == len(files)


def test_a_minute_of_changed_inputs(tmp_path):
    outcome = fuzz(sorted(TARGETS), MINUTE / 2, tmp_path / "kept", seed=1)
    assert not outcome.faults and outcome.inputs >= 5 * len(TARGETS)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("raise", "ValueError at"), ("crash", "ended with -11"), ("memory", "growth|MemoryError"),
        ("hang", "ended with -27"), pytest.param("wait", "ended with -14", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_the_harness_sees_what_it_looks_for(tmp_path, monkeypatch, kind, told):
    (tmp_path / "input").write_text(kind)
    monkeypatch.setenv("ELMOE_FUZZ_SECONDS", "1" if kind in ("hang", "wait") else "60")
    outcome = run_child("selftest", tmp_path / "run", tmp_path / "kept", 60, 0, "--replay", str(tmp_path / "input"))
    (place,) = outcome.faults
    assert any(part in place for part in told.split("|"))
    assert [path.read_text() for path in (tmp_path / "kept").iterdir()] == [kind]


@settings(deadline=None, max_examples=60)
@given(JSON, st.data())
def test_json_of_any_shape_is_read_or_refused(tmp_path_factory, value, data):
    try:
        raw = json.dumps(value).encode("utf-8", "surrogatepass")
    except RecursionError:
        return
    folder = tmp_path_factory.mktemp("store")
    (folder / "manifest.json").write_bytes(raw)
    for read in (
        lambda: load_json(raw, "a.json", ElmoeError),
        lambda: read_manifest(folder),
        lambda: spec_of_config(value if isinstance(value, dict) else {"model_type": value}, "config.json"),
        lambda: load_yaml(raw.decode("utf-8", "replace"), "a.yaml", ElmoeError, "mend it"),
    ):
        try:
            read()
        except ElmoeError as error:
            assert len(str(error)) < 20_000
