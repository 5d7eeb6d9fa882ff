"""Localities of models: they give what was published, held-out numbers too; what is wrong in a file of points is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import numpy as np
import pytest

from elmoe.errors import TraceError
from elmoe.trace import Locality, load_locality, synthesise
from elmoe.trace.batches import BATCH_ROUTINGS, most_distinct, routed_together
from elmoe.trace.fit_published import common_share, fit_published, fit_strength, judged, scaled, tells_sequences_apart
from elmoe.trace.locality import PRESETS, measured
from elmoe.trace.protocols import Routed, Synthetic
from elmoe.trace.published import Point, Published, load_published, published_models
from elmoe.trace.replacement import policy_hit_rate

BAND = ("glm-4.7-flash",)
"""One number is known of them: no fit, a band."""
FITTED = tuple(name for name in published_models() if name not in BAND)
HIT_RATES = ("lru", "belady", "static")
TOLERANCE = 7.0
"""Percentage points that a hit rate which a fit did not see may be off."""
APART = {("qwen3-30b-a3b", "LRU of 8.0, engine, cold")}
"""A cache of exactly one token's experts depends on the order of look-ups, which the source does not say."""


def point(**changes: object) -> Point:
    values: dict = dict(
        name="p", quantity="reuse", values=(0.3,), use="fit", tokens=32, measured="a test", source="a test", lag=1
    )
    return Point(**(values | changes))


def locality(**changes: object) -> Locality:
    values: dict = dict(popularity=0.5, sequence=0.4, token=0.55, correlation=0.8, source="a test")
    return Locality(**(values | changes))


@pytest.mark.parametrize("model", FITTED)
def test_a_model_gives_the_hit_rates_that_its_fit_never_saw(model):
    preset, published = load_locality(model), load_published(model)
    quantities = {one.name: one.quantity for one in published.points}
    assert preset.model == published.model == model and preset.status == "derived"
    assert [row.name for row in preset.fit] == [one.name for one in published.fitted]
    assert [row.name for row in preset.check] == [one.name for one in published.held_out]
    assert len(preset.fit) + len(preset.check) >= 4 and len(preset.check) >= 2
    for row in preset.check:
        if quantities[row.name] in HIT_RATES and (model, row.name) not in APART:
            assert abs(row.points) <= TOLERANCE, (row.name, row.points)
    assert all(row.measured == pytest.approx(one.value, abs=1e-5) for row, one in
               zip((*preset.fit, *preset.check), (*published.fitted, *published.held_out), strict=True))  # fmt: skip


@pytest.mark.parametrize("model", ["deepseek-v2-lite", "gpt-oss-20b"])
def test_the_stated_numbers_are_what_the_preset_gives(model):
    """The errors in a preset are those of the preset, to the last digit that is written."""
    preset, published = load_locality(model), load_published(model)
    again = judged(preset, published)
    assert (again.fit, again.check) == (preset.fit, preset.check)


@pytest.mark.parametrize("model", FITTED)
def test_other_random_numbers_give_the_same(model):
    """The facts that the simulator replays, and not only those of the fit, have the hit rates that the preset states."""
    preset, published = load_locality(model), load_published(model)
    points = [one for one in published.points if one.quantity in ("reuse", "lru")][:6]
    found = Synthetic(published.experts, points, 7, 1 << 21).measure(preset, published.top_k, points)
    stated = {row.name: row.synthetic for row in (*preset.fit, *preset.check)}
    for one, value in zip(points, found, strict=True):
        assert value == pytest.approx(stated[one.name], abs=0.03), one.name


def test_a_band_has_two_ends_and_a_middle_that_give_the_one_number_known():
    (known,) = load_published("glm-4.7-flash").points
    hits = {}
    for name in ("glm-4.7-flash-low", "glm-4.7-flash", "glm-4.7-flash-high"):
        preset = load_locality(name)
        assert preset.status == "assumed" and preset.model == "glm-4.7-flash" and "band" in preset.source
        facts = synthesise(preset, 64, 4, 4, 9, 96, 11, ranks=4)
        assert measured(facts)["reuse at 1"] == pytest.approx(known.value, abs=0.015)
        half = [point(name="half", quantity="lru", slots=32, tokens=96, lag=None)]
        hits[name] = Synthetic(64, half, 3, 1 << 20).measure(preset, 4, half)[0]
    assert hits["glm-4.7-flash-low"] + 0.02 < hits["glm-4.7-flash-high"]
    assert hits["glm-4.7-flash-low"] <= hits["glm-4.7-flash"] <= hits["glm-4.7-flash-high"]


def test_every_point_says_what_was_measured_and_where_it_stands():
    for model in published_models():
        for one in load_published(model).points:
            assert len(one.measured) > 25 and re.search(r"@[0-9a-f]{7}|#\d+|\(MIT\)|\(Apache-2.0\)", one.source), one.name
    assert {one.status for model in published_models() for one in load_published(model).points} == {
        "measured", "digitised", "computed",
    }  # fmt: skip


def test_a_fit_is_deterministic_and_never_sees_what_is_held_out():
    points = (
        point(name="a", values=(0.35,)), point(name="b", quantity="lru", slots=16, values=(0.6,), lag=None),
        point(name="c", quantity="static", slots=16, lag=2, values=(0.5,)),
        point(name="d", quantity="lru", slots=8, values=(0.4,), lag=None, use="held out"),
    )  # fmt: skip
    published = Published(model="m", experts=32, top_k=4, points=points)
    found = fit_published(published)
    assert found == fit_published(published)
    moved = Published(
        model="m", experts=32, top_k=4, points=(*points[:3], msgspec.structs.replace(points[3], values=(0.9,)))
    )
    other = fit_published(moved)
    assert (other.popularity, other.sequence, other.token, other.correlation) == (
        found.popularity, found.sequence, found.token, found.correlation,
    )  # fmt: skip
    assert other.check[0].points != found.check[0].points
    assert all(abs(row.points) < 3 for row in found.fit)
    assert load_json(found) == found


def load_json(found: Locality) -> Locality:
    return msgspec.json.decode(msgspec.json.encode(found), type=Locality)


def test_the_split_is_given_exactly_where_no_point_tells_it():
    alone = Published(model="m", experts=32, top_k=4, points=(point(),))
    assert not tells_sequences_apart(alone.points)
    with pytest.raises(TraceError, match="no point tells"):
        fit_published(alone)
    told = Published(model="m", experts=32, top_k=4, points=(point(quantity="static", slots=8, lag=1),))
    with pytest.raises(TraceError, match="a point tells"):
        fit_published(told, 0.5)
    found = fit_published(alone, 0.25)
    assert common_share(found) == pytest.approx(0.25, abs=0.01) or found.popularity == found.sequence == 0


def test_a_strength_keeps_the_shape_and_gives_the_number():
    published = Published(model="m", experts=32, top_k=4, points=(point(values=(0.25,)),))
    shape = locality()
    found = fit_strength(published, shape)
    assert judged(found, published).fit[0].synthetic == pytest.approx(0.25, abs=0.02)
    assert found.popularity / found.token == pytest.approx(shape.popularity / shape.token, rel=0.01)
    assert found.correlation == shape.correlation
    with pytest.raises(TraceError, match="strength of 0"):
        scaled(shape, 0)


# Known routing, by hand: two sequences, one layer, six experts, two per token.
CHOSEN = np.array([[[[0, 1], [1, 2], [0, 3], [1, 0]]], [[[4, 5], [4, 5], [4, 5], [0, 1]]]])


def known() -> Routed:
    scores = np.zeros((2, 1, 4, 6), np.float32)
    np.put_along_axis(scores, CHOSEN, np.array([2, 1], np.float32), axis=-1)
    return Routed.of(scores, 2)


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"lag": 1}, (1 + 0 + 1 + 2 + 2 + 0) / 12),
        ({"lag": 2}, (1 + 1 + 2 + 0) / 8),
        ({"quantity": "window", "lag": 2}, (1 + 2 + 2 + 0) / 8),
        # Behind each use of the first sequence: -, -, 0, -, 2 (1 and 2), -, 3 (0, 3 and 2), 1; of the second all 0 or new.
        ({"quantity": "lru", "slots": 2, "lag": None}, (2 + 4) / 16),
        ({"quantity": "lru", "slots": 3, "lag": None}, (3 + 4) / 16),
        ({"quantity": "lru", "slots": 2.5, "lag": None}, (2 + 4 + 0.5) / 16),
        ({"quantity": "lru", "slots": 4, "lag": None}, (4 + 4) / 16),
        ({"quantity": "lru", "slots": 4, "lag": None, "skip": 2}, (3 + 2) / 8),
        # With room for three, the first uses of three experts are hits; with room for four all are.
        ({"quantity": "lru", "slots": 3, "lag": None, "first_use_hits": True}, (6 + 7) / 16),
        ({"quantity": "lru", "slots": 4, "lag": None, "first_use_hits": True}, 1.0),
        ({"quantity": "belady", "slots": 4, "lag": None}, (4 + 4) / 16),
        ({"quantity": "belady", "slots": 6, "lag": None, "first_use_hits": True}, 1.0),
        ({"quantity": "touched", "lag": None}, (4 + 4) / 12),
        ({"quantity": "hottest", "share": 1 / 3, "lag": None}, ((3 + 3) / 8 + (3 + 3) / 8) / 2),
        ({"quantity": "hottest", "share": 1 / 3, "lag": None, "together": True}, (4 + 4) / 16),
        ({"quantity": "static", "slots": 2, "lag": 1}, (0 + 2) / 16),
        ({"quantity": "distinct", "lag": 2}, (4 + 4 + 4 + 2) / 16),
    ],
)
def test_quantities_of_known_routing(changes, value):
    assert known().measure(point(tokens=4, **changes), 4) == pytest.approx(value)


def test_lru_is_the_policy_of_the_engine():
    """All at once, from empty, on many uses: the same hits as the cache that the simulator replays."""
    facts = synthesise(locality(), 32, 4, 2, 1, 200, 5, ranks=4)
    chosen = facts.chosen[0]
    scores = np.zeros((1, 2, 200, 32), np.float32)
    np.put_along_axis(scores, chosen.transpose(1, 0, 2)[None].astype(np.int64), np.array([4, 3, 2, 1], np.float32), axis=-1)
    from elmoe.policy.residency import ResidencyParameters

    for slots in (6, 8, 16):
        one = point(quantity="lru", slots=slots, tokens=200, lag=None)
        wanted = policy_hit_rate(chosen, 32, slots, ResidencyParameters("lru"))
        assert Routed.of(scores, 4).measure(one, 200) == pytest.approx(wanted, abs=0.01)
    at_once = point(quantity="lru", slots=4, tokens=200, lag=None)
    in_turn = msgspec.structs.replace(at_once, in_turn=True)
    routed = Routed.of(scores, 4)
    assert routed.measure(at_once, 200) > routed.measure(in_turn, 200) == _in_turn(chosen, 4)


def _in_turn(chosen: np.ndarray, slots: int) -> float:
    """An LRU that looks up and keeps one expert after another."""
    hits = 0
    for layer in range(chosen.shape[1]):
        kept: list[int] = []
        for expert in chosen[:, layer].ravel().tolist():
            hits += expert in kept
            kept = [expert, *(one for one in kept if one != expert)][:slots]
    return hits / chosen.size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": (1.2,)}, "shares in 0..1"),
        ({"values": ()}, "shares in 0..1"),
        ({"lag": None}, "needs lag"),
        ({"quantity": "static"}, "needs slots"),
        ({"quantity": "hottest"}, "needs share"),
        ({"lag": -1}, "lag is -1"),
        ({"skip": 32}, "cannot be skipped"),
        ({"source": " "}, "no source"),
    ],
)
def test_a_point_that_says_nothing_is_refused(changes, message):
    with pytest.raises(TraceError, match=message):
        point(**changes)


def test_damaged_files_of_points_are_refused(tmp_path):
    path = tmp_path / "p.json"
    whole = json.loads((Path(PRESETS).parent / "published" / "glm-4.7-flash.json").read_text())
    for changes, message in (
        ({"points": []}, "no point is for a fit"),
        ({"points": whole["points"] * 2}, "two points have one name"),
        ({"points": [whole["points"][0] | {"quantity": "luck"}]}, "luck"),
        ({"points": [whole["points"][0] | {"use": "held out"}]}, "no point is for a fit"),
        ({"experts": 4}, "top 4 of 4"),
        ({"more": 1}, "unknown field"),
        ({"version": 9}, "version 9"),
    ):
        path.write_text(json.dumps(whole | changes))
        with pytest.raises(TraceError, match=message):
            load_published(path)
    with pytest.raises(TraceError, match="there is no file of published points 'nothing'"):
        load_published("nothing")


@pytest.mark.parametrize("name", [*FITTED, "glm-4.7-flash-low", "mt_bench"])
def test_batches_are_bounded_from_both_sides_and_a_single_sequence_stays(name):
    """Most distinct experts apart, fewest identical; what one sequence shows is the same in all."""
    preset = load_locality(name)
    experts, top_k = (64, 4) if preset.shape is None else (preset.shape.experts, preset.shape.top_k)
    found, reuse = {}, {}
    for routing in BATCH_ROUTINGS:
        facts = synthesise(routed_together(preset, routing), experts, top_k, 3, 16, 48, 21, ranks=top_k)
        found[routing] = measured(facts)["distinct in 16"] * 16 * top_k
        reuse[routing] = measured(facts)["reuse at 1"]
    assert found["identical"] == pytest.approx(top_k)
    assert found["identical"] < found["alike"] <= found["fitted"] + 0.3 <= found["apart"] + 0.6
    assert found["apart"] == pytest.approx(most_distinct(experts, top_k, 16), rel=0.03)
    for routing in ("apart", "alike"):
        assert reuse[routing] == pytest.approx(reuse["fitted"], abs=0.02), routing


def test_an_unknown_batch_routing_is_refused():
    with pytest.raises(TraceError, match="no batch routing 'some'"):
        routed_together(locality(), "some")  # type: ignore[arg-type]


def test_agreement_moves_sequences_together_and_keeps_each():
    rows = []
    for agreement in (0.0, 0.5, 1.0):
        facts = synthesise(locality(agreement=agreement), 32, 4, 3, 16, 64, 9)
        rows.append((measured(facts)["distinct in 16"], measured(facts)["reuse at 1"]))
    distinct, reuse = zip(*rows, strict=True)
    assert distinct[0] > distinct[1] > distinct[2] == pytest.approx(1 / 16)
    assert max(reuse) - min(reuse) < 0.05
    with pytest.raises(TraceError, match=r"agreement is 1\.5"):
        locality(agreement=1.5)
