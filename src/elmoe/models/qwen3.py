"""Qwen3 (``Qwen3ForCausalLM``, GGUF ``qwen3``), dense: as Qwen3-MoE, with one feed-forward in place of experts."""

from __future__ import annotations

from elmoe.models.common import GROUPED_KEYS, GROUPED_REQUIRED, grouped_attention, grouped_fixed, grouped_metadata, model
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import GROUPED, GROUPED_GGUF
from elmoe.models.spec import Dense, LayerSpec, ModelSpec


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config = config.defaulted(head_dim=128)  # as in transformers, whatever the hidden size
    config.must_be("hidden_act", "silu")
    config.must_be("use_sliding_window", False)
    layers, bias = config.layers(), config.flag("attention_bias", False)
    attention = grouped_attention(config, query_key_norm="head", query_key_value_bias=bias, output_bias=bias)
    dense = Dense(width=config.integer("intermediate_size"))
    layer = LayerSpec(attention=attention, feed_forward=dense)
    return model(config, FAMILY.name, [layer] * layers, epsilon=1e-6, positions=32768)


FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read_config=read_config,
    names=GROUPED,
    gguf=GgufFamily(
        architecture="qwen3",
        flags={"attention_bias": "attention_output_bias"},
        keys=GROUPED_KEYS,
        required=GROUPED_REQUIRED,
        names=GROUPED_GGUF,
        metadata=grouped_metadata,
        fixed=grouped_fixed,
    ),
)
