"""GLM-4.5 and 4.6 (``Glm4MoeForCausalLM``, GGUF ``glm4moe``): half of a head is
rotated, DeepSeek-V3's router."""

from __future__ import annotations

from elmoe.models.common import (
    GROUPED_KEYS,
    GROUPED_REQUIRED,
    ROUTED_KEYS,
    ROUTED_REQUIRED,
    attention_fixed,
    experts_with_shared,
    feed_forwards,
    grouped_attention,
    model,
    routed_metadata,
    sigmoid_router,
    sparse_layers,
)
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import GROUPED, GROUPED_GGUF, ROUTED, ROUTED_GGUF
from elmoe.models.spec import LayerSpec, ModelSpec


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    attention = grouped_attention(
        config, partial=0.5, query_key_value_bias=config.flag("attention_bias", False),
        query_key_norm="head" if config.flag("use_qk_norm", False) else "none",
    )  # fmt: skip
    moe = experts_with_shared(config, sigmoid_router(config, True, groups=1, kept=1, scaling=1.0), shared=1)
    ffns = feed_forwards(config, sparse_layers(config, config.layers()), moe)
    layers = (LayerSpec(attention=attention, feed_forward=ffn) for ffn in ffns)
    return model(config, FAMILY.name, layers, epsilon=1e-5, positions=131072)


def _gguf_fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    return attention_fixed(spec) | {"expert_gating_func": (2, 0)}


FAMILY = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    read_config=read_config,
    names=GROUPED | ROUTED,
    gguf=GgufFamily(
        architecture="glm4moe",
        flags={"attention_bias": "query_bias", "use_qk_norm": "query_norm"},
        keys=GROUPED_KEYS | ROUTED_KEYS,
        required=GROUPED_REQUIRED + ROUTED_REQUIRED,
        further="nextn_predict_layers",
        names=GROUPED_GGUF | ROUTED_GGUF | {"ffn_norm": "blk.{layer}.post_attention_norm.weight"},
        metadata=lambda spec: routed_metadata(spec, "glm4moe"),
        fixed=_gguf_fixed,
    ),
)
