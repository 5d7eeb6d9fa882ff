"""Qwen3-MoE (``Qwen3MoeForCausalLM``, GGUF ``qwen3moe``): grouped-query attention with norms of query and key heads, softmax
router, SwiGLU experts. Rows are in the same order on both sides: its rotary embedding pairs halves, nothing is permuted.
"""

from __future__ import annotations

from elmoe.models.common import (
    EXPERT_KEYS,
    GROUPED_KEYS,
    attention_metadata,
    check_normalize,
    choice,
    experts_fixed,
    grouped_attention,
    model,
    sparse_by_step,
)
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import EXPERTS, EXPERTS_GGUF, GROUPED, GROUPED_GGUF
from elmoe.models.spec import Dense, LayerSpec, ModelSpec, Moe, Router


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    config.must_be("attention_bias", False)
    config.must_be("use_sliding_window", False)
    attention = grouped_attention(config, query_key_norm="head")
    experts, top_k = choice(config, "num_experts", "num_local_experts")
    router = Router(experts=experts, top_k=top_k, normalize=config.flag("norm_topk_prob", False))
    moe = Moe(router=router, width=config.integer("moe_intermediate_size"))
    layers = (LayerSpec(attention=attention, feed_forward=one) for one in sparse_by_step(config, moe))
    return model(config, FAMILY.name, layers, epsilon=1e-6, positions=32768)


def _gguf_metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    moe = spec.moe(spec.moe_layers[0])
    check_normalize(moe, True)
    dense = [layer.feed_forward.width for layer in spec.layers if isinstance(layer.feed_forward, Dense)]
    return attention_metadata(spec) | {
        "feed_forward_length": dense[0] if dense else moe.width,
        "expert_feed_forward_length": moe.width,
        "expert_count": spec.experts,
        "expert_used_count": spec.top_k,
    }


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    read_config=read_config,
    names=GROUPED | EXPERTS,
    gguf=GgufFamily(
        architecture="qwen3moe",
        flags={"attention_bias": "attention_output_bias"},
        keys=GROUPED_KEYS | EXPERT_KEYS | {"moe_intermediate_size": "expert_feed_forward_length"},
        required=(
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "rms_norm_eps",
        ),
        config=lambda metadata: {"norm_topk_prob": True},
        names=GROUPED_GGUF | EXPERTS_GGUF,
        metadata=_gguf_metadata,
        fixed=experts_fixed,
    ),
)
