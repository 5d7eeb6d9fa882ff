"""Mixtral (``MixtralForCausalLM``): grouped-query attention, perhaps in a window, and experts of a softmax router."""

from __future__ import annotations

from elmoe.models.common import choice, grouped_attention, model
from elmoe.models.config import Config
from elmoe.models.family import Family
from elmoe.models.spec import LayerSpec, ModelSpec, Moe, Router


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = grouped_attention(config, theta=1e6, window=window)
    experts, top_k = choice(config, "num_local_experts", "num_experts")
    router = Router(experts=experts, top_k=top_k, normalize=True)
    layer = LayerSpec(attention=attention, feed_forward=Moe(router=router, width=config.integer("intermediate_size")))
    return model(config, FAMILY.name, [layer] * config.layers(), epsilon=1e-5, positions=131072)


FAMILY = Family(name="mixtral", architectures=("MixtralForCausalLM",), read_config=read_config)
