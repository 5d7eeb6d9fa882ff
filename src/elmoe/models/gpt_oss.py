"""GPT-OSS (``GptOssForCausalLM``): attention with sinks, every second layer in a window; biases everywhere; clamped SwiGLU.

The router's bias is part of its logits, and the softmax is over the chosen experts alone. Experts are published in MXFP4.
"""

from __future__ import annotations

import msgspec

from elmoe.models.common import choice, grouped_attention, model
from elmoe.models.config import Config
from elmoe.models.family import Family
from elmoe.models.spec import Activation, LayerSpec, ModelSpec, Moe, Router

_SCALING = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""The family's rope scaling where a configuration has none."""


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    if not config.has("rope_scaling") and not config.has("rope_parameters"):
        config = Config(config.values | {"rope_scaling": _SCALING}, config.where)
    experts, top_k = choice(config, "num_local_experts", "num_experts")
    if config.integer("experts_per_token", default=top_k) != top_k:
        config.fail("'num_experts_per_tok' and 'experts_per_token' disagree")
    layers, bias = config.layers(), config.flag("attention_bias", True)
    config.integer("head_dim")
    attention = grouped_attention(config, theta=150000.0, sinks=True, query_key_value_bias=bias, output_bias=bias)
    windows = config.windows(layers, [("sliding_attention", "full_attention")[index % 2] for index in range(layers)])
    moe = Moe(
        router=Router(experts=experts, top_k=top_k, score="chosen_softmax", logit_bias=True),
        width=config.integer("intermediate_size"), bias=True,
        activation=Activation(
            kind="clamped_swiglu", alpha=config.number("swiglu_alpha", 1.702), limit=config.number("swiglu_limit", 7.0)
        ),
    )  # fmt: skip
    return model(
        config, FAMILY.name,
        (LayerSpec(attention=msgspec.structs.replace(attention, window=window), feed_forward=moe) for window in windows),
        epsilon=1e-5, positions=131072,
    )  # fmt: skip


FAMILY = Family(name="gpt_oss", architectures=("GptOssForCausalLM",), read_config=read_config, formats={"experts": "table4"})
