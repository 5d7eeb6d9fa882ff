"""Tiny configurations of every family that the engine runs, as transformers 5 takes them; together they have all options."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = dict(
    vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5,
    rope_theta=1e4, max_position_embeddings=512, tie_word_embeddings=False, hidden_act="silu", bos_token_id=0,
    eos_token_id=0,
)  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def _family(architecture: str, kind: str, **values: Any) -> dict[str, Any]:
    return _COMMON | {"architectures": [architecture], "model_type": kind} | values


def _llama(**values: Any) -> dict[str, Any]:
    return _family("LlamaForCausalLM", "llama", **{"intermediate_size": 96, "head_dim": 16} | values)


def _qwen2(**values: Any) -> dict[str, Any]:
    return _family("Qwen2ForCausalLM", "qwen2", **{"intermediate_size": 96} | values)


def _mixtral(**values: Any) -> dict[str, Any]:
    return _family("MixtralForCausalLM", "mixtral", **{
        "intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": None,
    } | values)  # fmt: skip


def _olmoe(**values: Any) -> dict[str, Any]:
    return _family("OlmoeForCausalLM", "olmoe", **{
        "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False} | values)  # fmt: skip


def _qwen2_moe(**values: Any) -> dict[str, Any]:
    return _family("Qwen2MoeForCausalLM", "qwen2_moe", **{
        "intermediate_size": 96, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 6,
        "num_experts_per_tok": 2, "norm_topk_prob": False} | values)  # fmt: skip


def _gpt_oss(**values: Any) -> dict[str, Any]:
    return _family("GptOssForCausalLM", "gpt_oss", **{
        "intermediate_size": 32, "head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 40,
        "rope_theta": 150000.0, "num_hidden_layers": 4, "rope_scaling": YARN | {"truncate": False},
    } | values)  # fmt: skip


def _glm4_moe(**values: Any) -> dict[str, Any]:
    return _family("Glm4MoeForCausalLM", "glm4_moe", **{
        "intermediate_size": 96, "moe_intermediate_size": 32, "head_dim": 32, "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": True, "use_qk_norm": False, "attention_bias": True, "partial_rotary_factor": 0.5,
    } | values)  # fmt: skip


def _dots1(**values: Any) -> dict[str, Any]:
    return _family("Dots1ForCausalLM", "dots1", **{
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_key_value_heads": 4, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "scoring_func": "noaux_tc",
    } | values)  # fmt: skip


def _latent(architecture: str, kind: str, **values: Any) -> dict[str, Any]:
    return _family(architecture, kind, **{
        "intermediate_size": 96, "moe_intermediate_size": 32, "num_key_value_heads": 4, "n_routed_experts": 8,
        "num_experts_per_tok": 3, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0,
        "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "q_lora_rank": None, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 16,
    } | values)  # fmt: skip


def _deepseek_v2(**values: Any) -> dict[str, Any]:
    return _latent("DeepseekV2ForCausalLM", "deepseek_v2", **{"topk_method": "greedy"} | values)


def _deepseek_v3(**values: Any) -> dict[str, Any]:
    return _latent("DeepseekV3ForCausalLM", "deepseek_v3", **{
        "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5, "q_lora_rank": 64,
        "rope_interleave": True} | values)  # fmt: skip


def _glm4_moe_lite(**values: Any) -> dict[str, Any]:
    return _latent("Glm4MoeLiteForCausalLM", "glm4_moe_lite", **{
        "norm_topk_prob": True, "routed_scaling_factor": 1.8, "q_lora_rank": 32, "v_head_dim": 32,
        "rope_interleave": True} | values)  # fmt: skip


def _granite(architecture: str, kind: str, **values: Any) -> dict[str, Any]:
    return _family(architecture, kind, **{
        "intermediate_size": 32, "attention_multiplier": 0.3, "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
        "logits_scaling": 6.0, "attention_bias": False,
    } | values)  # fmt: skip


def _granitemoe(**values: Any) -> dict[str, Any]:
    return _granite("GraniteMoeForCausalLM", "granitemoe", **{"num_local_experts": 8, "num_experts_per_tok": 3} | values)


LATENT_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "factor": 40.0}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama_llama3": _llama(rope_scaling=LLAMA3, rope_theta=5e5, tie_word_embeddings=True, head_dim=32),
    "llama_biases_yarn": _llama(attention_bias=True, rope_scaling=YARN | {"beta_fast": 16.0, "beta_slow": 2.0}),
    "llama_linear": _llama(rope_scaling=LINEAR, num_key_value_heads=1),
    "qwen2": _qwen2(tie_word_embeddings=True),
    "qwen2_yarn": _qwen2(rope_scaling=YARN | {"truncate": False, "attention_factor": 1.5}, num_key_value_heads=4),
    "qwen2_windows": _qwen2(use_sliding_window=True, sliding_window=40, max_window_layers=1, num_hidden_layers=4),
    "mixtral": _mixtral(),
    "mixtral_window": _mixtral(sliding_window=70),
    "mixtral_yarn": _mixtral(rope_scaling=YARN, tie_word_embeddings=True, num_experts_per_tok=1, head_dim=16),
    "olmoe": _olmoe(),
    "olmoe_heads": _olmoe(num_key_value_heads=4),
    "olmoe_normalized": _olmoe(norm_topk_prob=True, attention_bias=True, num_key_value_heads=4, rope_scaling=LINEAR),
    "qwen2_moe": _qwen2_moe(),
    "qwen2_moe_windows": _qwen2_moe(use_sliding_window=True, sliding_window=33, max_window_layers=9, num_hidden_layers=4),
    "qwen2_moe_dense_layers": _qwen2_moe(
        norm_topk_prob=True, mlp_only_layers=[0], qkv_bias=False, tie_word_embeddings=True, num_key_value_heads=1),
    "glm4_moe": _glm4_moe(),
    "glm4_moe_options": _glm4_moe(
        n_shared_experts=2, routed_scaling_factor=1.8, use_qk_norm=True, attention_bias=False, norm_topk_prob=False),
    "glm4_moe_groups": _glm4_moe(n_group=4, topk_group=2),
    "dots1": _dots1(),
    "dots1_groups": _dots1(
        n_group=4, topk_group=2, n_shared_experts=1, norm_topk_prob=False, routed_scaling_factor=1.0, head_dim=32,
        first_k_dense_replace=2, rope_scaling=LINEAR),
    "dots1_windows": _dots1(
        sliding_window=40, max_window_layers=1, num_hidden_layers=4, first_k_dense_replace=0, attention_bias=True,
        num_key_value_heads=2, tie_word_embeddings=True, n_group=2, rope_scaling=YARN),
    "gpt_oss": _gpt_oss(),
    "gpt_oss_options": _gpt_oss(
        attention_bias=False, swiglu_limit=1.5, swiglu_alpha=1.2, head_dim=32, num_experts_per_tok=4,
        layer_types=["full_attention", "full_attention", "sliding_attention", "full_attention"], sliding_window=17,
        rope_scaling=YARN),
    "deepseek_v2": _deepseek_v2(rope_scaling=LATENT_YARN, n_shared_experts=2),
    "deepseek_v2_groups": _deepseek_v2(
        topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=16.0, q_lora_rank=40,
        rope_scaling=LATENT_YARN | {"mscale": 1.0}, first_k_dense_replace=0, num_attention_heads=2,
        num_key_value_heads=2, kv_lora_rank=48, qk_nope_head_dim=24),
    "deepseek_v3": _deepseek_v3(rope_scaling=LATENT_YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}),
    "deepseek_v3_halves": _deepseek_v3(
        rope_interleave=False, q_lora_rank=None, n_group=2, topk_group=1, rope_scaling=LINEAR, norm_topk_prob=False,
        tie_word_embeddings=True),
    "glm4_moe_lite": _glm4_moe_lite(),
    "glm4_moe_lite_options": _glm4_moe_lite(
        q_lora_rank=None, n_shared_experts=2, first_k_dense_replace=2, mlp_layer_types=["dense", "dense", "sparse"],
        rope_scaling=LLAMA3, rope_theta=5e5,
        norm_topk_prob=False, routed_scaling_factor=1.0, v_head_dim=48, kv_lora_rank=64, num_attention_heads=6,
        num_key_value_heads=6),
    "granitemoe": _granitemoe(),
    "granitemoe_options": _granitemoe(
        attention_bias=True, tie_word_embeddings=True, num_experts_per_tok=1, rope_scaling=LINEAR, num_key_value_heads=4,
        attention_multiplier=0.5, embedding_multiplier=0.2, residual_multiplier=1.6, logits_scaling=0.3, rms_norm_eps=1e-3),
    "granitemoeshared": _granite(
        "GraniteMoeSharedForCausalLM", "granitemoeshared", num_local_experts=6, num_experts_per_tok=2,
        shared_intermediate_size=64, num_hidden_layers=2),
    "granite": _granite("GraniteForCausalLM", "granite", intermediate_size=96, mlp_bias=False, num_key_value_heads=1,
        tie_word_embeddings=True, embedding_multiplier=0.25, residual_multiplier=0.9),
}  # fmt: skip
"""By a name of their own."""
