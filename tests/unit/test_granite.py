"""Granite: multipliers and score scales in the decoder, stacked tensors of experts, what GGUF files say and leave out."""

from __future__ import annotations

from functools import partial
from math import sqrt
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from elmoe import bitslice
from elmoe.bitslice.moe import expert_matrices
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.source import open_source
from elmoe.errors import ConvertError, ModelError
from elmoe.models import FAMILIES, spec_of_config
from elmoe.models.gguf import gguf_family
from elmoe.models.spec import Multipliers
from elmoe.models.support import check_supported
from elmoe.store import open_store
from tests.checkpoints import random_weights, write_checkpoint
from tests.family_configs import CONFIGS
from tests.parity import float_backend, harness
from tests.tiny import TinyReader
from tests.unit.test_dense import rewritten

NAMES = ("granitemoe", "granitemoeshared", "granite")
IDS = np.arange(1, 40, dtype=np.int32)


def file(folder, name):
    """A GGUF file of a configuration."""
    convert_checkpoint(write_checkpoint(folder / "source", CONFIGS[name]), folder / "store")
    with open_store(folder / "store") as reader:
        export_store(reader, folder / "model.gguf")
    return folder / "model.gguf"


@pytest.mark.parametrize("name", ["granitemoe", "granitemoeshared"])
def test_gates_lie_above_ups(tmp_path, name):
    config, prefix = CONFIGS[name], "model.layers.1.block_sparse_moe."
    weights = random_weights(config)
    width = config["intermediate_size"]
    assert weights[f"{prefix}input_linear.weight"].shape == (config["num_local_experts"], 2 * width, 64)
    convert_checkpoint(write_checkpoint(tmp_path / "source", config, weights), tmp_path / "store")

    def near(matrix, values):
        return matrix.rows == len(values) and np.abs(matrix.dequantize() - values).max() < 0.01

    with open_store(tmp_path / "store") as reader:
        layout, addresses = reader.expert_layout(1), reader.expert_addresses(1)
        for expert in range(config["num_local_experts"]):
            found = expert_matrices(layout, addresses, expert, False)
            gate_up = weights[f"{prefix}input_linear.weight"][expert]
            assert near(found["gate"], gate_up[:width]) and near(found["up"], gate_up[width:])
            assert near(found["down"], weights[f"{prefix}output_linear.weight"][expert])
        if name == "granitemoeshared":
            found = expert_matrices(reader.expert_layout(1, True), reader.expert_addresses(1, True), 0, False)
            gate_up = weights["model.layers.1.shared_mlp.input_linear.weight"]
            assert gate_up.shape == (128, 64)
            assert near(found["gate"], gate_up[:64]) and near(found["up"], gate_up[64:])
            assert near(found["down"], weights["model.layers.1.shared_mlp.output_linear.weight"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["input_linear", "output_linear", "q_proj"])
def test_a_tensor_of_another_shape_is_named(tmp_path, name, where):
    weights = random_weights(CONFIGS[name])
    named = next((one for one in weights if where in one), None)
    if named is None:
        assert name == "granite"
        return
    weights[named] = weights[named][..., :-1]
    with pytest.raises(ConvertError, match=f"'{named}' has shape"):
        open_source(write_checkpoint(tmp_path / "source", CONFIGS[name], weights)).check()


def logits(spec, backend, **changes):
    """Of a tiny model of one seed, with other parts in all layers or other multipliers."""
    attention = changes.pop("attention", {})
    layers = tuple(
        msgspec.structs.replace(layer, attention=msgspec.structs.replace(layer.attention, **attention))
        for layer in spec.layers
    )
    reader = TinyReader(msgspec.structs.replace(spec, layers=layers, **changes), seed=4)
    return harness.decoder_logits(reader, backend, IDS, 13)


@pytest.mark.parametrize("name", NAMES)
def test_every_multiplier_counts(name):
    """Each of them changes the logits; those are divided by ``logits``, but for the rounding of the division."""
    spec = spec_of_config(CONFIGS[name])
    found = logits(spec, bitslice)
    for part in Multipliers.__struct_fields__:
        other = msgspec.structs.replace(spec.multipliers, **{part: 2.0})
        assert not np.allclose(logits(spec, bitslice, multipliers=other), found, rtol=0.05)
    assert not np.allclose(logits(spec, bitslice, attention={"score_scale": 0.7}), found, rtol=0.05)
    usual = logits(spec, bitslice, attention={"score_scale": None})
    assert np.array_equal(usual, logits(spec, bitslice, attention={"score_scale": 0.25}))
    whole = msgspec.structs.replace(spec.multipliers, logits=1.0)
    exact = logits(spec, float_backend, multipliers=whole)
    assert np.allclose(logits(spec, float_backend), exact / 6, rtol=1e-6, atol=1e-6)


def test_a_residual_multiplier_is_one_of_what_layers_add():
    """The same model with 0.5, and with outputs of layers that are half as large (a power of two: scales lose nothing)."""
    spec = spec_of_config(CONFIGS["granitemoeshared"])
    half = msgspec.structs.replace(spec, multipliers=Multipliers(embedding=3.0, residual=0.5))
    whole = msgspec.structs.replace(spec, multipliers=Multipliers(embedding=3.0))
    readers = TinyReader(half, seed=4), TinyReader(whole, seed=4)
    found, other = (harness.decoder_logits(reader, float_backend, IDS) for reader in readers)
    assert not np.allclose(found, other, rtol=0.05)
    reader = readers[1]
    for name, matrix in reader._nested.items():
        if name.endswith("attention_output"):
            reader._nested[name] = matrix.__class__.from_weights(matrix.dequantize() / 2)
    halved = Halved(reader)
    assert np.allclose(harness.decoder_logits(halved, halved.backend(), IDS), found, rtol=1e-5, atol=1e-7)


class Halved:
    """A reader whose experts add half of what they compute."""

    def __init__(self, reader):
        self._reader = reader

    def __getattr__(self, name):
        return getattr(self._reader, name)

    def backend(self):
        """The float backend, with feed-forwards that add half."""

        def half(layout, addresses, hidden, experts, weights, x, *rest, **named):
            float_backend.expert_ffn(layout, addresses, hidden, experts, weights * 0.5, x, *rest, **named)

        operations = float_backend.forward.keywords["operations"]._replace(expert_ffn=half)
        return SimpleNamespace(**vars(float_backend) | {"forward": partial(bitslice.forward, operations=operations)})


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-4, 1e4, float("nan")])
def test_multipliers_are_bounded(value):
    for name in Multipliers.__struct_fields__:
        with pytest.raises(ModelError, match=rf"multipliers\.{name} is {value}, allowed is 0\.001\.\.1000"):
            Multipliers(**{name: value})
    attention = spec_of_config(CONFIGS["granite"]).layers[0].attention
    if not 1e-6 <= value <= 1e12:
        with pytest.raises(ModelError, match=r"attention\.score_scale is"):
            msgspec.structs.replace(attention, score_scale=value)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("granitemoe", {"shared_intermediate_size": 32}, "'shared_intermediate_size' is 32"),
        ("granitemoe", {"activation_function": "gelu"}, "'activation_function' is 'gelu'"),
        ("granitemoe", {"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ("granitemoe", {"position_embedding_type": "nope"}, "'position_embedding_type' is 'nope'"),
        ("granitemoe", {"attention_multiplier": 0}, "'attention_multiplier' is 0"),
        ("granitemoe", {"embedding_multiplier": -1}, "'embedding_multiplier' is -1"),
        ("granitemoe", {"residual_multiplier": 1e9}, r"multipliers\.residual is 1000000000\.0"),
        ("granitemoe", {"logits_scaling": "6"}, "'logits_scaling' is '6'"),
        ("granitemoe", {"num_experts_per_tok": 9}, "'num_experts_per_tok' is 9"),
        ("granitemoeshared", {"shared_intermediate_size": 0}, "'shared_intermediate_size' is 0"),
        ("granite", {"mlp_bias": True}, "biases of feed-forwards"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(name, changes, named):
    with pytest.raises(ModelError, match=named):
        check_supported(spec_of_config(CONFIGS[name] | changes))


def test_defaults_are_those_of_transformers():
    absent = dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"))
    spec = spec_of_config(CONFIGS["granitemoe"] | absent)
    assert spec.multipliers == Multipliers() and spec.layers[0].attention.score_scale == 1.0


def test_multipliers_beside_norms_within_layers_are_refused():
    for name, kind in (("olmoe", "norms of queries and keys"), ("deepseek_v3", "latent attention")):
        spec = spec_of_config(CONFIGS[name])
        with pytest.raises(ModelError, match=f"multipliers of a model with {kind}"):
            check_supported(msgspec.structs.replace(spec, multipliers=Multipliers(residual=0.5)))


def test_files_without_a_scale_have_the_usual_one(tmp_path):
    """As llama.cpp takes them; the scale of logits it needs."""
    path = file(tmp_path, "granitemoe")
    for absent in ("attention.scale", "embedding_scale", "residual_scale"):
        without = (f"granitemoe.{absent}", "granitemoe.attention.key_length")
        spec = open_source(rewritten(path, tmp_path / f"{absent}.gguf", without=without)).spec
        assert spec.layers[0].attention.score_scale == (1 / sqrt(16) if absent == "attention.scale" else 0.3)
        assert spec.multipliers.embedding == (1.0 if absent == "embedding_scale" else 12.0)
        assert spec.multipliers.residual == (1.0 if absent == "residual_scale" else 0.22)
        assert spec.multipliers.logits == 6.0
    with pytest.raises(ConvertError, match=r"'granitemoe\.logit_scale' is missing"):
        open_source(rewritten(path, tmp_path / "none.gguf", without=("granitemoe.logit_scale",)))


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("rope.scaling.finetuned", False, r"'granitemoe\.rope\.scaling\.finetuned' is False"),
        ("attention.scale", 0.0, r"'granitemoe\.attention\.scale' is 0\.0"),
        ("residual_scale", -1.0, r"'granitemoe\.residual_scale' is -1"),
        ("expert_weights_scale", 2.0, r"'granitemoe\.expert_weights_scale' is 2"),
        ("expert_gating_func", 2, r"'granitemoe\.expert_gating_func' is 2"),
        ("attention.clamp_kqv", 2.0, r"'granitemoe\.attention\.clamp_kqv' is not supported"),
        ("expert_shared_feed_forward_length", 48, r"tensor 'blk\.0\.ffn_gate_shexp\.weight' is missing"),
    ],
)
def test_files_that_are_not_understood_are_refused_by_name(tmp_path, key, value, named):
    path = rewritten(file(tmp_path, "granitemoe"), tmp_path / "other.gguf", [(f"granitemoe.{key}", value)])
    with pytest.raises(ConvertError, match=named):
        open_source(path).check()


def test_one_architecture_is_two_families():
    families, name = FAMILIES.values(), "granitemoe"
    key = "granitemoe.expert_shared_feed_forward_length"
    assert gguf_family({"general.architecture": name}, families)[0].name == "granitemoe"
    assert gguf_family({"general.architecture": name, key: 0}, families)[0].name == "granitemoe"
    assert gguf_family({"general.architecture": name, key: 64}, families)[0].name == "granitemoeshared"
    with pytest.raises(ModelError, match="'granite' with experts is not supported"):
        gguf_family({"general.architecture": "granite", "granite.expert_count": 8}, families)
