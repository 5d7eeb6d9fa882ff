"""The synthesiser: it has the locality it was given, the fit finds it again, and a published popularity is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from time import process_time

import numpy as np
import pytest

from elmoe.errors import TraceError
from elmoe.trace import Locality, RoutingFacts, fit_locality, load_locality, save_locality, synthesise
from elmoe.trace import fit as fit_module
from elmoe.trace import locality as locality_module
from elmoe.trace import synthesis as synthesis_module
from elmoe.trace.fit import lru_hit_rate
from elmoe.trace.locality import FILE_LIMIT, measured
from elmoe.trace.synthesis import calibrated_scores


def locality(**changes: object) -> Locality:
    values: dict = dict(popularity=0.5, sequence=0.4, token=0.55, correlation=0.8, source="a test")
    return Locality(**(values | changes))


def made(sequences: int = 8, positions: int = 64, seed: int = 1, **changes: object) -> RoutingFacts:
    return synthesise(locality(**changes), 32, 4, 3, sequences, positions, seed)


def test_statistics_of_known_facts():
    ranked = np.zeros((2, 3, 1, 2), np.uint16)
    ranked[0, :, 0] = [[0, 1], [1, 2], [2, 3]]
    ranked[1, :, 0] = [[0, 1], [0, 1], [0, 1]]
    counts = np.array([3, 2], np.int32)
    facts = RoutingFacts(ranked, np.ones(2, np.int32), counts, 4, 1 + 1, "a test")
    found = measured(facts)  # uses: 0 three times, 1 four, 2 two, 3 once
    assert found["hottest 25 %"] == pytest.approx(4 / 10) and found["hottest 50 %"] == pytest.approx(7 / 10)
    assert found["hottest 10 %"] == pytest.approx(0.4 * 4 / 10)
    assert found["reuse at 1"] == pytest.approx((1 + 1 + 2) / (3 * 2)) and "reuse at 4" not in found
    assert found["distinct in 2"] == pytest.approx((2 + 3) / (2 * 4)) and "distinct in 4" not in found


def test_the_same_seed_gives_the_same_facts_and_prefixes_agree():
    facts = made()
    assert np.array_equal(facts.ranked, made().ranked) and not np.array_equal(facts.ranked, made(seed=2).ranked)
    assert np.array_equal(facts.ranked[:3, :20], made(sequences=3, positions=20).ranked)
    assert facts.ranked.shape == (8, 64, 3, 8) and facts.source.startswith("synthetic: 8 x 64") and facts.top_k == 4
    everything = synthesise(locality(), 32, 4, 3, 8, 64, 1, ranks=32)
    assert np.array_equal(everything.ranked[..., :8], facts.ranked)


def test_blocks_and_sampled_layers_bound_memory(monkeypatch):
    facts, all_layers = made(), measured(made())
    monkeypatch.setattr(synthesis_module, "BLOCK", 3 * 64 * 32)
    assert np.array_equal(facts.ranked, made().ranked)
    monkeypatch.setattr(locality_module, "MAX_MARKS", 2 * 8 * 64 * 32)
    assert measured(facts) == measured(replace(facts, ranked=facts.ranked[:, :, [0, 1]].copy())) != all_layers


def test_each_parameter_does_what_its_name_says():
    """More correlation or persistence: more reuse, more LRU hits. More popularity: hotter experts, fewer distinct ones."""
    for name, values in (("correlation", (0.1, 0.5, 0.9)), ("token", (0.1, 0.5, 0.9)), ("sequence", (0.0, 0.4, 0.8))):
        rows = [made(**{name: value} | ({"sequence": 0.3} if name == "token" else {})) for value in values]
        reuse = [measured(facts)["reuse at 1"] for facts in rows]
        hits = [lru_hit_rate(facts, 0.25) for facts in rows]
        assert reuse == sorted(reuse) and hits == sorted(hits) and reuse[2] > reuse[0] + 0.05, name
    rows = [measured(made(popularity=value)) for value in (0.0, 0.5, 1.5)]
    hot, distinct = ([row[name] for row in rows] for name in ("hottest 10 %", "distinct in 8"))
    assert hot == sorted(hot) and distinct == sorted(distinct, reverse=True)
    decay = measured(made(correlation=0.9, token=0.8))
    assert decay["reuse at 1"] > decay["reuse at 4"] > decay["reuse at 16"]
    pure = measured(made(popularity=0.0, sequence=0.0, token=0.0, positions=200))
    assert pure["reuse at 1"] == pytest.approx(4 / 32, abs=0.01)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(locality(), marks=pytest.mark.full),
        locality(popularity=1.0, sequence=0.2, token=0.8, correlation=0.85),
    ],
    ids=["even", "skewed"],
)
def test_the_fit_finds_the_parameters_it_was_made_with(given):
    facts = synthesise(given, 32, 4, 4, 16, 96, 77)
    found = fit_locality(facts)
    assert found.popularity == pytest.approx(given.popularity, abs=0.1)
    assert found.sequence == pytest.approx(given.sequence, abs=0.12)
    assert found.token == pytest.approx(given.token, abs=0.15)
    assert found.correlation == pytest.approx(given.correlation, abs=0.12)
    assert all(abs(row.relative_error) < 0.05 for row in found.fit)
    assert [row.name for row in found.check] == ["LRU hits at 25%", "LRU hits at 50%"]
    assert all(abs(row.relative_error) < 0.06 for row in found.check)
    assert found.status == "derived" and found.shape.positions == 96 and len(found.fit) == 10


def test_a_fit_is_repeatable_and_takes_ragged_or_single_sequences():
    facts = made(sequences=5, positions=30)
    ragged = replace(facts, lengths=np.array([30, 12, 25, 7, 3], np.int32), prompts=np.array([4, 1, 9, 2, 1], np.int32))
    assert fit_locality(ragged) == fit_locality(ragged)
    assert [row.name for row in fit_locality(ragged).fit if row.name.startswith("distinct")] == [
        "distinct in 2",
        "distinct in 4",
    ]
    assert fit_locality(made(sequences=1)).sequence == 0
    with pytest.raises(TraceError, match="two decoded"):
        fit_locality(made(positions=1))
    with pytest.raises(TraceError, match="no locality"):
        fit_locality(synthesise(locality(), 4, 4, 1, 2, 8, 0))


def test_more_layers_than_a_try_holds_are_sampled(monkeypatch):
    monkeypatch.setattr(fit_module, "MAX_VALUES", 8 * 64 * 32)
    assert fit_locality(made()).popularity == pytest.approx(0.5, abs=0.15)


def test_it_is_fast():
    seconds = []
    for _ in range(3):
        began = process_time()
        synthesise(locality(), 128, 8, 8, 16, 96, 0)
        seconds.append(process_time() - began)
    assert min(seconds) < 1


@pytest.mark.parametrize(("experts", "top_k"), [(64, 6), (8, 2)])
def test_a_given_popularity_is_kept(experts, top_k):
    rng = np.random.default_rng(3)
    popularity = rng.lognormal(0, 0.8, (2, experts)) if experts > 8 else rng.uniform(0.8, 1.2, (2, experts))
    popularity[0, 0] = popularity[0].sum() * 2  # in demand for every token, and more
    facts = synthesise(locality(), experts, top_k, 2, 200, 20, 5, popularity=popularity)
    use = np.stack([np.bincount(facts.chosen[:, :, layer].ravel(), minlength=experts) for layer in range(2)]) / 4000
    assert use[0, 0] > 0.99
    wanted = top_k * popularity[1] / popularity[1].sum()
    assert np.abs(use[1] / wanted - 1).mean() < 0.08 and np.abs(use[1] - wanted).max() < 0.06
    rest = popularity[0, 1:] / popularity[0, 1:].sum() * (top_k - 1)
    assert np.abs(use[0, 1:] - rest).max() < 0.06


def test_impossible_sizes_are_refused():
    for arguments, message in (
        ((8, 9, 1, 1, 1, 0), "top 9"),
        ((8, 0, 1, 1, 1, 0), "top 0"),
        ((8, 2, 0, 1, 1, 0), "0 layers"),
        ((8, 2, 1, 1, 1, -1), "seed -1"),
        ((65536, 2, 1, 1 << 12, 1 << 12, 0), "memory"),
    ):
        with pytest.raises(TraceError, match=message):
            synthesise(locality(), *arguments)
    with pytest.raises(TraceError, match="prompt 9"):
        synthesise(locality(), 8, 2, 1, 1, 4, 0, prompt=9)
    with pytest.raises(TraceError, match="2 layers x 8"):
        calibrated_scores(np.ones((1, 8)), 2, 8, 2)
    for bad in (np.full((1, 8), np.nan), -np.ones((1, 8)), np.eye(8)[:1]):
        with pytest.raises(TraceError, match="a layer's popularity"):
            calibrated_scores(bad, 1, 8, 2)
    assert not calibrated_scores(np.ones((1, 2)), 1, 2, 2).any()


def test_files(tmp_path):
    path = tmp_path / "fit.json"
    found = fit_locality(made(sequences=2, positions=20))
    save_locality(found, path)
    assert load_locality(path) == found and [file.name for file in tmp_path.iterdir()] == ["fit.json"]
    whole = json.loads(path.read_text())
    for changes, message in (
        ({"popularity": -1}, "popularity is -1"),
        ({"token": 1.5}, "token is 1.5"),
        ({"token": 0.8, "sequence": 0.8}, "more than 1"),
        ({"correlation": "x"}, "no locality"),
        ({"more": 1}, "unknown field"),
        ({"version": 7}, "version 7"),
        ({"status": "guessed"}, "status"),
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(TraceError, match=message):
            load_locality(path)
    path.write_text("{")
    with pytest.raises(TraceError, match="no locality"):
        load_locality(path)
    path.write_bytes(b" " * (FILE_LIMIT + 1))
    with pytest.raises(TraceError, match="larger than"):
        load_locality(path)
    with pytest.raises(TraceError, match="there is no locality 'nothing'"):
        load_locality("nothing")
    with pytest.raises(TraceError, match="cannot read"):
        load_locality(tmp_path)
    with pytest.raises(TraceError, match="cannot write"):
        save_locality(found, tmp_path / "missing" / "x")


@pytest.mark.parametrize("name", ["mt_bench", "gsm8k", "alpaca", "humaneval"])
def test_presets_say_where_they_come_from_and_fit(name):
    preset = load_locality(name)
    assert preset.status == "derived" and "store demo, prompts" in preset.source
    assert all(abs(row.relative_error) < 0.11 for row in (*preset.fit, *preset.check))
    facts = synthesise(preset, 64, 4, 8, 16, 96, 5)
    for row in preset.fit:
        assert measured(facts)[row.name] == pytest.approx(row.measured, rel=0.12)
