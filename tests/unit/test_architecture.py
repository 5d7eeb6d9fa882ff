"""Model shapes from published configurations, against published totals; damaged configurations are named."""

from __future__ import annotations

import json
from importlib.resources import files

import msgspec
import pytest

from elmoe.errors import HardwareError
from elmoe.schema.architecture import Architecture, architecture_names, architecture_of_config, load_architecture

# Published total and active parameters (model cards and reports), and how many of the embedding table and the output head
# the active count includes: publishers differ.
PUBLISHED = {
    "qwen3-30b-a3b": (30.5e9, 3.3e9, 2),
    "qwen3-235b-a22b": (235e9, 22e9, 2),
    "deepseek-v2-lite": (15.7e9, 2.4e9, 1),
    "deepseek-v3": (671e9, 37e9, 1),
    "kimi-k2": (1.04e12, 32.6e9, 2),
    "gpt-oss-20b": (20.9e9, 3.61e9, 1),
    "gpt-oss-120b": (116.8e9, 5.13e9, 1),
    "olmoe-1b-7b": (6.92e9, 1.3e9, 2),
    "mixtral-8x7b": (46.7e9, 12.9e9, 2),
    "glm-4.5-air": (106e9, 12e9, 0),
    "glm-4.7-flash": (30e9, 3e9, 0),  # its name, "30B-A3B", rounded
    "qwen2.5-coder-7b": (7.61e9, 7.61e9, 2),
}


def config(name: str, **changes: object) -> dict:
    data = json.loads((files("elmoe.presets") / "models" / f"{name}.json").read_text())
    return {key: value for key, value in (data | changes).items() if value != "absent"}


def test_every_preset_has_a_published_total_here_and_a_source():
    assert set(architecture_names()) == set(PUBLISHED)
    for name in architecture_names():
        assert len(load_architecture(name).source) > 30, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    total, active, tables = PUBLISHED[name]
    model = load_architecture(name)
    assert model.parameters == pytest.approx(total, rel=0.014)
    assert model.active_parameters + (tables - 1) * model.embedding_parameters == pytest.approx(
        active, rel=0.1 if name == "glm-4.7-flash" else 0.03
    )


def test_the_prediction_module_explains_the_size_of_the_glm_checkpoint():
    """31.2e9 is what trainers state for the checkpoint, which repeats embedding, head and one expert layer."""
    model = load_architecture("glm-4.7-flash")
    module = model.moe_layer_parameters + model.experts * model.expert_parameters + 2 * model.embedding_parameters
    assert model.parameters + module + 2 * model.hidden**2 == pytest.approx(31.2e9, rel=0.003)


def test_qwen3_30b_by_hand():
    model = load_architecture("qwen3-30b-a3b")
    assert (model.layers, model.moe_layers, model.dense_layers, model.experts, model.top_k) == (48, 48, 0, 128, 8)
    assert model.expert_parameters == 3 * 2048 * 768
    assert model.attention_parameters == 2048 * 128 * (32 + 4 + 4 + 32)
    assert model.kv_bytes_per_position == 2 * 4 * 128 * 2 and model.kv_bytes_per_token == 48 * 2048
    assert model.attention_width == 32 * 256
    assert model.msb_bytes == model.expert_parameters // 32 * 18 and model.lsb_bytes == model.expert_parameters // 32 * 16
    assert model.expert_bytes == model.msb_bytes + model.lsb_bytes


def test_latent_attention_by_hand():
    model = load_architecture("deepseek-v2-lite")
    assert (model.dense_layers, model.dense_width, model.shared_width) == (1, 10944, 2 * 1408)
    query, down, up, out = 2048 * 16 * 192, 2048 * (512 + 64), 512 * 16 * (128 + 128), 16 * 128 * 2048
    assert model.attention_parameters == query + down + up + out
    assert model.kv_bytes_per_position == 2 * 576 and model.attention_width == 16 * (576 + 512)
    compressed = load_architecture("deepseek-v3")
    query = 7168 * 1536 + 1536 * 128 * 192
    assert compressed.attention_parameters == query + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168


def test_mxfp4_has_no_bit_axis():
    model = load_architecture("gpt-oss-20b")
    assert (model.expert_bits, model.msb_bits, model.lsb_bits, model.lsb_bytes) == (4.25, 4.25, 0.0, 0.0)
    assert model.expert_bytes == model.msb_bytes


def test_a_dense_model_has_no_experts():
    model = load_architecture("qwen2.5-coder-7b")
    assert (model.moe_layers, model.experts, model.dense_layers) == (0, 0, 28)
    assert model.active_bytes == pytest.approx(model.total_bytes - model.head_bytes, rel=1e-4)


@pytest.mark.parametrize("name", architecture_names())
def test_bytes_are_parameters_times_bits(name):
    model = msgspec.structs.replace(
        load_architecture(name), expert_bits=16.0, msb_bits=16.0, lsb_bits=0.0, dense_bits=16.0, router_bits=16.0
    )
    assert model.total_bytes == 2 * model.parameters
    assert model.active_bytes == 2 * (model.active_parameters + model.hidden)


def test_interleaved_dense_layers_are_counted():
    sparse = architecture_of_config(config("qwen3-30b-a3b", mlp_only_layers=[1], decoder_sparse_step=2), "m", "config.json")
    assert (sparse.moe_layers, sparse.dense_layers, sparse.dense_width) == (23, 25, 6144)
    spaced = architecture_of_config(config("deepseek-v2-lite", moe_layer_freq=2), "m", "config.json")
    assert (spaced.moe_layers, spaced.dense_layers) == (13, 14)
    kinds = ["dense", "dense", *["sparse"] * 45]
    listed = architecture_of_config(config("glm-4.7-flash", mlp_layer_types=kinds), "m", "config.json")
    assert (listed.moe_layers, listed.dense_layers) == (45, 2)


def test_tied_embeddings_are_counted_once():
    tied = architecture_of_config(config("olmoe-1b-7b", tie_word_embeddings=True), "m", "config.json")
    untied = load_architecture("olmoe-1b-7b")
    assert untied.parameters - tied.parameters == untied.embedding_parameters
    assert untied.total_bytes - tied.total_bytes == untied.head_bytes


def test_a_file_and_a_folder_load_as_the_preset_does(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config("mixtral-8x7b")))
    expected = msgspec.structs.replace(load_architecture("mixtral-8x7b"), name="my-model")
    assert load_architecture(folder) == load_architecture(str(folder / "config.json")) == expected
    (tmp_path / "other.json").write_text(json.dumps(config("mixtral-8x7b", _source="absent")))
    assert load_architecture(tmp_path / "other.json").name == "other"
    assert load_architecture(tmp_path / "other.json").source.endswith("other.json")


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen3-30b-a3b", {"model_type": "absent"}, "has no 'model_type'"),
        ("qwen3-30b-a3b", {"model_type": "jamba"}, "'jamba'"),
        ("qwen3-30b-a3b", {"model_type": ["qwen2"]}, "unknown family"),
        ("qwen3-30b-a3b", {"num_experts": "absent"}, "has no 'num_experts'"),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, "top 129 of 128"),
        ("qwen3-30b-a3b", {"hidden_size": 0}, "'hidden_size' is 0"),
        ("qwen3-30b-a3b", {"hidden_size": -2048}, "'hidden_size' is -2048"),
        ("qwen3-30b-a3b", {"hidden_size": 2048.0}, "'hidden_size' is 2048.0"),
        ("qwen3-30b-a3b", {"hidden_size": True}, "'hidden_size' is True"),
        ("qwen3-30b-a3b", {"hidden_size": 1 << 21}, "hidden is 2097152"),
        ("qwen3-30b-a3b", {"num_hidden_layers": 5000}, "layers is 5000"),
        ("qwen3-30b-a3b", {"vocab_size": "many"}, "'vocab_size' is 'many'"),
        ("qwen3-30b-a3b", {"mlp_only_layers": 3}, "'mlp_only_layers'"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0"),
        ("mixtral-8x7b", {"num_attention_heads": 31}, "'head_dim'"),
        ("mixtral-8x7b", {"num_key_value_heads": None}, "'num_key_value_heads'"),
        ("deepseek-v3", {"kv_lora_rank": "absent"}, "has no 'kv_lora_rank'"),
        ("deepseek-v3", {"first_k_dense_replace": "absent"}, "'first_k_dense_replace'"),
        ("glm-4.7-flash", {"mlp_layer_types": ["dense"]}, "'mlp_layer_types'"),
    ],
)
def test_a_bad_configuration_is_named(name, changes, named):
    with pytest.raises(HardwareError) as caught:
        architecture_of_config(config(name, **changes), "m", "there/config.json")
    assert "there/config.json" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"model_type": "qwen2"}', "\x00"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(HardwareError, match=r"config\.json"):
        load_architecture(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(HardwareError, match="not text"):
        load_architecture(path)


def test_a_huge_or_missing_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(" " * ((1 << 20) + 1))
    with pytest.raises(HardwareError, match="larger than 1 MiB"):
        load_architecture(path)
    with pytest.raises(HardwareError, match="no model 'gpt-5'") as caught:
        load_architecture("gpt-5")
    assert "qwen3-30b-a3b" in str(caught.value.hint)


def test_slices_must_sum_to_the_expert():
    with pytest.raises(HardwareError, match="must sum to expert_bits"):
        msgspec.structs.replace(load_architecture("qwen3-30b-a3b"), expert_bits=16.0)
    assert isinstance(load_architecture("qwen3-30b-a3b"), Architecture)
