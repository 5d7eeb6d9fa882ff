"""Names of tensors that families share, in Hugging Face folders and in GGUF files."""

from __future__ import annotations

_LAYER, _BLOCK = "model.layers.{layer}.", "blk.{layer}."

GROUPED = {
    "embedding": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm": "model.norm.weight",
    "attention_norm": _LAYER + "input_layernorm.weight",
    "query": _LAYER + "self_attn.q_proj.weight",
    "key": _LAYER + "self_attn.k_proj.weight",
    "value": _LAYER + "self_attn.v_proj.weight",
    "query_norm": _LAYER + "self_attn.q_norm.weight",
    "key_norm": _LAYER + "self_attn.k_norm.weight",
    "query_bias": _LAYER + "self_attn.q_proj.bias",
    "key_bias": _LAYER + "self_attn.k_proj.bias",
    "value_bias": _LAYER + "self_attn.v_proj.bias",
    "attention_output": _LAYER + "self_attn.o_proj.weight",
    "attention_output_bias": _LAYER + "self_attn.o_proj.bias",
    "ffn_norm": _LAYER + "post_attention_layernorm.weight",
    **{f"dense_{name}": _LAYER + f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")},
}
"""In a Hugging Face folder: see ``models.family.Names``."""

EXPERTS = {
    "router": _LAYER + "mlp.gate.weight",
    **{f"expert_{name}": _LAYER + f"mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down")},
}
"""Of routers and experts there, as most families call them."""

ROUTED = EXPERTS | {
    "selection_bias": _LAYER + "mlp.gate.e_score_correction_bias",
    **{f"shared_{name}": _LAYER + f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")},
}
"""Of DeepSeek's descendants: a bias of the choice, and shared experts."""

LATENT = (
    GROUPED
    | ROUTED
    | {
        "query_down": _LAYER + "self_attn.q_a_proj.weight",
        "query_norm": _LAYER + "self_attn.q_a_layernorm.weight",
        "query_up": _LAYER + "self_attn.q_b_proj.weight",
        "latent": _LAYER + "self_attn.kv_a_proj_with_mqa.weight",
        "latent_norm": _LAYER + "self_attn.kv_a_layernorm.weight",
        "key_up": _LAYER + "self_attn.kv_b_proj.weight",
        "value_up": _LAYER + "self_attn.kv_b_proj.weight",
    }
)
"""Of families with latent attention: one tensor holds the keys' and the values' projections, head by head."""

GROUPED_GGUF = {
    "embedding": "token_embd.weight",
    "head": "output.weight",
    "final_norm": "output_norm.weight",
    "attention_norm": _BLOCK + "attn_norm.weight",
    "query": _BLOCK + "attn_q.weight",
    "key": _BLOCK + "attn_k.weight",
    "value": _BLOCK + "attn_v.weight",
    "query_norm": _BLOCK + "attn_q_norm.weight",
    "key_norm": _BLOCK + "attn_k_norm.weight",
    "query_bias": _BLOCK + "attn_q.bias",
    "key_bias": _BLOCK + "attn_k.bias",
    "value_bias": _BLOCK + "attn_v.bias",
    "attention_output": _BLOCK + "attn_output.weight",
    "attention_output_bias": _BLOCK + "attn_output.bias",
    "ffn_norm": _BLOCK + "ffn_norm.weight",
    **{f"dense_{name}": _BLOCK + f"ffn_{name}.weight" for name in ("gate", "up", "down")},
}
"""In a GGUF file."""

EXPERTS_GGUF = {
    "router": _BLOCK + "ffn_gate_inp.weight",
    **{f"expert_{name}": _BLOCK + f"ffn_{name}_exps.weight" for name in ("gate", "up", "down")},
}
"""Of routers and experts there."""
ROUTED_GGUF = EXPERTS_GGUF | {
    "selection_bias": _BLOCK + "exp_probs_b.bias",
    **{f"shared_{name}": _BLOCK + f"ffn_{name}_shexp.weight" for name in ("gate", "up", "down")},
}
"""Of DeepSeek's descendants there."""
LATENT_GGUF = (
    GROUPED_GGUF
    | ROUTED_GGUF
    | {
        "query_down": _BLOCK + "attn_q_a.weight",
        "query_norm": _BLOCK + "attn_q_a_norm.weight",
        "query_up": _BLOCK + "attn_q_b.weight",
        "latent": _BLOCK + "attn_kv_a_mqa.weight",
        "latent_norm": _BLOCK + "attn_kv_a_norm.weight",
        "key_up": _BLOCK + "attn_k_b.weight",
        "value_up": _BLOCK + "attn_v_b.weight",
        "fused_up": _BLOCK + "attn_kv_b.weight",
    }
)
"""Of latent attention there; ``fused_up`` is what older files have in place of the two before it."""
NEIGHBOURS = ("query", "key", "query_bias", "key_bias")
"""Roles whose rows GGUF's ``llama`` has in another order: see ``GgufFamily``."""
