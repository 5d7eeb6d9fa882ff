"""dots.llm1: what its configuration means, what is refused by name, and what a GGUF file without a key means."""

from __future__ import annotations

import pytest

from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.source import open_source
from elmoe.errors import ConvertError, ModelError
from elmoe.models import spec_of_config
from elmoe.store import open_store
from tests.checkpoints import write_checkpoint
from tests.family_configs import CONFIGS
from tests.unit.test_dense import rewritten


def exported(folder, **changes):
    """A GGUF file of the first configuration with other values."""
    convert_checkpoint(write_checkpoint(folder / "source", CONFIGS["dots1"] | changes), folder / "store")
    with open_store(folder / "store") as reader:
        export_store(reader, folder / "model.gguf")
    return folder / "model.gguf"


def test_defaults_are_those_of_transformers():
    absent = dict.fromkeys((
        "first_k_dense_replace", "norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "scoring_func",
        "rms_norm_eps", "max_position_embeddings",
    ))  # fmt: skip
    spec = spec_of_config(CONFIGS["dots1"] | absent)
    router = spec.moe(0).router
    assert spec.dense_layers == () and (spec.norm_epsilon, spec.max_positions) == (1e-6, 2048)
    assert (router.normalize, router.scaling, router.groups, router.kept_groups) == (False, 1.0, 1, 1)
    assert spec.layers[0].attention.window is None


def test_windows_begin_at_a_layer_unless_the_layers_are_named():
    def windows(**changes):
        return [layer.attention.window for layer in spec_of_config(CONFIGS["dots1"] | changes).layers]

    assert windows(sliding_window=9) == [None] * 3
    assert windows(sliding_window=9, max_window_layers=1) == [None, 9, 9]
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    assert windows(sliding_window=9, max_window_layers=1, layer_types=kinds) == [9, None, None]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"moe_layer_freq": 2}, "'moe_layer_freq' is 2"),
        ({"scoring_func": "softmax"}, "'scoring_func' is 'softmax'"),
        ({"topk_method": "greedy"}, "'topk_method' is 'greedy'"),
        ({"n_shared_experts": None}, "there is no 'n_shared_experts'"),
        ({"n_shared_experts": 0}, "'n_shared_experts' is 0"),
        ({"max_window_layers": 1}, "there is no 'sliding_window'"),
        ({"mlp_layer_types": ["dense", "dense", "sparse"]}, "'mlp_layer_types' and 'first_k_dense_replace' disagree"),
        ({"use_sliding_window": True}, "'use_sliding_window' is True"),
        ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(changes, named):
    with pytest.raises(ModelError, match=named):
        spec_of_config(CONFIGS["dots1"] | changes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_key_value_heads": 2}, "4 heads of queries share 2"),
        ({"attention_bias": True}, "attention has biases"),
        ({"sliding_window": 40, "max_window_layers": 0}, "attention windows"),
        ({"sliding_window": 40, "max_window_layers": 1}, "attention windows"),
        ({"tie_word_embeddings": True}, "the output head is the embedding"),
    ],
)
def test_what_gguf_cannot_say_is_not_written(tmp_path, changes, named):
    with pytest.raises(ConvertError, match=named):
        exported(tmp_path, **changes)


def test_files_without_a_key_mean_what_llama_cpp_takes(tmp_path):
    absent = (
        "expert_weights_norm", "expert_weights_scale", "expert_group_count", "expert_group_used_count", "rope.freq_base",
        "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
    )  # fmt: skip
    path = exported(tmp_path, n_group=4, topk_group=2)
    assert open_source(path).spec == spec_of_config(CONFIGS["dots1"] | {"n_group": 4, "topk_group": 2})
    spec = open_source(rewritten(path, tmp_path / "less.gguf", without=tuple(f"dots1.{key}" for key in absent))).spec
    router = spec.moe(1).router
    assert (router.normalize, router.scaling, router.groups, router.kept_groups) == (False, 1.0, 1, 1)
    assert spec.layers == spec_of_config(CONFIGS["dots1"] | {"norm_topk_prob": False, "routed_scaling_factor": 1.0}).layers
    for key in ("expert_shared_count", "expert_feed_forward_length", "expert_count", "feed_forward_length"):
        with pytest.raises(ConvertError, match=rf"'dots1\.{key}' is missing"):
            open_source(rewritten(path, tmp_path / f"{key}.gguf", without=(f"dots1.{key}",)))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("expert_gating_func", 1, r"'dots1\.expert_gating_func' is 1"),
        ("attention.scale", 0.5, r"'dots1\.attention\.scale' is not supported"),
        ("rope.dimension_count", 8, r"'dots1\.rope\.dimension_count' is 8"),
        ("expert_shared_count", 1, r"tensor 'blk\.1\.ffn_gate_shexp\.weight' has shape"),
        ("leading_dense_block_count", 2, r"tensor 'blk\.1\.ffn_gate\.weight' is missing"),
    ],
)
def test_files_that_are_not_understood_are_refused_by_name(tmp_path, key, value, named):
    with pytest.raises(ConvertError, match=named):
        open_source(rewritten(exported(tmp_path), tmp_path / "other.gguf", [(f"dots1.{key}", value)])).check()
