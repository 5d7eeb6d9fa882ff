"""What families read from published configurations, field by field; what contradicts itself or cannot be said is refused."""

from __future__ import annotations

import json
import os
import re
from importlib.resources import files
from math import log
from pathlib import Path

import msgspec
import pytest

from elmoe.errors import ModelError
from elmoe.models import FAMILIES, family_of, spec_of_config
from elmoe.models.load import load_model, model_names
from elmoe.models.spec import (
    Activation,
    Dense,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Moe,
    Multipliers,
    Rope,
    Router,
    YarnScaling,
)
from elmoe.models.support import check_supported

SIMULATED_FAMILIES = ("kimi_k2",)
WITHOUT_PRESET = ("granitemoeshared",)
"""Families of which no published configuration was at hand."""
FOLDER = os.environ.get("ELMOE_PUBLISHED_CONFIGS")
"""Folder of whole published ``config.json`` files, one a model, if there is one."""


def config(name: str, **changes: object) -> dict:
    data = json.loads((files("elmoe.presets") / "models" / f"{name}.json").read_text())
    return {key: value for key, value in (data | changes).items() if value != "absent"}


def spec(name: str, **changes: object) -> ModelSpec:
    return spec_of_config(config(name, **changes))


def test_presets_cover_every_family():
    assert {load_model(name).spec.family for name in model_names()} == set(FAMILIES) - set(WITHOUT_PRESET)


@pytest.mark.parametrize("name", model_names())
def test_a_spec_survives_being_written(name):
    model = spec(name)
    assert msgspec.json.decode(msgspec.json.encode(model), type=ModelSpec) == model


@pytest.mark.skipif(FOLDER is None, reason="ELMOE_PUBLISHED_CONFIGS names no folder of configurations")
def test_every_published_configuration_of_a_known_family_is_read():
    read = {}
    for path in sorted(Path(FOLDER or "").glob("*.json")):
        data = json.loads(path.read_text())
        if data.get("model_type") in FAMILIES:
            read[path.name] = spec_of_config(data, path.name)
            assert family_of(data).name == data["model_type"] == read[path.name].family
    assert read


def test_deepseek_v2_chooses_by_softmax_and_keeps_no_groups_when_greedy():
    model = spec("deepseek-v2-lite")
    moe = model.layers[1].feed_forward
    assert moe == Moe(router=Router(experts=64, top_k=6), width=1408, shared_width=2 * 1408)
    assert model.layers[0].feed_forward == Dense(width=10944)
    attention = model.layers[0].attention
    assert attention.query_rank is None and attention.rope.interleaved and attention.rope.dimensions == 64
    scale = 0.1 * 0.707 * log(40) + 1
    assert attention.rope.scaling == YarnScaling(factor=40, original_positions=4096, score_factor=scale**2)
    assert model.eos_tokens == (100001,) and model.max_positions == 163840

    grouped = {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3, "routed_scaling_factor": 16.0}
    router = spec("deepseek-v2-lite", **grouped).moe(1).router
    assert (router.groups, router.kept_groups, router.group_score, router.scaling) == (8, 3, "best", 16.0)


@pytest.mark.parametrize(
    ("name", "groups", "kept", "scaling"),
    [
        ("deepseek-v3", 8, 4, 2.5),
        ("kimi-k2", 1, 1, 2.827),
        ("glm-4.7-flash", 1, 1, 1.8),
        ("glm-4.5-air", 1, 1, 1.0),
        ("dots.llm1", 1, 1, 2.5),
    ],
)
def test_deepseek_v3_and_its_heirs_bias_the_choice_alone(name, groups, kept, scaling):
    model = spec(name)
    router = model.moe(model.moe_layers[0]).router
    assert (router.score, router.normalize, router.scaling) == ("sigmoid", True, scaling)
    assert (router.selection_bias, router.logit_bias, router.group_score) == (True, False, "best_two")
    assert (router.groups, router.kept_groups) == (groups, kept)


def test_the_first_layers_are_dense():
    assert spec("deepseek-v3").dense_layers == (0, 1, 2)
    assert spec("kimi-k2").dense_layers == spec("glm-4.5-air").dense_layers == spec("glm-4.7-flash").dense_layers == (0,)


def test_kimi_is_told_from_deepseek_v3_by_its_model_type():
    assert config("kimi-k2")["architectures"] == config("deepseek-v3")["architectures"]
    assert spec("kimi-k2").family == "kimi_k2" and spec("deepseek-v3").family == "deepseek_v3"


def test_glm_rotates_half_of_a_head_in_either_spelling():
    attention = spec("glm-4.5-air").layers[0].attention
    assert (attention.head_dim, attention.rope.dimensions, attention.rope.interleaved) == (128, 64, False)
    assert (attention.query_key_value_bias, attention.output_bias, attention.query_key_norm) == (True, False, "none")
    newer = {"rope_theta": 1e6, "rope_type": "default", "partial_rotary_factor": 0.25}
    changes = dict.fromkeys(("rope_theta", "rope_scaling", "partial_rotary_factor"), "absent")
    attention = spec("glm-4.5-air", **changes, rope_parameters=newer, use_qk_norm=True).layers[0].attention
    assert (attention.rope.dimensions, attention.rope.theta, attention.query_key_norm) == (32, 1e6, "head")
    assert spec("glm-4.5-air", partial_rotary_factor="absent").layers[0].attention.rope.dimensions == 64


def test_dots_calls_its_router_noaux_tc_and_has_no_windows_by_default():
    model = spec("dots.llm1")
    assert model.dense_layers == (0,) and {layer.attention.window for layer in model.layers} == {None}
    assert model.layers[0].attention.query_key_norm == "head" and model.moe(1).shared_width == 2 * 1408
    assert spec("dots.llm1", scoring_func="sigmoid") == spec("dots.llm1", scoring_func="absent") == model
    with pytest.raises(ModelError, match="'scoring_func' is 'noaux_tc'"):
        spec("glm-4.5-air", scoring_func="noaux_tc")


def test_gpt_oss_alternates_windows_and_has_sinks_and_biases():
    model = spec("gpt-oss-20b")
    assert [layer.attention.window for layer in model.layers] == [128, None] * 12
    attention, moe = model.layers[0].attention, model.layers[0].feed_forward
    assert attention.sinks and attention.query_key_value_bias and attention.output_bias and attention.head_dim == 64
    assert attention.rope.theta == 150000 and not attention.rope.interleaved
    yarn = YarnScaling(factor=32, original_positions=4096, attention_factor=0.1 * log(32) + 1, truncate=False)
    assert attention.rope.scaling == yarn
    assert moe.router == Router(experts=32, top_k=4, score="chosen_softmax", logit_bias=True)
    assert moe.bias and moe.activation == Activation(kind="clamped_swiglu", alpha=1.702, limit=7.0)
    assert load_model("gpt-oss-20b").formats == {"experts": "table4_mx"}
    bare = spec("gpt-oss-20b", layer_types="absent", rope_scaling="absent", rope_theta="absent", attention_bias="absent")
    assert bare == model
    other = ["full_attention"] * 23 + ["sliding_attention"]
    assert [one.attention.window for one in spec("gpt-oss-20b", layer_types=other).layers] == [None] * 23 + [128]


def test_mixtral_normalises_and_perhaps_has_one_window():
    model = spec("mixtral-8x7b")
    assert model.layers[0].feed_forward == Moe(router=Router(experts=8, top_k=2, normalize=True), width=14336)
    assert model.layers[0].attention.window is None and model.layers[0].attention.rope.theta == 1e6
    assert {layer.attention.window for layer in spec("mixtral-8x7b", sliding_window=4096).layers} == {4096}


def test_olmoe_norms_the_full_width():
    model = spec("olmoe-1b-7b")
    assert model.layers[0].attention.query_key_norm == "full" and model.norm_epsilon == 1e-5
    assert not model.moe(0).router.normalize and spec("olmoe-1b-7b", norm_topk_prob=True).moe(0).router.normalize


def test_qwen2_is_dense_with_biases_and_windows_at_the_end():
    model = spec("qwen2.5-coder-7b")
    attention = model.layers[0].attention
    assert attention.query_key_value_bias and not attention.output_bias and attention.head_dim == 128
    assert model.layers[0].feed_forward == Dense(width=18944) and not model.moe_layers
    windowed = spec("qwen2.5-coder-7b", use_sliding_window=True, sliding_window=4096, max_window_layers=20)
    assert [layer.attention.window for layer in windowed.layers] == [None] * 20 + [4096] * 8


def test_both_spellings_of_a_scaling_are_one():
    old = spec("mixtral-8x7b", rope_scaling={"type": "linear", "factor": 2.0})
    new = spec("mixtral-8x7b", rope_theta="absent", rope_parameters={"rope_type": "linear", "factor": 2, "rope_theta": 1e6})
    assert old == new and old.layers[0].attention.rope.scaling == LinearScaling(factor=2)


def test_granite_has_multipliers_and_a_score_scale():
    model = spec("granite-3.1-1b-a400m")
    assert model.multipliers == Multipliers(embedding=12.0, residual=0.22, logits=6.0) and model.tied_embeddings
    assert model.layers[0].feed_forward == Moe(router=Router(experts=32, top_k=8, normalize=True), width=512)
    attention = model.layers[23].attention
    assert (attention.score_scale, attention.head_dim, attention.rope.theta) == (1 / 64, 64, 1.5e6)
    dense = spec("granite-3.1-8b")
    assert dense.layers[0].feed_forward == Dense(width=12800) and dense.layers[0].attention.score_scale == 1 / 128


def test_one_or_several_tokens_end_a_generation():
    assert spec("mixtral-8x7b").eos_tokens == (2,)
    assert spec("mixtral-8x7b", eos_token_id=[2, 31999, 2]).eos_tokens == (2, 31999)
    assert spec("mixtral-8x7b", eos_token_id=None).eos_tokens == ()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kv_lora_rank": 520}, "'kv_lora_rank' 520"),
        ({"qk_rope_head_dim": 40}, "'qk_rope_head_dim' 40"),
        ({"v_head_dim": 100}, "'v_head_dim' 100"),
        ({"kv_lora_rank": 4096}, "latents of 4160 dimensions"),
        ({"rope_theta": 0.5}, "the rope scaling 'yarn' of a theta of 0.5"),
    ],
)
def test_the_engine_says_what_it_cannot_run(changes, named):
    with pytest.raises(ModelError, match=f"cannot run a deepseek_v2 model: {named}") as caught:
        check_supported(spec("deepseek-v2-lite", **changes))
    assert "elmoe simulate" in (caught.value.hint or "")


@pytest.mark.parametrize("name", [name for name in model_names() if spec(name).family not in SIMULATED_FAMILIES])
def test_the_engine_runs_what_it_converts(name):
    check_supported(spec(name))
    assert FAMILIES[spec(name).family].names and FAMILIES[spec(name).family].gguf


REFUSED = [
    ("qwen3-30b-a3b", {"model_type": "mixtral"}, "'mixtral' does not go with architecture 'Qwen3MoeForCausalLM'"),
    ("qwen3-30b-a3b", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ("mixtral-8x7b", {"architectures": ["JambaForCausalLM"]}, "'JambaForCausalLM' is not supported"),
    ("mixtral-8x7b", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
    ("mixtral-8x7b", {"eos_token_id": 32000}, "'eos_token_id' is 32000"),
    ("mixtral-8x7b", {"sliding_window": 0}, "'sliding_window' is 0"),
    ("mixtral-8x7b", {"rope_theta": 0}, "'rope_theta' is 0"),
    ("mixtral-8x7b", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
    ("mixtral-8x7b", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "'rope_theta' has several values"),
    ("mixtral-8x7b", {"tie_word_embeddings": "no"}, "'tie_word_embeddings' is 'no'"),
    ("olmoe-1b-7b", {"clip_qkv": 8.0}, "'clip_qkv' is 8.0"),
    ("olmoe-1b-7b", {"num_key_value_heads": 3}, "no multiple of 'num_key_value_heads' 3"),
    ("deepseek-v2-lite", {"attention_bias": True}, "'attention_bias' is True"),
    ("deepseek-v2-lite", {"scoring_func": "sigmoid"}, "'scoring_func' is 'sigmoid'"),
    ("deepseek-v2-lite", {"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc'"),
    ("deepseek-v2-lite", {"norm_topk_prob": True}, "'norm_topk_prob' is True"),
    ("deepseek-v2-lite", {"rope_interleave": False}, "'rope_interleave' is False"),
    ("deepseek-v3", {"n_group": 128, "topk_group": 3}, "8 experts of 3 groups of 2, which have too few"),
    ("deepseek-v3", {"n_group": 256, "topk_group": 9}, "8 experts of 9 groups of 1, which have too few"),
    ("deepseek-v2-lite", {"num_key_value_heads": 4}, "'num_key_value_heads' is 4"),
    ("deepseek-v2-lite", {"first_k_dense_replace": -1}, "'first_k_dense_replace' is -1"),
    ("deepseek-v3", {"scoring_func": "softmax"}, "'scoring_func' is 'softmax'"),
    ("deepseek-v3", {"topk_method": "greedy"}, "'topk_method' is 'greedy'"),
    ("deepseek-v3", {"n_group": 7}, "4 of 7 groups of 256 experts"),
    ("deepseek-v3", {"topk_group": 9}, "9 of 8 groups"),
    ("deepseek-v3", {"qk_rope_head_dim": 63}, "rope.dimensions is 63"),
    ("glm-4.7-flash", {"mlp_layer_types": ["dense"] * 2 + ["sparse"] * 45}, "'mlp_layer_types' and 'first_k_dense_replace'"),
    ("glm-4.7-flash", {"mlp_layer_types": ["dense"] + ["mixed"] * 46}, "'mlp_layer_types' must name"),
    ("glm-4.7-flash", {"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ("glm-4.5-air", {"partial_rotary_factor": 1.5}, "'partial_rotary_factor' is 1.5"),
    ("glm-4.5-air", {"rope_parameters": {"partial_rotary_factor": 0.25}}, "'partial_rotary_factor' is 0.5, 0.25"),
    ("gpt-oss-20b", {"layer_types": ["full_attention"] * 23}, "'layer_types' must name"),
    ("gpt-oss-20b", {"layer_types": ["chunked_attention"] * 24}, "'layer_types' must name"),
    ("gpt-oss-20b", {"layer_types": 24}, "'layer_types' must name"),
    ("gpt-oss-20b", {"sliding_window": None}, "there is no 'sliding_window'"),
    ("gpt-oss-20b", {"experts_per_token": 8}, "'experts_per_token' disagree"),
    ("gpt-oss-20b", {"head_dim": "absent"}, "there is no 'head_dim'"),
    ("qwen2.5-coder-7b", {"layer_types": ["sliding_attention"] * 28}, "'use_sliding_window' is not true"),
    ("qwen2.5-coder-7b", {"use_sliding_window": True, "max_window_layers": 20}, "there is no 'sliding_window'"),
    ("mixtral-8x7b", {"scoring_func": "sigmoid"}, "'scoring_func' is 'sigmoid', which the family mixtral does not have"),
    ("mixtral-8x7b", {"norm_topk_prob": False}, "'norm_topk_prob' is False, which the family mixtral does not have"),
    ("mixtral-8x7b", {"norm_topk_prob": 1}, "'norm_topk_prob' is 1"),
    ("mixtral-8x7b", {"routed_scaling_factor": 2.5}, "'routed_scaling_factor' is 2.5"),
    ("mixtral-8x7b", {"final_logit_softcapping": 30.0}, "'final_logit_softcapping' is 30.0"),
    ("mixtral-8x7b", {"position_embedding_type": "alibi"}, "'position_embedding_type' is 'alibi'"),
    ("olmoe-1b-7b", {"logits_scaling": 8}, "'logits_scaling' is 8"),
    ("qwen3-30b-a3b", {"layer_types": ["sliding_attention"] * 48}, "'layer_types' is ['sliding_attention'"),
    ("qwen3-30b-a3b", {"num_local_experts": 64}, "'num_experts' 128 and 'num_local_experts' 64 disagree"),
    ("gpt-oss-20b", {"num_experts": 16}, "'num_experts' 16 and 'num_local_experts' 32 disagree"),
    ("deepseek-v2-lite", {"rope_scaling": {"type": "yarn", "factor": 40, "mscale": "x"}}, "'mscale' is 'x'"),
    ("deepseek-v2-lite", {"rope_scaling": {"type": "yarn", "factor": 40, "mscale": False}}, "'mscale' is False"),
    ("deepseek-v2-lite", {"rope_scaling": {"type": "yarn", "factor": 40, "mscale_all_dim": -3}}, "'mscale_all_dim' is -3"),
]


def test_a_dense_qwen3_has_no_windows():
    """transformers has no ``sliding_window`` there unless ``use_sliding_window``, and fails on a layer that names one."""
    dense = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "sliding_window": 64}
    assert spec_of_config(config("qwen2.5-coder-7b", **dense)).family == "qwen3"
    with pytest.raises(ModelError, match="'layer_types' is"):
        spec_of_config(config("qwen2.5-coder-7b", **dense, layer_types=["sliding_attention"] * 28))


@pytest.mark.parametrize("value", [0, 0.0, None])
def test_no_mscale_is_that_of_yarn_itself(value):
    scaling = {"type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}
    names = ("mscale", "mscale_all_dim")
    assert spec("deepseek-v2-lite", rope_scaling=scaling | dict.fromkeys(names, value)) == spec(
        "deepseek-v2-lite", rope_scaling=scaling
    )


@pytest.mark.parametrize(
    "neutral", [{"scoring_func": "softmax"}, {"routed_scaling_factor": 1.0}, {"layer_types": ["full_attention"] * 32}]
)
def test_words_of_other_families_may_say_what_is_so(neutral):
    assert spec("mixtral-8x7b", **neutral) == spec("mixtral-8x7b")


@pytest.mark.parametrize(("name", "changes", "named"), REFUSED)
def test_what_contradicts_itself_or_cannot_be_said_is_refused_by_name(name, changes, named):
    with pytest.raises(ModelError) as caught:
        spec_of_config(config(name, **changes), "there/config.json")
    assert "there/config.json" in str(caught.value) and named in str(caught.value) and caught.value.hint


@pytest.mark.parametrize(
    ("name", "changes", "keys"),
    [
        ("mixtral-8x7b", {"vocab_size": 10**9}, ["vocab_size"]),
        ("mixtral-8x7b", {"head_dim": 7}, ["head_dim"]),
        ("mixtral-8x7b", {"rms_norm_eps": 2}, ["rms_norm_eps"]),
        ("deepseek-v3", {"n_group": 7}, ["n_group", "topk_group", "n_routed_experts"]),
        ("deepseek-v3", {"qk_rope_head_dim": 63}, ["qk_rope_head_dim"]),
        ("glm-4.5-air", {"head_dim": 128, "partial_rotary_factor": 0.01}, ["head_dim", "partial_rotary_factor"]),
        ("granite-3.1-8b", {"residual_multiplier": 1e-9}, ["residual_multiplier"]),
    ],
)
def test_the_hint_names_the_keys_that_gave_a_value_of_the_spec(name, changes, keys):
    with pytest.raises(ModelError) as caught:
        spec_of_config(config(name, **changes))
    assert re.findall("'([^']*)'", caught.value.hint) == keys


def test_a_dense_qwen3_has_heads_of_128_where_none_are_given_as_in_transformers():
    assert spec("qwen3-0.6b", head_dim=None) == spec("qwen3-0.6b")


def test_gpt_oss_without_a_rope_scaling_has_that_of_the_published_models():
    assert spec("gpt-oss-20b", rope_scaling=None, rope_parameters=None) == spec("gpt-oss-20b")


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-20b", "qwen2.5-coder-7b"])
def test_a_billion_layers_are_refused_before_they_are_listed(name):
    with pytest.raises(ModelError, match=r"'num_hidden_layers' is 1000000000, expected a whole number in 1\.\.1024"):
        spec(name, num_hidden_layers=10**9)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e300, float("nan")])
@pytest.mark.parametrize(
    "part",
    [
        Rope(theta=1e4, dimensions=2),
        LinearScaling(factor=2.0),
        Llama3Scaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192),
        YarnScaling(factor=4.0, original_positions=64),
        Activation(alpha=1.7, limit=7.0),
        Router(experts=4, top_k=2),
    ],
    ids=lambda part: type(part).__name__,
)
def test_numbers_of_a_spec_are_positive_and_bounded(part, value):
    """Those of a store's manifest too, which no reader of a configuration has checked."""
    numbers = [name for name, old in msgspec.structs.asdict(part).items() if type(old) is float]
    assert numbers
    for name in numbers:
        with pytest.raises(ModelError, match=re.escape(f"{name} is {value}, allowed is 1e-06..1e+12")):
            msgspec.structs.replace(part, **{name: value})
    if hasattr(part, "original_positions"):
        with pytest.raises(ModelError, match="original_positions is 0"):
            msgspec.structs.replace(part, original_positions=0)
