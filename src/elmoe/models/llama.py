"""Llama and SmolLM2 (``LlamaForCausalLM``), dense: grouped-query attention and one SwiGLU feed-forward in every layer.

GGUF's ``llama`` is Mixtral too, which has experts. It rotates neighbours where the checkpoint rotates halves, so the rows of
queries and keys are in another order there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elmoe.models.common import GROUPED_KEYS, GROUPED_REQUIRED, grouped_attention, grouped_fixed, grouped_metadata, model
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import GROUPED, GROUPED_GGUF, NEIGHBOURS
from elmoe.models.spec import Dense, LayerSpec, ModelSpec


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    bias = config.flag("attention_bias", False)
    attention = grouped_attention(config, query_key_value_bias=bias, output_bias=bias)
    dense = Dense(width=config.integer("intermediate_size"), bias=config.flag("mlp_bias", False))
    layer = LayerSpec(attention=attention, feed_forward=dense)
    return model(config, FAMILY.name, [layer] * config.layers(), epsilon=1e-6, positions=2048)


def _without_experts(metadata: Mapping[str, Any]) -> bool:
    return not metadata.get("llama.expert_count")


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read_config=read_config,
    names=GROUPED,
    gguf=GgufFamily(
        architecture="llama",
        flags={"attention_bias": "attention_output_bias"},
        keys=GROUPED_KEYS,
        required=GROUPED_REQUIRED,
        names=GROUPED_GGUF,
        metadata=grouped_metadata,
        fixed=grouped_fixed,
        recognise=_without_experts,
        neighbours=NEIGHBOURS,
    ),
)
