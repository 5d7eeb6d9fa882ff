"""Qwen2 and Qwen2.5 (``Qwen2ForCausalLM``, GGUF ``qwen2``), dense: biases of queries, keys and values, and perhaps a
window in the last layers."""

from __future__ import annotations

import msgspec

from elmoe.models.common import GROUPED_KEYS, GROUPED_REQUIRED, grouped_attention, grouped_fixed, grouped_metadata, model
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import GROUPED, GROUPED_GGUF
from elmoe.models.spec import Dense, LayerSpec, ModelSpec


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    layers, attention = config.layers(), grouped_attention(config, query_key_value_bias=True)
    dense, kinds = Dense(width=config.integer("intermediate_size")), ["full_attention"] * layers
    if config.flag("use_sliding_window", False):
        first = config.integer("max_window_layers", default=28, least=0)
        kinds = ["sliding_attention" if index >= first else "full_attention" for index in range(layers)]
    elif "sliding_attention" in (config.words("layer_types", layers, ("full_attention", "sliding_attention")) or ()):
        config.fail("'layer_types' names 'sliding_attention', and 'use_sliding_window' is not true")
    specs = (
        LayerSpec(attention=msgspec.structs.replace(attention, window=window), feed_forward=dense)
        for window in config.windows(layers, kinds)
    )
    return model(config, FAMILY.name, specs, epsilon=1e-6, positions=32768)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    read_config=read_config,
    names=GROUPED,
    gguf=GgufFamily(
        architecture="qwen2",
        keys=GROUPED_KEYS,
        required=GROUPED_REQUIRED,
        names=GROUPED_GGUF,
        metadata=grouped_metadata,
        fixed=grouped_fixed,
    ),
)
