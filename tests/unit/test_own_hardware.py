"""A user's own hardware and models: what was changed is the user's, and names stay apart."""

from __future__ import annotations

import json
from importlib.resources import files

import msgspec
import pytest

from elmoe.errors import HardwareError
from elmoe.models.load import load_model
from elmoe.schema.hardware import load_hardware, preset_names, preset_text
from elmoe.schema.provenance import constants
from elmoe.sim.grid import Grid, check_names
from elmoe.systems.forms import Odds


def saved(tmp_path, *changes, name="elmoe3d_8gb", file="my.yaml"):
    text = preset_text(name)
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (tmp_path / file).write_text(text)
    return load_hardware(tmp_path / file)


@pytest.mark.parametrize("name", preset_names())
def test_a_copy_of_a_preset_keeps_its_sources(tmp_path, name):
    copy = saved(tmp_path, (f"name: {name}", "name: mine"), name=name)
    assert list(constants(copy)) == list(constants(load_hardware(name)))


def test_a_changed_number_is_the_users_and_says_what_the_preset_states(tmp_path):
    mine = saved(tmp_path, ("1638.4 GB/s", "3276.8 GB/s"))
    bandwidth = mine.fast.bandwidth
    assert (bandwidth.value, bandwidth.status) == (3276.8e9, "user")
    assert bandwidth.source.startswith("changed by the user in my.yaml") and "ELMoE-3D" in bandwidth.source
    preset = dict(constants(load_hardware("elmoe3d_8gb")))
    others = {path: constant for path, constant in constants(mine) if path != "fast.bandwidth"}
    assert all(constant == preset[path] for path, constant in others.items())


def test_a_changed_range_or_status_is_the_users_too(tmp_path):
    mine = saved(tmp_path, ("[0.43 pJ/bit, 0.88 pJ/bit]", "[0.43 pJ/bit, 0.99 pJ/bit]"))
    assert mine.fast.energy.status == "user"
    mine = saved(tmp_path, ("static_share: {value: 20 %, range: [5 %, 50 %], status: assumed",
                            "static_share: {value: 20 %, range: [5 %, 50 %], status: measured"))  # fmt: skip
    assert mine.static_share.status == "user"


def test_a_source_of_the_users_own_is_left_alone(tmp_path):
    source = 'source: "ELMoE-3D (arXiv 2604.14626, second-hand notes)"}'
    before = "bandwidth: {value: 1638.4 GB/s, status: published,\n    " + source
    mine = saved(tmp_path, (before, 'bandwidth: {value: 2 TB/s, status: measured, source: "my own probe"}'))
    assert (mine.fast.bandwidth.status, mine.fast.bandwidth.source) == ("measured", "my own probe")


def test_a_source_moved_to_another_constant_is_not_its_source(tmp_path):
    mine = saved(tmp_path, ("value: 1.31 pJ, range: [0.34 pJ, 5 pJ], status: assumed", "value: 1.31 pJ, status: published"))
    assert mine.vector.energy.status == "user"


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("value: 1638.4 GB/s", "value: 1e300 GB/s", "too large"),
        ("elements: {value: 32", "elements: {value: 0100", "plain decimal"),
        ("elements: {value: 32", "elements: {value: 1:40", "plain decimal"),
        ("expert_cache: true", "expert_cache: !!bool maybe", "tag 'bool'"),
        ("static_share:", "name: again\nstatic_share:", "'name' is there twice"),
        ("range: [5 %, 50 %]", "range: [5 %, 1e300 %]", "too large"),
        ("range: [5 %, 50 %]", "range: [5 %, 50 GB]", "ratio"),
    ],
)
def test_numbers_that_mislead_are_refused_with_file_line_and_path(tmp_path, before, after, told):
    with pytest.raises(HardwareError, match=told) as caught:
        saved(tmp_path, (before, after))
    assert "my.yaml', line " in str(caught.value) and "$" in str(caught.value)


def cached(tmp_path, repository, **changes):
    """A model as the Hugging Face cache keeps it: a link to a blob."""
    config = json.loads((files("elmoe.presets") / "models" / "qwen3-30b-a3b.json").read_text()) | changes
    root = tmp_path / "hub" / f"models--{repository}"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (root / "blobs" / "fe01").write_text(json.dumps(config))
    (snapshot / "config.json").symlink_to("../../blobs/fe01")
    return snapshot


def test_models_are_called_by_what_the_user_wrote_not_by_where_links_lead(tmp_path):
    snapshot = cached(tmp_path, "A--small")
    assert load_model(snapshot).name == load_model(snapshot / "config.json").name == "A/small"
    (tmp_path / "mine").symlink_to(snapshot)
    assert load_model(tmp_path / "mine").name == "mine"
    (tmp_path / "big.json").write_text((snapshot / "config.json").read_text())
    assert load_model(tmp_path / "big.json").name == "big"


def test_a_changed_copy_of_a_models_preset_does_not_keep_its_source(tmp_path):
    same, changed = cached(tmp_path, "A--same"), cached(tmp_path, "B--changed", num_hidden_layers=24)
    assert load_model(same).source == load_model("qwen3-30b-a3b").source
    assert load_model(changed).source == str(changed / "config.json")


def test_equal_names_are_refused(tmp_path):
    xpu = load_hardware("xpu")
    grid = Grid((xpu,), ("gpt-oss-20b",), ("gsm8k",), (1, 4), ("ar",))
    check_names(grid)
    one, two = cached(tmp_path / "a", "A--same"), cached(tmp_path / "b", "A--same", num_hidden_layers=24)
    half = Odds("0.5", 0.5, "assumed")
    for changes, told in (
        ({"systems": (xpu, msgspec.structs.replace(xpu, description="another"))}, "two systems have the name 'xpu'"),
        ({"models": (str(one), str(two))}, "two models have the name 'A/same'"),
        ({"prompts": ("gsm8k", "gsm8k")}, "prompt sets"),
        ({"batches": (1, 1)}, "batch sizes"),
        ({"forms": ("ar", "ar")}, "forms"),
        ({"odds": (half, half)}, "acceptances"),
    ):
        with pytest.raises(HardwareError, match=told) as caught:
            check_names(Grid(**{**{name: getattr(grid, name) for name in grid.__dataclass_fields__}, **changes}))
        assert caught.value.hint
