"""Hugging Face configurations of the families that the simulator knows, read into shapes.

Key names differ between families; what each needs is written out here, so that a missing key is an error and not a default.
"""

from __future__ import annotations

from typing import Any, NoReturn

from elmoe.errors import HardwareError

FAMILIES = (
    "deepseek_v2", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "gpt_oss",
    "kimi_k2", "mixtral", "olmoe", "qwen2", "qwen3_moe",
)  # fmt: skip
"""Values of ``model_type`` that are read."""
_LATENT = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2")
_SHARED = (*_LATENT, "glm4_moe")
_MOST = 1 << 24


class _Reader:
    """Typed reads of one configuration; errors name the file and the key."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def integer(self, *keys: str, least: int = 1) -> int:
        """The first of ``keys`` that is present and not null."""
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
                self.fail(f"'{key}' is {value!r}, expected a whole number from {least} to {_MOST}")
            return value
        self.fail(f"has no '{keys[0]}'" + "".join(f" (nor '{key}')" for key in keys[1:]))

    def optional(self, key: str, otherwise: int, least: int = 0) -> int:
        """As ``integer``; ``otherwise`` where the key is absent or null."""
        return otherwise if self.config.get(key) is None else self.integer(key, least=least)

    def fail(self, what: str) -> NoReturn:
        raise HardwareError(f"'{self.where}' {what}", "expected a published config.json of " + ", ".join(FAMILIES))


def shapes_of_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields of ``Architecture`` but for its name and source. HardwareError names ``where`` and the key."""
    read = _Reader(config, where)
    if "model_type" not in config:
        read.fail("has no 'model_type'")
    family = config["model_type"]
    if family not in FAMILIES:
        read.fail(f"is of the unknown family {family!r} ('model_type')")
    layers, hidden = read.integer("num_hidden_layers"), read.integer("hidden_size")
    moe_layers = _moe_layers(read, family, layers)
    shapes: dict[str, Any] = {
        "layers": layers,
        "hidden": hidden,
        "vocabulary": read.integer("vocab_size"),
        "moe_layers": moe_layers,
        "dense_layers": layers - moe_layers,
        "experts": 0,
        "top_k": 0,
        "expert_width": 0,
        "shared_width": 0,
        "dense_width": read.integer("intermediate_size") if moe_layers < layers else 0,
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }
    if moe_layers:
        own_width = ("intermediate_size",) if family in ("mixtral", "olmoe", "gpt_oss") else ("moe_intermediate_size",)
        shapes["experts"] = read.integer("num_experts", "n_routed_experts", "num_local_experts")
        shapes["top_k"] = read.integer("num_experts_per_tok")
        shapes["expert_width"] = width = read.integer(*own_width)
        if family in _SHARED:
            shapes["shared_width"] = read.optional("n_shared_experts", 0) * width
    if family == "gpt_oss":
        shapes |= {"expert_bits": 4.25, "msb_bits": 4.25, "lsb_bits": 0.0}
    return shapes | (_latent_attention(read, hidden) if family in _LATENT else _grouped_attention(read, hidden))


def _moe_layers(read: _Reader, family: str, layers: int) -> int:
    """How many layers have experts."""
    config = read.config
    if family == "qwen2":
        return 0
    if family in ("mixtral", "olmoe", "gpt_oss"):
        return layers
    if family == "qwen3_moe":
        only, step = config.get("mlp_only_layers") or [], read.optional("decoder_sparse_step", 1, least=1)
        if not isinstance(only, list):
            read.fail(f"'mlp_only_layers' is {only!r}, expected a list of layers")
        return sum(layer not in only and (layer + 1) % step == 0 for layer in range(layers))
    kinds = config.get("mlp_layer_types")
    if isinstance(kinds, list):
        if len(kinds) != layers or not set(kinds) <= {"dense", "sparse"}:
            read.fail(f"'mlp_layer_types' must name 'dense' or 'sparse' for each of the {layers} layers")
        return kinds.count("sparse")
    first, step = read.integer("first_k_dense_replace", least=0), read.optional("moe_layer_freq", 1, least=1)
    return sum(layer >= first and layer % step == 0 for layer in range(layers))


def _grouped_attention(read: _Reader, hidden: int) -> dict[str, int]:
    """Multi-head or grouped-query attention: query, key, value and output projection."""
    heads, kv_heads = read.integer("num_attention_heads"), read.integer("num_key_value_heads")
    if read.config.get("head_dim") is None and hidden % heads:
        read.fail(f"has no 'head_dim', and {heads} heads do not divide 'hidden_size' {hidden}")
    head_dim = read.optional("head_dim", hidden // heads, least=1)
    return {
        "attention_parameters": 2 * hidden * (heads + kv_heads) * head_dim,
        "kv_bytes_per_position": 2 * 2 * kv_heads * head_dim,
        "attention_width": heads * 2 * head_dim,
    }


def _latent_attention(read: _Reader, hidden: int) -> dict[str, int]:
    """Multi-head latent attention: queries through ``q_lora_rank`` if there is one, keys and values through the latent."""
    heads, latent = read.integer("num_attention_heads"), read.integer("kv_lora_rank")
    rotary, plain = read.integer("qk_rope_head_dim"), read.integer("qk_nope_head_dim")
    value, rank = read.integer("v_head_dim"), read.optional("q_lora_rank", 0)
    query = heads * (plain + rotary)
    queries = rank * (hidden + query) if rank else hidden * query
    keys_values = hidden * (latent + rotary) + latent * heads * (plain + value)
    return {
        "attention_parameters": queries + keys_values + heads * value * hidden,
        "kv_bytes_per_position": 2 * (latent + rotary),
        "attention_width": heads * (latent + rotary + latent),
    }
