"""Qwen3-MoE (``Qwen3MoeForCausalLM``, GGUF ``qwen3moe``): grouped-query attention with norms of query and key heads, softmax
router, SwiGLU experts. Rows are in the same order on both sides: its rotary embedding pairs halves, nothing is permuted.
"""

from __future__ import annotations

from elmoe.errors import ModelError
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
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
    attention, moe = spec.layers[0].attention, spec.moe(spec.moe_layers[0])
    assert isinstance(attention, GroupedAttention) and attention.rope is not None
    if not moe.router.normalize:
        raise ModelError(
            "the model does not rescale the weights of the chosen experts (norm_topk_prob is false)",
            "qwen3moe always rescales them: this model cannot be written as GGUF",
        )
    dense = [layer.feed_forward.width for layer in spec.layers if isinstance(layer.feed_forward, Dense)]
    return {
        "block_count": len(spec.layers),
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden,
        "feed_forward_length": dense[0] if dense else moe.width,
        "expert_feed_forward_length": moe.width,
        "expert_count": spec.experts,
        "expert_used_count": spec.top_k,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_epsilon,
        "rope.freq_base": attention.rope.theta,
        "rope.dimension_count": attention.head_dim,
        "vocab_size": spec.vocabulary,
    }


def _gguf_fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedAttention)
    return {
        "attention.value_length": (attention.head_dim,),
        "rope.dimension_count": (attention.head_dim,),
        "rope.scaling.type": ("none",),
        "rope.scaling.factor": (1.0, 0.0),
        "rope.scale_linear": (1.0, 0.0),
        "rope.scaling.attn_factor": (1.0, 0.0),
        "expert_weights_norm": (True,),
        "expert_weights_scale": (1.0, 0.0),
        "expert_shared_count": (0,),
        "expert_gating_func": (1, 0),
    }


_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."
FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    read_config=read_config,
    names={
        "embedding": "model.embed_tokens.weight",
        "head": "lm_head.weight",
        "final_norm": "model.norm.weight",
        "attention_norm": _LAYER + "input_layernorm.weight",
        "query": _LAYER + "self_attn.q_proj.weight",
        "key": _LAYER + "self_attn.k_proj.weight",
        "value": _LAYER + "self_attn.v_proj.weight",
        "query_norm": _LAYER + "self_attn.q_norm.weight",
        "key_norm": _LAYER + "self_attn.k_norm.weight",
        "attention_output": _LAYER + "self_attn.o_proj.weight",
        "ffn_norm": _LAYER + "post_attention_layernorm.weight",
        "router": _LAYER + "mlp.gate.weight",
        **{f"expert_{name}": _LAYER + f"mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down")},
        **{f"dense_{name}": _LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
    },
    gguf=GgufFamily(
        architecture="qwen3moe",
        keys={
            "num_hidden_layers": "block_count",
            "max_position_embeddings": "context_length",
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "moe_intermediate_size": "expert_feed_forward_length",
            "num_experts": "expert_count",
            "num_experts_per_tok": "expert_used_count",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "head_dim": "attention.key_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
            "rope_theta": "rope.freq_base",
        },
        required=(
            "num_hidden_layers", "hidden_size", "num_attention_heads", "num_experts", "num_experts_per_tok",
            "moe_intermediate_size", "rms_norm_eps",
        ),
        config={"norm_topk_prob": True},
        names={
            "embedding": "token_embd.weight",
            "head": "output.weight",
            "final_norm": "output_norm.weight",
            "attention_norm": _BLOCK + "attn_norm.weight",
            "query": _BLOCK + "attn_q.weight",
            "key": _BLOCK + "attn_k.weight",
            "value": _BLOCK + "attn_v.weight",
            "query_norm": _BLOCK + "attn_q_norm.weight",
            "key_norm": _BLOCK + "attn_k_norm.weight",
            "attention_output": _BLOCK + "attn_output.weight",
            "ffn_norm": _BLOCK + "ffn_norm.weight",
            "router": _BLOCK + "ffn_gate_inp.weight",
            **{f"expert_{name}": _BLOCK + f"ffn_{name}_exps.weight" for name in ("gate", "up", "down")},
            **{f"dense_{name}": _BLOCK + f"ffn_{name}.weight" for name in ("gate", "up", "down")},
        },
        metadata=_gguf_metadata,
        fixed=_gguf_fixed,
    ),
)  # fmt: skip
