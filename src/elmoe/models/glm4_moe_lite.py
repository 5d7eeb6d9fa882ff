"""GLM-4.7-Flash (``Glm4MoeLiteForCausalLM``, GGUF ``deepseek2``): DeepSeek-V3's latent attention and router with GLM's
experts."""

from __future__ import annotations

from elmoe.models.common import experts_with_shared, feed_forwards, latent_attention, model, sigmoid_router, sparse_layers
from elmoe.models.config import Config
from elmoe.models.deepseek2 import SIGMOID, deepseek2, gating, grouped, is_kimi
from elmoe.models.family import Family
from elmoe.models.names import LATENT
from elmoe.models.spec import LayerSpec, ModelSpec


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    attention = latent_attention(config)
    moe = experts_with_shared(config, sigmoid_router(config, True, groups=1, kept=1, scaling=1.8), shared=1)
    ffns = feed_forwards(config, sparse_layers(config, config.layers()), moe)
    layers = (LayerSpec(attention=attention, feed_forward=ffn) for ffn in ffns)
    return model(config, FAMILY.name, layers, epsilon=1e-5, positions=202752)


FAMILY = Family(
    name="glm4_moe_lite",
    architectures=("Glm4MoeLiteForCausalLM",),
    read_config=read_config,
    names=LATENT,
    gguf=deepseek2(lambda metadata: gating(metadata) == SIGMOID and not grouped(metadata) and not is_kimi(metadata)),
)
