"""Generic descriptions of models: sizes by hand and against published totals, and what is wrong in one is named."""

from __future__ import annotations

import json

import pytest

from elmoe.errors import ModelError
from elmoe.models.described import described_names, described_text, model_of_description
from elmoe.models.load import load_model, model_names
from elmoe.models.spec import Dense, GroupedAttention, Moe

# Published total and active parameters (names and model cards), and how far a sum may be off: names are rounded.
PUBLISHED = {
    "phi-3.5-moe": (41.9e9, 6.6e9, 0.02),
    "minimax-m2.5": (230e9, 10e9, 0.05),
    "ernie-4.5-21b-a3b": (21.8e9, 3e9, 0.12),
    "hunyuan-a13b": (80e9, 13e9, 0.03),
    "gemma-4-26b-a4b": (25.2e9, 3.8e9, 0.02),
}
SMALL = {
    "name": "small", "source": "a test", "layers": 3, "dense_layers": 1, "hidden": 64, "heads": 4, "kv_heads": 2,
    "head_dim": 32, "experts": 8, "top_k": 2, "expert_width": 96, "shared_width": 32, "dense_width": 160, "vocabulary": 100,
    "tied_embeddings": True,
}  # fmt: skip


def small(**changes: object) -> str:
    return json.dumps({key: value for key, value in (SMALL | changes).items() if value != "absent"})


def test_a_description_by_hand():
    model = model_of_description(small(), "small.yaml")
    spec = model.spec
    assert (model.name, model.source, spec.family) == ("small", "a test", "described")
    assert (spec.dense_layers, spec.moe_layers, spec.experts, spec.top_k) == ((0,), (1, 2), 8, 2)
    attention, expert, shared = 2 * 64 * 32 * (4 + 2), 3 * 64 * 96, 3 * 64 * 32
    assert model.parameters == 3 * attention + 3 * 64 * 160 + 2 * (8 * expert + shared + 64 * 8) + 6400
    assert model.active_parameters == 3 * attention + 3 * 64 * 160 + 2 * (2 * expert + shared + 64 * 8) + 6400
    assert spec.kv_bytes_per_position == 3 * 2 * 2 * 2 * 32
    assert model.expert.expert_bytes == expert * 8.5 / 8
    assert spec.layers[1].feed_forward == spec.layers[2].feed_forward and isinstance(spec.layers[1].feed_forward, Moe)
    assert spec.layers[0].feed_forward == Dense(width=160)


def test_precisions_and_global_layers():
    changes = {"precision": "table4", "dense_precision": "bfloat16", "window": 16, "global_every": 3, "global_kv_heads": 1,
               "global_head_dim": 64}  # fmt: skip
    model = model_of_description(small(**changes), "small.yaml")
    assert model.expert.expert_bits == (4.25,) and model.layers[0].attention_precision.bits == (16.0,)
    near, far = model.spec.layers[1].attention, model.spec.layers[2].attention
    assert isinstance(near, GroupedAttention) and isinstance(far, GroupedAttention)
    assert (near.window, near.kv_heads, near.head_dim) == (16, 2, 32)
    assert (far.window, far.kv_heads, far.head_dim) == (None, 1, 64)


@pytest.mark.parametrize("name", described_names())
def test_presets_have_the_published_totals_and_a_source(name):
    total, active, tolerance = PUBLISHED[name]
    model = load_model(name)
    assert model.name == name and len(model.source) > 40 and name not in model_names()
    assert model.parameters == pytest.approx(total, rel=0.01)
    assert model.active_parameters == pytest.approx(active, rel=tolerance)


def test_every_preset_is_judged():
    assert set(PUBLISHED) == set(described_names())


def test_a_file_is_a_model_as_a_preset_is(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(described_text("phi-3.5-moe").replace("name: phi-3.5-moe", "name: mine").replace("top_k: 2", "top_k: 4"))
    model = load_model(path)
    assert (model.name, model.spec.top_k, model.parameters) == ("mine", 4, load_model("phi-3.5-moe").parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": "absent"}, "missing required field `heads`"),
        ({"source": "absent"}, "missing required field `source`"),
        ({"layer": 3}, "unknown field `layer`"),
        ({"heads": "4"}, "Expected `int`, got `str` - at `\\$.heads`"),
        ({"experts": 2.5}, "Expected `int`, got `float`"),
        ({"name": " "}, "must not be empty"),
        ({"layers": 0}, "layers is 0"),
        ({"layers": 1 << 20}, "layers is 1048576"),
        ({"dense_layers": 3}, "dense_layers is 3, allowed is 0..2"),
        ({"dense_width": 0}, "go together"),
        ({"dense_layers": 0}, "go together"),
        ({"kv_heads": 3}, "no multiple of kv_heads 3"),
        ({"top_k": 9}, r"line \d+: top_k is 9"),
        ({"hidden": -1}, "hidden is -1"),
        ({"expert_width": 0}, "expert_width is 0"),
        ({"vocabulary": 1 << 30}, "vocabulary is"),
        ({"window": 0}, "window is 0"),
        ({"window": 8, "global_every": 2, "global_kv_heads": 3}, r"no multiple of global_kv_heads 3"),
        ({"window": 8, "global_every": 2, "global_head_dim": 1 << 40}, r"line \d+: global_head_dim is"),
        ({"dense_width": -4, "dense_layers": 1}, r"line \d+: dense_width is -4"),
        ({"global_every": 2}, "for a model with a window"),
        ({"window": 8, "global_every": 9}, "at most its layers"),
        ({"window": 8, "global_head_dim": 64}, "need global_every"),
        ({"precision": "int3"}, "precision is 'int3'"),
        ({"dense_precision": "fp4"}, "dense_precision is 'fp4'"),
    ],
)
def test_what_is_wrong_is_named(changes, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(small(**changes))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(path)
    assert "bad.yaml" in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("text", ["", "[]", "layers: [", "layers: 1\nlayers: 2", "&a x: *a", "\ud800x"[1:] + ": 1\n"])
def test_texts_that_are_no_description(text, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"bad\.yaml"):
        load_model(path)


def test_what_is_not_there_is_refused_with_the_descriptions_among_the_names(tmp_path):
    with pytest.raises(ModelError, match="there is no model") as caught:
        load_model(tmp_path / "none.yaml")
    assert "phi-3.5-moe" in caught.value.hint


def test_an_unknown_key_is_named_with_its_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(described_text("phi-3.5-moe") + "'f`oo': 1\n")
    with pytest.raises(ModelError, match=rf"line {len(path.read_text().splitlines())}: .* unknown field `f`oo`"):
        load_model(path)


@pytest.mark.parametrize("key", ["layers", "hidden", "top_k", "expert_width", "heads"])
def test_what_is_wrong_with_a_value_is_named_with_its_line(key, tmp_path):
    path = tmp_path / "bad.yaml"
    lines = described_text("phi-3.5-moe").splitlines()
    place = next(index for index, line in enumerate(lines) if line.startswith(f"{key}:"))
    path.write_text("\n".join([*lines[:place], f"{key}: 0", *lines[place + 1 :]]))
    with pytest.raises(ModelError, match=rf"line {place + 1}: {key} is 0"):
        load_model(path)
