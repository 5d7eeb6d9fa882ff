"""Qwen3-MoE (``Qwen3MoeForCausalLM``, GGUF ``qwen3moe``): grouped-query attention with norms of query and key heads, softmax
router, SwiGLU experts. Rows are in the same order on both sides: its rotary embedding pairs halves, nothing is permuted.
"""

from __future__ import annotations

from elmoe.errors import ModelError
from elmoe.models.common import GROUPED_KEYS, attention_fixed, attention_metadata
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import GROUPED, GROUPED_GGUF
from elmoe.models.spec import Dense, GroupedAttention, LayerSpec, ModelSpec, Moe, Router


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    config.must_be("attention_bias", False)
    config.must_be("use_sliding_window", False)
    layers, hidden = config.layers(), config.integer("hidden_size")
    heads, kv_heads, head_dim = config.heads(hidden)
    attention = GroupedAttention(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=config.rope(head_dim), query_key_norm="head"
    )
    experts, vocabulary = config.integer("num_experts", "num_local_experts"), config.integer("vocab_size")
    top_k = config.integer("num_experts_per_tok", most=experts)
    router = Router(experts=experts, top_k=top_k, normalize=config.flag("norm_topk_prob", False))
    moe = Moe(router=router, width=config.integer("moe_intermediate_size"))
    step, only = config.integer("decoder_sparse_step", default=1), config.indices("mlp_only_layers", layers)
    dense = [index in only or (index + 1) % step != 0 for index in range(layers)]
    one = Dense(width=config.integer("intermediate_size")) if any(dense) else None
    return ModelSpec(
        family=FAMILY.name, vocabulary=vocabulary, hidden=hidden,
        layers=tuple(LayerSpec(attention=attention, feed_forward=one if one and is_dense else moe) for is_dense in dense),
        norm_epsilon=config.number("rms_norm_eps", 1e-6),
        max_positions=config.integer("max_position_embeddings", default=32768),
        tied_embeddings=config.flag("tie_word_embeddings", False), eos_tokens=config.tokens("eos_token_id", vocabulary),
    )  # fmt: skip


def _gguf_metadata(spec: ModelSpec) -> dict[str, int | float]:
    moe = spec.moe(spec.moe_layers[0])
    if not moe.router.normalize:
        raise ModelError(
            "the model does not rescale the weights of the chosen experts (norm_topk_prob is false)",
            "qwen3moe always rescales them: this model cannot be written as GGUF",
        )
    dense = [layer.feed_forward.width for layer in spec.layers if isinstance(layer.feed_forward, Dense)]
    return attention_metadata(spec) | {
        "feed_forward_length": dense[0] if dense else moe.width,
        "expert_feed_forward_length": moe.width,
        "expert_count": spec.experts,
        "expert_used_count": spec.top_k,
    }


def _gguf_fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    return attention_fixed(spec) | {
        "expert_weights_norm": (True,),
        "expert_weights_scale": (1.0, 0.0),
        "expert_shared_count": (0,),
        "expert_gating_func": (1, 0),
    }


_EXPERT = "model.layers.{layer}.mlp.experts.{expert}."
_PARTS = ("gate", "up", "down")
FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    read_config=read_config,
    names=GROUPED
    | {"router": "model.layers.{layer}.mlp.gate.weight"}
    | {f"expert_{part}": f"{_EXPERT}{part}_proj.weight" for part in _PARTS},
    gguf=GgufFamily(
        architecture="qwen3moe",
        keys=GROUPED_KEYS
        | {
            "moe_intermediate_size": "expert_feed_forward_length",
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
        },
        required=(
            "num_hidden_layers",
            "hidden_size",
            "num_attention_heads",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "rms_norm_eps",
        ),
        config={"norm_topk_prob": True},
        names=GROUPED_GGUF
        | {"router": "blk.{layer}.ffn_gate_inp.weight"}
        | {f"expert_{part}": f"blk.{{layer}}.ffn_{part}_exps.weight" for part in _PARTS},
        metadata=_gguf_metadata,
        fixed=_gguf_fixed,
    ),
)
