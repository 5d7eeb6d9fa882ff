"""dots.llm1 (``Dots1ForCausalLM``, GGUF ``dots1``): Qwen3's attention, perhaps with a window in the last layers, and the
router of DeepSeek-V3, whose ``scoring_func`` published files call ``noaux_tc``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from elmoe.errors import ModelError
from elmoe.models.common import (
    GROUPED_KEYS,
    GROUPED_REQUIRED,
    ROUTED_KEYS,
    attention_fixed,
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
from elmoe.models.spec import MOST, GroupedAttention, LayerSpec, ModelSpec, Moe


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    config.must_be("moe_layer_freq", 1)  # transformers does not look at it
    layers, bias = config.layers(), config.flag("attention_bias", False)
    attention = grouped_attention(config, query_key_norm="head", query_key_value_bias=bias, output_bias=bias)
    words = ("sigmoid", "noaux_tc")
    router = sigmoid_router(config, False, groups=1, kept=1, scaling=1.0, words=words)
    width = config.integer("moe_intermediate_size")
    moe = Moe(router=router, width=width, shared_width=width * config.integer("n_shared_experts"))
    dense = config if config.has("mlp_layer_types") else config.defaulted(first_k_dense_replace=0)
    ffns = feed_forwards(config, sparse_layers(dense, layers), moe)
    first = config.integer("max_window_layers", default=62, least=0)
    windows = config.windows(
        layers, ["sliding_attention" if layer >= first else "full_attention" for layer in range(layers)]
    )
    specs = (
        LayerSpec(attention=msgspec.structs.replace(attention, window=window), feed_forward=ffn)
        for window, ffn in zip(windows, ffns, strict=True)
    )
    return model(config, FAMILY.name, specs, epsilon=1e-6, positions=2048)


def _gguf_metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    """ModelError too where llama.cpp could not load the file: keys and values are as wide as queries, without biases, and
    the output head is a tensor of its own."""
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedAttention)
    reasons = {
        f"{attention.heads} heads of queries share {attention.kv_heads} of keys and values":
            attention.heads != attention.kv_heads,
        "attention has biases": attention.query_key_value_bias,
        "layers have attention windows": any(getattr(layer.attention, "window", None) for layer in spec.layers),
        "the output head is the embedding": spec.tied_embeddings,
    }  # fmt: skip
    for reason, holds in reasons.items():
        if holds:
            raise ModelError(reason, "the architecture 'dots1' cannot say that: this model cannot be written as GGUF")
    return routed_metadata(spec, "dots1")


def _gguf_config(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """A file has no windows, whatever its number of layers."""
    return {"max_window_layers": MOST["layers"]}


FAMILY = Family(
    name="dots1",
    architectures=("Dots1ForCausalLM",),
    read_config=read_config,
    names=GROUPED | ROUTED,
    gguf=GgufFamily(
        architecture="dots1",
        keys=GROUPED_KEYS | ROUTED_KEYS,
        required=(
            *GROUPED_REQUIRED,
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "n_shared_experts",
        ),
        config=_gguf_config,
        names=GROUPED_GGUF | ROUTED_GGUF,
        metadata=_gguf_metadata,
        fixed=lambda spec: attention_fixed(spec) | {"expert_gating_func": (2,)},
    ),
)
