"""GLM-4.5 and 4.6 (``Glm4MoeForCausalLM``): grouped-query attention that rotates half of a head, DeepSeek-V3's router."""

from __future__ import annotations

from elmoe.models.common import (
    experts_with_shared,
    feed_forwards,
    grouped_attention,
    model,
    sigmoid_router,
    sparse_layers,
)
from elmoe.models.config import Config
from elmoe.models.family import Family
from elmoe.models.names import EXPERTS, GROUPED
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


_MLP = "model.layers.{layer}.mlp."
FAMILY = Family(
    name="glm4_moe",
    architectures=("Glm4MoeForCausalLM",),
    read_config=read_config,
    names=GROUPED
    | EXPERTS
    | {"selection_bias": _MLP + "gate.e_score_correction_bias"}
    | {f"shared_{part}": f"{_MLP}shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
)
