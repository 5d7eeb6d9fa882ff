"""A made-up family: a dense first layer, no norms of query and key heads, names of its own."""

from __future__ import annotations

from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.spec import Dense, GroupedAttention, LayerSpec, ModelSpec, Moe, Router

CONFIG = {
    "architectures": ["ToyForCausalLM"], "model_type": "toy", "vocab_size": 300, "hidden_size": 64, "toy_dense_width": 96,
    "toy_expert_width": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6,
    "num_experts_per_tok": 2, "rms_norm_eps": 1e-6, "rope_theta": 5000.0, "max_position_embeddings": 128, "eos_token_id": 0,
}  # fmt: skip


def read_config(config: Config) -> ModelSpec:
    layers, hidden = config.integer("num_hidden_layers"), config.integer("hidden_size")
    heads, kv_heads, head_dim = config.heads(hidden)
    attention = GroupedAttention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=config.rope(head_dim))
    experts, vocabulary = config.integer("num_experts"), config.integer("vocab_size")
    router = Router(experts=experts, top_k=config.integer("num_experts_per_tok", most=experts))
    moe = Moe(router=router, width=config.integer("toy_expert_width"))
    dense = Dense(width=config.integer("toy_dense_width"))
    return ModelSpec(
        family="toy", vocabulary=vocabulary, hidden=hidden, norm_epsilon=config.number("rms_norm_eps"),
        tied_embeddings=False,
        layers=tuple(LayerSpec(attention=attention, feed_forward=moe if i else dense) for i in range(layers)),
        max_positions=config.integer("max_position_embeddings"), eos_tokens=config.tokens("eos_token_id", vocabulary),
    )  # fmt: skip


KEYS = {
    "num_hidden_layers": "block_count", "hidden_size": "embedding_length", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "num_experts": "expert_count", "rope_theta": "rope.freq_base",
    "num_experts_per_tok": "expert_used_count", "toy_dense_width": "feed_forward_length",
    "toy_expert_width": "expert_feed_forward_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}  # fmt: skip


def metadata(spec: ModelSpec) -> dict[str, int | float]:
    assert all(layer.attention == spec.layers[0].attention for layer in spec.layers)
    return {theirs: CONFIG[ours] for ours, theirs in KEYS.items()}


FAMILY = Family(
    name="toy",
    architectures=("ToyForCausalLM",),
    read_config=read_config,
    names={
        "embedding": "embed", "head": "unembed", "final_norm": "norm", "attention_norm": "{layer}.norm1",
        "query": "{layer}.q", "key": "{layer}.k", "value": "{layer}.v", "attention_output": "{layer}.o",
        "ffn_norm": "{layer}.norm2", "router": "{layer}.router",
        **{f"expert_{name}": f"{{layer}}.experts.{{expert}}.{name}" for name in ("gate", "up", "down")},
        **{f"dense_{name}": f"{{layer}}.{name}" for name in ("gate", "up", "down")},
    },
    gguf=GgufFamily(
        architecture="toy",
        keys=KEYS,
        required=tuple(KEYS),
        metadata=metadata,
        names={
            "embedding": "token_embd.weight", "head": "output.weight", "final_norm": "output_norm.weight",
            "attention_norm": "blk.{layer}.attn_norm.weight", "query": "blk.{layer}.attn_q.weight",
            "key": "blk.{layer}.attn_k.weight", "value": "blk.{layer}.attn_v.weight",
            "attention_output": "blk.{layer}.attn_output.weight", "ffn_norm": "blk.{layer}.ffn_norm.weight",
            "router": "blk.{layer}.ffn_gate_inp.weight",
            **{f"expert_{name}": f"blk.{{layer}}.ffn_{name}_exps.weight" for name in ("gate", "up", "down")},
            **{f"dense_{name}": f"blk.{{layer}}.ffn_{name}.weight" for name in ("gate", "up", "down")},
        },
    ),
)  # fmt: skip
