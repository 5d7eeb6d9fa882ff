"""OLMoE (``OlmoeForCausalLM``, GGUF ``olmoe``): queries and keys normed over all heads, experts of a softmax router."""

from __future__ import annotations

from elmoe.errors import ModelError
from elmoe.models.common import (
    EXPERT_KEYS,
    EXPERTS_REQUIRED,
    GROUPED_KEYS,
    choice,
    experts_fixed,
    experts_metadata,
    grouped_attention,
    model,
    one_layer,
)
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import EXPERTS, EXPERTS_GGUF, GROUPED, GROUPED_GGUF
from elmoe.models.spec import GroupedAttention, LayerSpec, ModelSpec, Moe, Router


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    config.must_be("clip_qkv", None)
    bias = config.flag("attention_bias", False)
    attention = grouped_attention(config, query_key_norm="full", query_key_value_bias=bias, output_bias=bias)
    experts, top_k = choice(config, "num_experts", "num_local_experts")
    router = Router(experts=experts, top_k=top_k, normalize=config.flag("norm_topk_prob", False))
    layer = LayerSpec(attention=attention, feed_forward=Moe(router=router, width=config.integer("intermediate_size")))
    return model(config, FAMILY.name, [layer] * config.layers(), epsilon=1e-5, positions=4096)


def _metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    """ModelError too where llama.cpp could not load the file: its norm of keys is as wide as that of queries."""
    attention = one_layer(spec).attention
    assert isinstance(attention, GroupedAttention)
    if attention.heads != attention.kv_heads:
        raise ModelError(
            f"{attention.heads} heads of queries share {attention.kv_heads} of keys and values",
            "the architecture 'olmoe' has as many of both: this model cannot be written as GGUF",
        )
    return experts_metadata(spec, normalize=False)


FAMILY = Family(
    name="olmoe",
    architectures=("OlmoeForCausalLM",),
    read_config=read_config,
    names=GROUPED | EXPERTS,
    gguf=GgufFamily(
        architecture="olmoe",
        flags={"attention_bias": "attention_output_bias"},
        keys=GROUPED_KEYS | EXPERT_KEYS,
        required=EXPERTS_REQUIRED,
        names=GROUPED_GGUF | EXPERTS_GGUF,
        metadata=_metadata,
        fixed=experts_fixed,
    ),
)
