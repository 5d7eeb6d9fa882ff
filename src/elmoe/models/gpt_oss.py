"""GPT-OSS (``GptOssForCausalLM``, GGUF ``gpt-oss``): attention with sinks, every second layer in a window,
biases everywhere, clamped SwiGLU.

The router's bias is part of its logits, and the softmax is over the chosen experts alone. Experts are published in MXFP4.
"""

from __future__ import annotations

import msgspec

from elmoe.errors import ModelError
from elmoe.models.common import (
    EXPERT_KEYS,
    GROUPED_KEYS,
    attention_fixed,
    attention_metadata,
    choice,
    grouped_attention,
    model,
)
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import EXPERTS_GGUF, GROUPED, GROUPED_GGUF
from elmoe.models.spec import Activation, GroupedAttention, LayerSpec, ModelSpec, Moe, Router

_SCALING = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
"""The family's rope scaling where a configuration has none."""


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    if not config.has("rope_scaling") and not config.has("rope_parameters"):
        config = config.defaulted(rope_scaling=_SCALING)
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


def _gguf_metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    moe = spec.moe(0)
    windows = [layer.attention.window for layer in spec.layers if isinstance(layer.attention, GroupedAttention)]
    if windows != [(windows[0], None)[index % 2] for index in range(len(windows))] or windows[0] is None:
        raise ModelError("not every second layer has a window, from the first on", "gpt-oss has: it cannot be written")
    if (moe.activation.alpha, moe.activation.limit) != (1.702, 7.0):
        raise ModelError("the constants of its activation are not those of gpt-oss, which GGUF does not say")
    return attention_metadata(spec, truncate=False) | {
        "attention.sliding_window": windows[0], "expert_feed_forward_length": moe.width, "expert_count": spec.experts,
        "expert_used_count": spec.top_k,
    }  # fmt: skip


def _gguf_fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    return attention_fixed(spec) | {"expert_gating_func": (3, 0), "expert_shared_count": (0,)}


_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."
_EXPERTS = _LAYER + "mlp.experts."
FAMILY = Family(
    name="gpt_oss",
    architectures=("GptOssForCausalLM",),
    read_config=read_config,
    formats={"experts": "table4_mx"},
    alternating=_EXPERTS,
    names=GROUPED
    | {"router": _LAYER + "mlp.router.weight", "router_bias": _LAYER + "mlp.router.bias"}
    | {"sinks": _LAYER + "self_attn.sinks", "expert_down_bias": _EXPERTS + "down_proj_bias"}
    | {f"expert_{part}_bias": _EXPERTS + "gate_up_proj_bias" for part in ("gate", "up")},
    gguf=GgufFamily(
        architecture="gpt-oss",
        flags={"attention_bias": "attention_output_bias"},
        keys=GROUPED_KEYS
        | EXPERT_KEYS
        | {"intermediate_size": "expert_feed_forward_length", "sliding_window": "attention.sliding_window"},
        required=(
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "head_dim",
            "num_experts",
            "num_experts_per_tok",
            "sliding_window",
            "rope_theta",
            "rms_norm_eps",
        ),
        config=lambda metadata: {"rope_scaling": {"truncate": False}},
        names=GROUPED_GGUF
        | EXPERTS_GGUF
        | {"ffn_norm": _BLOCK + "post_attention_norm.weight", "sinks": _BLOCK + "attn_sinks.weight"}
        | {"router_bias": _BLOCK + "ffn_gate_inp.bias"}
        | {f"expert_{part}_bias": _BLOCK + f"ffn_{part}_exps.bias" for part in ("gate", "up", "down")},
        metadata=_gguf_metadata,
        fixed=_gguf_fixed,
    ),
)
