"""Qwen3-MoE: what its config may say and where its tensors are. The forward pass is the families' shared one (decoder.py):
grouped-query attention with q and k norms, rotary embedding, softmax router, SwiGLU experts.
"""

from __future__ import annotations

from typing import Any

from elmoe.errors import ConvertError
from elmoe.schema.model import ModelSchema

ARCHITECTURES = ("Qwen3MoeForCausalLM",)
Source = tuple[str, tuple[int, ...]]
"""A checkpoint tensor's name and shape."""


def _integer(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 1 << 31:
        raise ConvertError(f"config.json: '{key}' is {value!r}, not a positive integer")
    return value


def _number(config: dict[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e12:
        raise ConvertError(f"config.json: '{key}' is {value!r}, not a positive number")
    return float(value)


def _must_be(config: dict[str, Any], key: str, allowed: tuple[Any, ...]) -> None:
    value = config.get(key, allowed[0])
    if value not in allowed:
        raise ConvertError(f"config.json: '{key}' is {value!r}", f"supported: {', '.join(repr(one) for one in allowed)}")


def read_config(config: dict[str, Any]) -> ModelSchema:
    """The schema of a config.json; ConvertError names any value that is not supported."""
    _must_be(config, "hidden_act", ("silu",))
    _must_be(config, "attention_bias", (False,))
    _must_be(config, "use_sliding_window", (False,))
    config = {key: value for key, value in config.items() if value is not None}  # null means the default
    if "num_experts" not in config and "num_local_experts" in config:  # what transformers 5 writes
        config["num_experts"] = config["num_local_experts"]
    for key in ("rope_scaling", "rope_parameters"):
        values = config.get(key, {})
        kind = values.get("rope_type", values.get("type", "default")) if isinstance(values, dict) else values
        if kind != "default":
            raise ConvertError(f"config.json: '{key}' is {values!r}", "supported: rope_type 'default'")
    rope = config.get("rope_parameters", {})
    layers, hidden = _integer(config, "num_hidden_layers"), _integer(config, "hidden_size")
    heads = _integer(config, "num_attention_heads")
    kv_heads, head_dim = _integer(config, "num_key_value_heads"), _integer(config, "head_dim", hidden // heads)
    experts, top_k = _integer(config, "num_experts"), _integer(config, "num_experts_per_tok")
    if heads % kv_heads:
        raise ConvertError(f"config.json: 'num_attention_heads' {heads} is no multiple of 'num_key_value_heads' {kv_heads}")
    if head_dim % 16:
        raise ConvertError(f"config.json: 'head_dim' is {head_dim}", "supported: multiples of 16")
    if top_k > experts:
        raise ConvertError(f"config.json: 'num_experts_per_tok' {top_k} is more than 'num_experts' {experts}")
    step, dense = _integer(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ConvertError(f"config.json: 'mlp_only_layers' is {dense!r}, not a list of layers")
    eos = config.get("eos_token_id")
    return ModelSchema(
        family="qwen3_moe",
        vocabulary=_integer(config, "vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        experts=experts,
        top_k=top_k,
        expert_width=_integer(config, "moe_intermediate_size"),
        dense_width=_integer(config, "intermediate_size", _integer(config, "moe_intermediate_size")),
        dense_layers=tuple(layer for layer in range(layers) if layer in dense or (layer + 1) % step),
        normalize_top_k=bool(config.get("norm_topk_prob", False)),
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6),
        rope_theta=_number(rope if "rope_theta" in rope else config, "rope_theta", 10000.0),
        max_positions=_integer(config, "max_position_embeddings", 32768),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_tokens=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
    )


def tensor_sources(schema: ModelSchema) -> dict[str, list[Source]]:
    """Store tensor -> checkpoint tensors laid one below the other, all but FFNs."""
    hidden, inner, kv = schema.hidden, schema.heads * schema.head_dim, schema.kv_heads * schema.head_dim
    sources: dict[str, list[Source]] = {"embedding": [("model.embed_tokens.weight", (schema.vocabulary, hidden))]}
    if not schema.tied_embeddings:
        sources["head"] = [("lm_head.weight", (schema.vocabulary, hidden))]
    sources["final_norm"] = [("model.norm.weight", (hidden,))]
    for layer in range(schema.layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        attention = theirs + "self_attn."
        sources[ours + "attention_norm"] = [(theirs + "input_layernorm.weight", (hidden,))]
        sources[ours + "query_key_value"] = [
            (attention + "q_proj.weight", (inner, hidden)),
            (attention + "k_proj.weight", (kv, hidden)),
            (attention + "v_proj.weight", (kv, hidden)),
        ]
        sources[ours + "query_norm"] = [(attention + "q_norm.weight", (schema.head_dim,))]
        sources[ours + "key_norm"] = [(attention + "k_norm.weight", (schema.head_dim,))]
        sources[ours + "attention_output"] = [(attention + "o_proj.weight", (hidden, inner))]
        sources[ours + "ffn_norm"] = [(theirs + "post_attention_layernorm.weight", (hidden,))]
        if layer in schema.moe_layers:
            sources[ours + "router"] = [(theirs + "mlp.gate.weight", (schema.experts, hidden))]
    return sources


def ffn_sources(schema: ModelSchema, layer: int, expert: int) -> dict[str, Source]:
    """Projection -> checkpoint tensor of an expert, or of the layer's dense FFN."""
    dense = layer in schema.dense_layers
    width = schema.dense_width if dense else schema.expert_width
    prefix = f"model.layers.{layer}.mlp." + ("" if dense else f"experts.{expert}.")
    return {
        "gate": (prefix + "gate_proj.weight", (width, schema.hidden)),
        "up": (prefix + "up_proj.weight", (width, schema.hidden)),
        "down": (prefix + "down_proj.weight", (schema.hidden, width)),
    }
