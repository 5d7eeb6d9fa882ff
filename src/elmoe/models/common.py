"""Parts of configurations that several families spell alike: what every model has, grouped and latent attention, experts;
and GGUF's metadata of dense models with grouped-query attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from elmoe.errors import ModelError
from elmoe.models.config import Config
from elmoe.models.gguf_rope import scaling_metadata
from elmoe.models.spec import (
    Dense,
    GroupedAttention,
    LatentAttention,
    LayerSpec,
    ModelSpec,
    Moe,
    Router,
    YarnScaling,
)

GROUPED_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
"""Key of config.json -> GGUF's key, for dense models."""
GROUPED_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "rms_norm_eps")
"""Those that a GGUF file must have."""
EXPERT_KEYS = {"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
"""Further keys of models with experts."""
ROUTED_KEYS = {
    "n_routed_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}
"""Those of DeepSeek's descendants, whose first layers are dense."""
ROUTED_REQUIRED = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace")
"""Those of them that a GGUF file must have."""
EXPERTS_REQUIRED = (*GROUPED_REQUIRED, *EXPERT_KEYS)
"""Those that a GGUF file of a model with experts must have."""


def model(config: Config, family: str, layers: Iterable[LayerSpec], epsilon: float, positions: int) -> ModelSpec:
    """A model of these layers; ``epsilon`` of the norms and ``positions`` are the family's where the keys are absent."""
    vocabulary = config.integer("vocab_size")
    return ModelSpec(
        family=family, vocabulary=vocabulary, hidden=config.integer("hidden_size"), layers=tuple(layers),
        norm_epsilon=config.number("rms_norm_eps", epsilon),
        max_positions=config.integer("max_position_embeddings", default=positions),
        tied_embeddings=config.flag("tie_word_embeddings", False), eos_tokens=config.tokens("eos_token_id", vocabulary),
    )  # fmt: skip


def grouped_attention(config: Config, theta: float = 10000.0, partial: float | None = None, **more: Any) -> GroupedAttention:
    """Grouped-query attention. ``theta``, ``partial``: see :meth:`Config.rope`; ``more``: what else the family has. Its
    scores are not scaled with YaRN's ``mscale``, as in transformers: latent attention alone does that."""
    heads, kv_heads, head_dim = config.heads(config.integer("hidden_size"))
    rope = config.rope(head_dim, theta, partial=partial)
    if isinstance(rope.scaling, YarnScaling):
        rope = msgspec.structs.replace(rope, scaling=msgspec.structs.replace(rope.scaling, score_factor=1.0))
    return GroupedAttention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, **more)


def latent_attention(config: Config) -> LatentAttention:
    """DeepSeek's attention. The published files rotate neighbours; ``rope_interleave`` is transformers' word for it."""
    config.must_be("attention_bias", False)
    heads, rotary = config.integer("num_attention_heads"), config.integer("qk_rope_head_dim")
    if config.integer("num_key_value_heads", default=heads) != heads:
        config.fail(
            f"'num_key_value_heads' is {config.values['num_key_value_heads']}, not the {heads} heads of latent attention"
        )
    return LatentAttention(
        heads=heads, latent_rank=config.integer("kv_lora_rank"), plain_dim=config.integer("qk_nope_head_dim"),
        value_dim=config.integer("v_head_dim"),
        rope=config.rope(rotary, interleaved=config.flag("rope_interleave", True)),
        query_rank=config.integer("q_lora_rank") if config.has("q_lora_rank") else None,
    )  # fmt: skip


def choice(config: Config, *keys: str) -> tuple[int, int]:
    """The number of experts, by the first of ``keys`` that is present, and how many of them a token uses."""
    experts = config.integer(*keys)
    return experts, config.integer("num_experts_per_tok", most=experts)


def sparse_layers(config: Config, layers: int) -> list[bool]:
    """Which layers have experts: by ``mlp_layer_types``, or from ``first_k_dense_replace`` at every ``moe_layer_freq``."""
    kinds = config.words("mlp_layer_types", layers, ("dense", "sparse"))
    named = None if kinds is None else [kind == "sparse" for kind in kinds]
    if named is not None and not config.has("first_k_dense_replace"):
        return named
    first, step = config.integer("first_k_dense_replace", least=0), config.integer("moe_layer_freq", default=1)
    counted = [index >= first and index % step == 0 for index in range(layers)]
    if named is not None and named != counted:
        config.fail("'mlp_layer_types' and 'first_k_dense_replace' disagree")
    return counted


def feed_forwards(config: Config, sparse: list[bool], moe: Moe | None) -> list[Moe | Dense]:
    """The feed-forward of each layer: ``moe`` where it is sparse, else one of ``intermediate_size``."""
    dense = None if all(sparse) else Dense(width=config.integer("intermediate_size"))
    found = [moe if is_sparse else dense for is_sparse in sparse]
    return [one for one in found if one is not None]


def sparse_by_step(config: Config, moe: Moe) -> list[Moe | Dense]:
    """The feed-forward of each layer as Qwen has it: ``moe`` in every ``decoder_sparse_step``-th layer that is not one of
    ``mlp_only_layers``, else a dense one of ``intermediate_size``."""
    layers, step = config.layers(), config.integer("decoder_sparse_step", default=1)
    only = config.indices("mlp_only_layers", layers)
    return feed_forwards(config, [index not in only and (index + 1) % step == 0 for index in range(layers)], moe)


def experts_with_shared(config: Config, router: Router, shared: int) -> Moe:
    """Experts of ``moe_intermediate_size`` and shared ones of the same width, ``shared`` of them where the key is absent."""
    width = config.integer("moe_intermediate_size")
    return Moe(router=router, width=width, shared_width=width * config.integer("n_shared_experts", default=shared, least=0))


def sigmoid_router(
    config: Config, normalize: bool, groups: int, kept: int, scaling: float, words: tuple[str, ...] = ("sigmoid",)
) -> Router:
    """DeepSeek-V3's router, which GLM shares: sigmoid scores, a bias for the choice only, groups by their best two.

    The parameters are the family's values where the keys are absent; ``words``: what ``scoring_func`` calls it.
    """
    config.must_be("scoring_func", *words)
    config.must_be("topk_method", "noaux_tc")
    experts, top_k = choice(config, "n_routed_experts", "num_local_experts", "num_experts")
    return Router(
        experts=experts, top_k=top_k, score="sigmoid", selection_bias=True,
        normalize=config.flag("norm_topk_prob", normalize), groups=config.integer("n_group", default=groups),
        kept_groups=config.integer("topk_group", default=kept), group_score="best_two",
        scaling=config.number("routed_scaling_factor", scaling),
    )  # fmt: skip


def attention_metadata(spec: ModelSpec, truncate: bool = True) -> dict[str, int | float | str]:
    """GGUF's metadata of what all families with grouped-query attention have. ``truncate``: see ``scaling_metadata``."""
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedAttention) and attention.rope is not None
    return {
        "block_count": len(spec.layers),
        "context_length": spec.max_positions,
        "embedding_length": spec.hidden,
        "attention.head_count": attention.heads,
        "attention.head_count_kv": attention.kv_heads,
        "attention.key_length": attention.head_dim,
        "attention.value_length": attention.head_dim,
        "attention.layer_norm_rms_epsilon": spec.norm_epsilon,
        "rope.freq_base": attention.rope.theta,
        "rope.dimension_count": attention.rope.dimensions,
        "vocab_size": spec.vocabulary,
    } | scaling_metadata(attention.rope, truncate)


def attention_fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    """GGUF's metadata that must have one of these values where attention is grouped."""
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedAttention) and attention.rope is not None
    return {
        "attention.value_length": (attention.head_dim,),
        "rope.dimension_count": (attention.rope.dimensions,),
        "rope.scale_linear": (1.0, 0.0),
        "rope.scaling.attn_factor": (1.0, 0.0),
    }


def one_layer(spec: ModelSpec) -> LayerSpec:
    """The layer that all layers are; ModelError where they differ or have a window, which GGUF cannot say."""
    attention = spec.layers[0].attention
    if len(set(spec.layers)) > 1:
        raise ModelError("the layers differ", "GGUF describes all of them by one: this model cannot be written")
    if isinstance(attention, GroupedAttention) and attention.window is not None:
        raise ModelError(
            f"attention has a window of {attention.window} positions", "the architecture has none: it cannot be written"
        )
    return spec.layers[0]


def grouped_metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    """GGUF's metadata of a dense model; ModelError where its layers differ, which GGUF cannot say."""
    dense = one_layer(spec).feed_forward
    assert isinstance(dense, Dense)
    return attention_metadata(spec) | {"feed_forward_length": dense.width}


def experts_metadata(spec: ModelSpec, normalize: bool) -> dict[str, int | float | str]:
    """GGUF's metadata of a model of experts in every layer; ModelError where its layers differ, or where it does not
    ``normalize`` the weights of the chosen experts as the architecture does."""
    moe = one_layer(spec).feed_forward
    assert isinstance(moe, Moe)
    check_normalize(moe, normalize)
    return attention_metadata(spec) | {
        "feed_forward_length": moe.width, "expert_count": spec.experts, "expert_used_count": spec.top_k
    }  # fmt: skip


def check_normalize(moe: Moe, normalize: bool) -> None:
    """ModelError where a router does not ``normalize`` as a GGUF architecture always does."""
    if moe.router.normalize != normalize:
        rule = "does not rescale" if normalize else "rescales"
        raise ModelError(
            f"the model {rule} the weights of the chosen experts (norm_topk_prob is {str(not normalize).lower()})",
            f"the architecture {'always' if normalize else 'never'} does: this model cannot be written as GGUF",
        )


def routed_metadata(spec: ModelSpec, architecture: str) -> dict[str, int | float | str]:
    """GGUF's metadata of a model with grouped-query attention, :func:`sigmoid_router` and dense first layers; ModelError
    where layers differ otherwise."""
    first, dense = spec.moe_layers[0], spec.layers[0].feed_forward
    moe = spec.moe(first)
    if spec.dense_layers != tuple(range(first)) or len(set(spec.layers)) > 2 or moe.shared_width % moe.width:
        raise ModelError(
            "its dense layers are not the first ones, or layers differ otherwise", f"{architecture} cannot say that"
        )
    return attention_metadata(spec) | {
        "feed_forward_length": dense.width if isinstance(dense, Dense) else moe.width,
        "expert_feed_forward_length": moe.width, "expert_count": spec.experts, "expert_used_count": spec.top_k,
        "expert_shared_count": moe.shared_width // moe.width, "leading_dense_block_count": first,
        "expert_weights_scale": moe.router.scaling, "expert_weights_norm": moe.router.normalize, "expert_gating_func": 2,
    } | group_metadata(moe.router)  # fmt: skip


def group_metadata(router: Router) -> dict[str, int | float | str]:
    """GGUF's metadata of groups of experts; all of them kept are as good as one, and llama.cpp stops at them."""
    several = router.kept_groups < router.groups
    return {
        "expert_group_count": router.groups if several else 1,
        "expert_group_used_count": router.kept_groups if several else 1,
    }


def experts_fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    """GGUF's metadata that must have one of these values in a file of a model with experts."""
    return attention_fixed(spec) | {
        "expert_weights_norm": (spec.moe(spec.moe_layers[0]).router.normalize,), "expert_weights_scale": (1.0, 0.0),
        "expert_shared_count": (0,), "expert_gating_func": (1, 0),
    }  # fmt: skip


def grouped_fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    """GGUF's metadata that must have one of these values in a file of a dense model."""
    return attention_fixed(spec) | {"expert_count": (0,)}
