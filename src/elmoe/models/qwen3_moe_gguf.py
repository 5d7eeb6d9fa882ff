"""Qwen3-MoE in GGUF (architecture ``qwen3moe``): metadata and tensor names. Rows are in the checkpoint's order: its rotary
embedding is NeoX style on both sides, nothing is permuted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from elmoe.errors import ConvertError
from elmoe.models.qwen3_moe import Source, read_config
from elmoe.schema.model import ModelSchema

ARCHITECTURE = "qwen3moe"
_CONFIG_KEYS = {
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
}
"""Key of config.json -> key of the metadata behind ``qwen3moe.``."""


def _one_of(metadata: dict[str, Any], key: str, *allowed: Any) -> None:
    value = metadata.get(f"{ARCHITECTURE}.{key}", allowed[0])
    if value not in allowed:
        raise ConvertError(f"metadata '{ARCHITECTURE}.{key}' is {value!r}", f"supported: {allowed[0]!r}")


def read_metadata(
    metadata: dict[str, Any], vocabulary: int, eos: list[int], has: Callable[[str], bool]
) -> ModelSchema:  # fmt: skip
    """The schema of a GGUF's metadata.

    :param vocabulary: rows of the embedding.
    :param eos: ids that end a generation.
    :param has: whether a tensor is in the file: a head, a layer's router.
    :raises ConvertError: another architecture, or a value that is not supported or missing.
    """
    if metadata.get("general.architecture") != ARCHITECTURE:
        raise ConvertError(
            f"architecture {metadata.get('general.architecture')!r} is not supported", f"supported: {ARCHITECTURE}"
        )
    config: dict[str, Any] = {"vocab_size": vocabulary, "eos_token_id": eos, "norm_topk_prob": True}
    for ours, theirs in _CONFIG_KEYS.items():
        value = metadata.get(f"{ARCHITECTURE}.{theirs}")
        if value is None and ours in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_experts",
                                      "num_experts_per_tok", "moe_intermediate_size", "rms_norm_eps"):  # fmt: skip
            raise ConvertError(f"metadata '{ARCHITECTURE}.{theirs}' is missing", "the file is incomplete")
        if value is not None:
            config[ours] = value
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    if not isinstance(layers, int) or not 0 < layers <= 10_000 or not isinstance(heads, int) or heads < 1:
        raise ConvertError(
            f"metadata '{ARCHITECTURE}.block_count' or '.attention.head_count' is no count", "the file is damaged"
        )
    config["mlp_only_layers"] = [layer for layer in range(layers) if not has(f"blk.{layer}.ffn_gate_inp.weight")]
    if len(config["mlp_only_layers"]) == layers:
        raise ConvertError("tensor 'blk.0.ffn_gate_inp.weight' is missing", "the file has no layer with experts")
    config["tie_word_embeddings"] = not has("output.weight")
    try:
        schema = read_config(config)
    except ConvertError as error:
        message = str(error).replace("config.json: ", "metadata: ")
        for ours, theirs in _CONFIG_KEYS.items():
            message = message.replace(f"'{ours}'", f"'{ARCHITECTURE}.{theirs}'")
        raise ConvertError(message, error.hint or "the file is damaged, or of a model that is not supported") from error
    for key in ("attention.value_length", "rope.dimension_count"):
        _one_of(metadata, key, schema.head_dim)
    _one_of(metadata, "rope.scaling.type", "none")
    _one_of(metadata, "expert_weights_norm", True)
    _one_of(metadata, "expert_weights_scale", 1.0, 0.0)
    _one_of(metadata, "expert_shared_count", 0)
    _one_of(metadata, "expert_gating_func", 1, 0)
    return schema


def metadata_of(schema: ModelSchema) -> dict[str, int | float]:
    """Metadata of a model, integers and floats; ConvertError if GGUF's ``qwen3moe`` cannot say what it computes."""
    if not schema.normalize_top_k:
        raise ConvertError(
            "the model does not rescale the weights of the chosen experts (norm_topk_prob is false)",
            "qwen3moe always rescales them: this model cannot be written as GGUF",
        )
    values: dict[str, int | float] = {
        "block_count": schema.layers,
        "context_length": schema.max_positions,
        "embedding_length": schema.hidden,
        "feed_forward_length": schema.dense_width,
        "expert_feed_forward_length": schema.expert_width,
        "expert_count": schema.experts,
        "expert_used_count": schema.top_k,
        "attention.head_count": schema.heads,
        "attention.head_count_kv": schema.kv_heads,
        "attention.key_length": schema.head_dim,
        "attention.value_length": schema.head_dim,
        "attention.layer_norm_rms_epsilon": schema.norm_epsilon,
        "rope.freq_base": schema.rope_theta,
        "rope.dimension_count": schema.head_dim,
        "vocab_size": schema.vocabulary,
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def tensor_sources(schema: ModelSchema) -> dict[str, list[Source]]:
    """Store tensor -> GGUF tensors laid one below the other, all but FFNs."""
    hidden, inner, kv = schema.hidden, schema.heads * schema.head_dim, schema.kv_heads * schema.head_dim
    sources: dict[str, list[Source]] = {"embedding": [("token_embd.weight", (schema.vocabulary, hidden))]}
    if not schema.tied_embeddings:
        sources["head"] = [("output.weight", (schema.vocabulary, hidden))]
    sources["final_norm"] = [("output_norm.weight", (hidden,))]
    for layer in range(schema.layers):
        ours, theirs = f"layers.{layer}.", f"blk.{layer}."
        sources[ours + "attention_norm"] = [(theirs + "attn_norm.weight", (hidden,))]
        sources[ours + "query_key_value"] = [
            (theirs + "attn_q.weight", (inner, hidden)),
            (theirs + "attn_k.weight", (kv, hidden)),
            (theirs + "attn_v.weight", (kv, hidden)),
        ]
        sources[ours + "query_norm"] = [(theirs + "attn_q_norm.weight", (schema.head_dim,))]
        sources[ours + "key_norm"] = [(theirs + "attn_k_norm.weight", (schema.head_dim,))]
        sources[ours + "attention_output"] = [(theirs + "attn_output.weight", (hidden, inner))]
        sources[ours + "ffn_norm"] = [(theirs + "ffn_norm.weight", (hidden,))]
        if layer in schema.moe_layers:
            sources[ours + "router"] = [(theirs + "ffn_gate_inp.weight", (schema.experts, hidden))]
    return sources


def ffn_sources(schema: ModelSchema, layer: int) -> dict[str, Source]:
    """Projection -> GGUF tensor of all experts of a layer (experts, rows, columns), or of its dense FFN (rows, columns)."""
    dense = layer in schema.dense_layers
    width = schema.dense_width if dense else schema.expert_width
    suffix, experts = ("", ()) if dense else ("_exps", (schema.experts,))
    return {
        projection: (f"blk.{layer}.ffn_{projection}{suffix}.weight", (*experts, *shape))
        for projection, shape in (
            ("gate", (width, schema.hidden)), ("up", (width, schema.hidden)), ("down", (schema.hidden, width))
        )
    }  # fmt: skip
