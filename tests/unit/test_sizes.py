"""Sizes of published models: equal to frozen values, against published totals, by hand; damaged configurations are named."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import msgspec
import pytest

from elmoe.errors import ModelError
from elmoe.models import spec_of_config
from elmoe.models.load import load_model, model_names, model_of_config
from elmoe.models.sizes import DEFAULTS, ModelSizes, attention_parameters
from elmoe.models.spec import Dense, GroupedAttention, LayerSpec, ModelSpec, Moe, Rope, Router
from elmoe.models.tensors import check_formats, feed_forward, tensors
from tests.checkpoints import tiny_config

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "sizes.json").read_text())
"""What the simulator computed of every preset when it had a description of models of its own."""

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
    "dots.llm1": (142.8e9, 14e9, 2),
    "glm-4.5-air": (106e9, 12e9, 0),
    "glm-4.7-flash": (30e9, 3e9, 0),
    "qwen2.5-coder-7b": (7.61e9, 7.61e9, 2),
    "qwen3-0.6b": (0.596e9, 0.44e9, 0),  # its card counts the tied embedding in the total alone
    "smollm2-135m": (135e6, 135e6, 1),
    "qwen1.5-moe-a2.7b": (14.3e9, 2.7e9, 2),
    "mixtral-8x22b": (141e9, 39e9, 2),
    "qwen2-57b-a14b": (57.4e9, 14.2e9, 2),
    "qwen3-coder-480b-a35b": (480e9, 35e9, 2),
    "granite-3.1-1b-a400m": (1.3e9, 0.4e9, 1),
    "granite-3.1-8b": (8.1e9, 8.1e9, 1),
}

ROUNDED = ("glm-4.7-flash", "granite-3.1-1b-a400m")
"""Whose published numbers are their names: "30B-A3B", "1B-A400M" (1.3B on its card)."""


def config(name: str, **changes: object) -> dict:
    data = json.loads((files("elmoe.presets") / "models" / f"{name}.json").read_text())
    return {key: value for key, value in (data | changes).items() if value != "absent"}


def test_every_preset_has_frozen_values():
    """The message is what to add for a new preset, once its totals are the published ones."""
    assert not set(GOLDEN) - set(model_names())
    missing = {name: numbers_of(load_model(name)) for name in model_names() if name not in GOLDEN}
    assert not missing, json.dumps(missing, indent=1)


def numbers_of(model: ModelSizes) -> dict[str, object]:
    """What is frozen of a model."""
    spec, last = model.spec, model.layers[-1]
    dense = next((layer for layer in model.layers if layer.dense_parameters), None)
    experts = spec.layers[-1].feed_forward if spec.experts else None
    mine = {
        "layers": len(spec.layers), "hidden": spec.hidden, "vocabulary": spec.vocabulary, "experts": spec.experts,
        "moe_layers": len(spec.moe_layers), "dense_layers": len(spec.dense_layers), "top_k": spec.top_k,
        "expert_width": last.expert_width, "shared_width": experts.shared_width if experts else 0,
        "dense_width": dense.dense_parameters // (3 * spec.hidden) if dense else 0,
        "tied_embeddings": spec.tied_embeddings, "kv_bytes_per_token": spec.kv_bytes_per_position,
        "dense_bits": sum(model.head_precision.bits), "router_bits": last.router_bits,
        "dense_ffn_parameters": dense.dense_parameters if dense else 0, "embedding_parameters": model.embedding_parameters,
        **{key: getattr(last, key) for key in ("attention_parameters", "attention_width", "expert_parameters")},
        **{key: getattr(last, key) for key in ("router_parameters", "shared_parameters")},
        **{key: getattr(model, key) for key in ("head_bytes", "dense_bytes", "total_bytes", "active_bytes")},
        **{key: getattr(model, key) for key in ("parameters", "active_parameters")},
        "kv_bytes_per_position": last.kv_bytes,
    }  # fmt: skip
    if spec.experts:
        mine |= {key: getattr(model.expert, key) for key in ("msb_bytes", "lsb_bytes", "expert_bytes")}
        msb, *lsb = last.expert_bits
        mine |= {"expert_bits": sum(last.expert_bits), "msb_bits": msb, "lsb_bits": sum(lsb)}
        mine |= {"moe_layer_parameters": last.parameters, "moe_layer_bytes": last.bytes}
    if dense:
        mine |= {"dense_layer_parameters": dense.parameters, "dense_layer_bytes": dense.bytes}
    return mine


@pytest.mark.parametrize("name", GOLDEN)
def test_every_number_is_the_frozen_one(name):
    """Exactly: the simulator's results depend on the last bit."""
    model, frozen = load_model(name), dict(GOLDEN[name])
    spec, mine = model.spec, numbers_of(model)
    dense = next((layer for layer in model.layers if layer.dense_parameters), None)
    # The old description had values of layers and experts even where the model does not have them.
    absent = (() if spec.experts else ("moe_", "expert_", "msb_", "lsb_")) + (() if dense else ("dense_layer_",))
    unused = {key for key in frozen.keys() - mine.keys() if key.startswith(absent)}
    assert mine == {key: value for key, value in frozen.items() if key not in unused}
    assert len({(layer.attention_parameters, layer.attention_width, layer.kv_bytes) for layer in model.layers}) == 1


def test_sizes_are_sums_over_layers_that_differ():
    """Every layer has other heads and another feed-forward."""

    def layer(heads: int, feed_forward: Moe | Dense) -> LayerSpec:
        attention = GroupedAttention(heads=heads, kv_heads=2, head_dim=32, rope=Rope(theta=1e4, dimensions=32))
        return LayerSpec(attention=attention, feed_forward=feed_forward)

    moe = Moe(router=Router(experts=8, top_k=2), width=96, shared_width=64, shared_gate=True)
    layers = (layer(2, Dense(width=160)), layer(4, moe), layer(6, Dense(width=224)), layer(8, moe))
    spec = ModelSpec(
        family="test", vocabulary=100, hidden=64, layers=layers, norm_epsilon=1e-6, max_positions=8, tied_embeddings=True
    )
    model = ModelSizes(spec=spec, name="m", source="test", formats={"layers.2.dense_ffn": "table4"})
    attention = sum(2 * 64 * 32 * (heads + 2) for heads in (2, 4, 6, 8))
    shared, routers = 2 * (3 * 64 * 64 + 64), 2 * 64 * 8
    expert, dense = 3 * 64 * 96, 3 * 64 * (160 + 224)
    assert model.parameters == attention + shared + routers + dense + 2 * 8 * expert + 6400
    assert model.active_parameters == attention + shared + routers + dense + 2 * 2 * expert + 6400
    narrow = 3 * 64 * 224
    fixed = (attention + shared + dense - narrow + 6400) * 8.5 / 8 + routers * 4 + narrow * 4.25 / 8
    assert model.dense_bytes == fixed
    assert model.total_bytes == fixed + 16 * expert * 8.5 / 8
    assert model.active_bytes == fixed + 4 * expert * 8.5 / 8 + 64 * 8.5 / 8
    assert spec.kv_bytes_per_position == sum(one.kv_bytes for one in model.layers) == 4 * 2 * 2 * 2 * 32
    other = msgspec.structs.replace(model, formats={"layers.3.experts": "table4"})
    assert other.total_bytes == model.total_bytes + narrow * 4.25 / 8 - 8 * expert * 4.25 / 8
    with pytest.raises(ModelError, match="differ in the size of their experts"):
        _ = other.expert
    named = {"layers.1.query_key_value": "planes6", "layers.3.shared_ffn": "table4_mx", "embedding": "affine4_k"}
    mixed = msgspec.structs.replace(model, formats=model.formats | named)
    saved = 64 * 32 * (4 + 4) * (8.5 - 6.5625) + 3 * 64 * 64 * (8.5 - 4.25) + 64 * (8.5 - 4.25) + 6400 * (8.5 - 4.625)
    assert mixed.dense_bytes == pytest.approx(fixed - saved / 8)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen3-235b-a22b", "mixtral-8x7b", "olmoe-1b-7b", "gpt-oss-20b"])
def test_sizes_count_what_the_list_of_tensors_holds(name):
    """All but norms: the two know a model apart from each other."""
    model = load_model(name)
    listed = [tensor for tensor in tensors(model.spec) if not tensor.name.endswith("norm")]
    routers = sum(tensor.shape[0] * tensor.shape[1] for tensor in listed if tensor.name.endswith("router"))
    matrices = sum(tensor.shape[0] * tensor.shape[1] for tensor in listed if tensor.kind == "matrix")
    ffns = [feed_forward(model.spec, layer) for layer in range(len(model.spec.layers))]
    assert routers == sum(layer.router_parameters for layer in model.layers)
    assert model.parameters == routers + matrices + sum(ffn.count * 3 * ffn.hidden * ffn.width for ffn in ffns)
    attention = sum(attention_parameters(layer.attention, model.spec.hidden) for layer in model.spec.layers)
    assert matrices == attention + model.tables * model.embedding_parameters


def test_every_preset_has_a_published_total_here_and_a_source():
    assert set(model_names()) == set(PUBLISHED)
    for name in model_names():
        assert len(load_model(name).source) > 30, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    total, active, tables = PUBLISHED[name]
    model = load_model(name)
    assert model.parameters == pytest.approx(total, rel=0.03 if name in ROUNDED else 0.014)
    assert model.active_parameters + (tables - 1) * model.embedding_parameters == pytest.approx(
        active, rel=0.1 if name in ROUNDED else 0.03
    )


def test_the_prediction_module_explains_the_size_of_the_glm_checkpoint():
    """31.2e9 is what trainers state for the checkpoint, which repeats embedding, head and one expert layer."""
    model = load_model("glm-4.7-flash")
    layer = model.moe_layers[-1]
    module = layer.parameters + layer.experts * layer.expert_parameters + 2 * model.embedding_parameters
    assert model.parameters + module + 2 * model.spec.hidden**2 == pytest.approx(31.2e9, rel=0.003)


def test_qwen3_30b_by_hand():
    model = load_model("qwen3-30b-a3b")
    spec, layer = model.spec, model.layers[0]
    assert (len(spec.layers), len(spec.moe_layers), len(spec.dense_layers), spec.experts, spec.top_k) == (48, 48, 0, 128, 8)
    assert layer.expert_parameters == 3 * 2048 * 768
    assert layer.attention_parameters == 2048 * 128 * (32 + 4 + 4 + 32)
    assert layer.kv_bytes == 2 * 4 * 128 * 2 and spec.kv_bytes_per_position == 48 * 2048
    assert layer.attention_width == 32 * 256
    assert layer.msb_bytes == layer.expert_parameters // 32 * 18 and layer.lsb_bytes == layer.expert_parameters // 32 * 16
    assert layer.expert_bytes == layer.msb_bytes + layer.lsb_bytes
    assert set(model.layers) == {layer}


def test_latent_attention_by_hand():
    model = load_model("deepseek-v2-lite")
    first, layer = model.layers[0], model.layers[1]
    assert model.spec.dense_layers == (0,) and first.dense_parameters == 3 * 2048 * 10944 and first.experts == 0
    assert layer.shared_parameters == 3 * 2048 * 2 * 1408 and layer.dense_parameters == 0
    query, down, up, out = 2048 * 16 * 192, 2048 * (512 + 64), 512 * 16 * (128 + 128), 16 * 128 * 2048
    assert layer.attention_parameters == first.attention_parameters == query + down + up + out
    assert layer.kv_bytes == 2 * 576 and layer.attention_width == 16 * (576 + 512)
    compressed = load_model("deepseek-v3").layers[0]
    query = 7168 * 1536 + 1536 * 128 * 192
    assert compressed.attention_parameters == query + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168


def test_mxfp4_has_no_bit_axis():
    layer = load_model("gpt-oss-20b").expert
    assert (layer.expert_bits, layer.lsb_bytes) == ((4.25,), 0.0)
    assert layer.expert_bytes == layer.msb_bytes == layer.expert_parameters * 4.25 / 8


def test_a_dense_model_has_no_experts():
    model = load_model("qwen2.5-coder-7b")
    assert (model.moe_layers, model.spec.experts, len(model.spec.dense_layers)) == ((), 0, 28)
    assert model.active_bytes == pytest.approx(model.total_bytes - model.head_bytes, rel=1e-4)


@pytest.mark.parametrize("name", model_names())
def test_bytes_are_parameters_times_bits(name):
    model = msgspec.structs.replace(load_model(name), formats=dict.fromkeys(DEFAULTS, "bfloat16"))
    assert model.total_bytes == 2 * model.parameters
    assert model.active_bytes == 2 * (model.active_parameters + model.spec.hidden)


def test_interleaved_dense_layers_are_counted():
    sparse = model_of_config(config("qwen3-30b-a3b", mlp_only_layers=[1], decoder_sparse_step=2), "m", "config.json")
    assert (len(sparse.spec.moe_layers), len(sparse.spec.dense_layers)) == (23, 25)
    assert sparse.spec.moe_layers[:2] == (3, 5) and sparse.spec.layers[0].feed_forward.width == 6144
    spaced = model_of_config(config("deepseek-v2-lite", moe_layer_freq=2), "m", "config.json")
    assert (len(spaced.spec.moe_layers), len(spaced.spec.dense_layers)) == (13, 14)
    kinds = {"mlp_layer_types": ["dense", "dense", *["sparse"] * 45], "first_k_dense_replace": "absent"}
    listed = model_of_config(config("glm-4.7-flash", **kinds), "m", "config.json")
    assert (len(listed.spec.moe_layers), listed.spec.dense_layers) == (45, (0, 1))


def test_tied_embeddings_are_counted_once():
    tied = model_of_config(config("olmoe-1b-7b", tie_word_embeddings=True), "m", "config.json")
    untied = load_model("olmoe-1b-7b")
    assert untied.parameters - tied.parameters == untied.embedding_parameters
    assert untied.total_bytes - tied.total_bytes == untied.head_bytes


def test_a_file_and_a_folder_load_as_the_preset_does(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config("mixtral-8x7b")))
    expected = msgspec.structs.replace(load_model("mixtral-8x7b"), name="my-model")
    assert load_model(folder) == load_model(str(folder / "config.json")) == expected
    (tmp_path / "other.json").write_text(json.dumps(config("mixtral-8x7b", _source="absent")))
    assert load_model(tmp_path / "other.json").name == "other"
    assert load_model(tmp_path / "other.json").source.endswith("other.json")


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("qwen3-30b-a3b", {"model_type": "absent", "architectures": "absent"}, "no 'model_type'"),
        ("qwen3-30b-a3b", {"model_type": "jamba"}, "'jamba'"),
        ("qwen3-30b-a3b", {"model_type": ["qwen2"], "architectures": "absent"}, "not supported"),
        ("qwen3-30b-a3b", {"num_experts": "absent"}, "there is no 'num_experts'"),
        ("qwen3-30b-a3b", {"num_experts_per_tok": 129}, "'num_experts_per_tok' is 129, expected a whole number in 1..128"),
        ("qwen3-30b-a3b", {"hidden_size": 0}, "'hidden_size' is 0"),
        ("qwen3-30b-a3b", {"hidden_size": -2048}, "'hidden_size' is -2048"),
        ("qwen3-30b-a3b", {"hidden_size": 2048.0}, "'hidden_size' is 2048.0"),
        ("qwen3-30b-a3b", {"hidden_size": True}, "'hidden_size' is True"),
        ("qwen3-30b-a3b", {"hidden_size": 1 << 21}, "hidden is 2097152"),
        ("qwen3-30b-a3b", {"num_hidden_layers": 5000}, "'num_hidden_layers' is 5000"),
        ("qwen3-30b-a3b", {"vocab_size": "many"}, "'vocab_size' is 'many'"),
        ("qwen3-30b-a3b", {"mlp_only_layers": 3}, "'mlp_only_layers'"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "'decoder_sparse_step' is 0"),
        ("mixtral-8x7b", {"num_attention_heads": 24}, "'head_dim'"),
        ("mixtral-8x7b", {"num_key_value_heads": None}, "'num_key_value_heads'"),
        ("deepseek-v3", {"kv_lora_rank": "absent"}, "there is no 'kv_lora_rank'"),
        ("deepseek-v3", {"first_k_dense_replace": "absent"}, "'first_k_dense_replace'"),
        ("glm-4.7-flash", {"mlp_layer_types": ["dense"]}, "'mlp_layer_types'"),
    ],
)
def test_a_bad_configuration_is_named(name, changes, named):
    with pytest.raises(ModelError) as caught:
        model_of_config(config(name, **changes), "m", "there/config.json")
    assert "there/config.json" in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, '{"model_type": "qwen2"}', "\x00"])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ModelError, match="not text"):
        load_model(path)


def test_a_huge_or_missing_file_is_named(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(" " * ((1 << 20) + 1))
    with pytest.raises(ModelError, match="larger than 1 MiB"):
        load_model(path)
    with pytest.raises(ModelError, match="no model 'none'") as caught:
        load_model("none")
    assert "qwen3-30b-a3b" in str(caught.value.hint)


def test_a_format_that_is_unknown_or_of_nothing_is_named():
    model = load_model("deepseek-v2-lite")
    with pytest.raises(ModelError, match="'experts': there is no format 'nested9'"):
        msgspec.structs.replace(model, formats={"experts": "nested9"})
    with pytest.raises(ModelError, match=r"'layers\.0\.experts': .* does not have"):  # its first layer is dense
        msgspec.structs.replace(model, formats={"layers.0.experts": "nested8"})
    assert isinstance(msgspec.structs.replace(model, formats={"layers.0.dense_ffn": "table4"}), ModelSizes)


def test_norms_over_the_full_width_have_the_width_of_what_they_norm():
    spec = spec_of_config(tiny_config())
    attention = msgspec.structs.replace(spec.layers[0].attention, query_key_norm="full")
    layers = tuple(msgspec.structs.replace(layer, attention=attention) for layer in spec.layers)
    shapes = {tensor.name: tensor.shape for tensor in tensors(msgspec.structs.replace(spec, layers=layers))}
    assert shapes["layers.1.query_norm"] == (64,) and shapes["layers.1.key_norm"] == (32,)


@pytest.mark.parametrize("name", ["layers.0.experts", "layers.1.dense_ffn", "embedding", "final_norm", "layers.9.experts"])
def test_formats_that_a_tensor_cannot_have_are_named(name):
    spec = spec_of_config(tiny_config(mlp_only_layers=[1]))
    with pytest.raises(ModelError, match=name):
        check_formats(spec, {name: "table4"})
    check_formats(spec, {"layers.0.experts": "nested8", "final_norm": "float32"})
    with pytest.raises(ModelError, match=r"layers\.9\.experts.*does not have"):
        check_formats(spec, {"layers.9.experts": "nested8"})
