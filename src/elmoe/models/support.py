"""What today's engine computes: everything else that a spec can say is refused by name, never run silently."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from elmoe.errors import ModelError
from elmoe.models.spec import (
    Activation,
    Dense,
    GroupedAttention,
    LatentAttention,
    LayerSpec,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Moe,
    Multipliers,
    Rope,
    YarnScaling,
)

HEAD_DIMENSIONS = 16
"""Divisor of a head's dimensions: the lanes of a block of cached keys."""
MOST_LATENT = 4096
"""Largest sum of the dimensions of a latent and its rotary key."""


def check_supported(spec: ModelSpec) -> None:
    """ModelError naming what the engine cannot compute; nothing where it can run the model."""
    reasons = list(dict.fromkeys(_unsupported(spec)))
    if reasons:
        raise ModelError(
            f"the engine cannot run a {spec.family} model: {'; '.join(reasons)}",
            "the simulator prices it: elmoe simulate --model config.json",
        )


def _unsupported(spec: ModelSpec) -> Iterator[str]:
    if spec.multipliers != Multipliers():
        yield from _of_multiplied(spec)
    attentions = {_without_window(layer.attention) for layer in spec.layers}
    if len(attentions) > 1:
        yield "its layers differ in attention"
    for layer in spec.layers:
        yield from _of_layer(layer)


def _without_window(attention: GroupedAttention | LatentAttention) -> GroupedAttention | LatentAttention:
    return msgspec.structs.replace(attention, window=None) if isinstance(attention, GroupedAttention) else attention


def _of_multiplied(spec: ModelSpec) -> Iterator[str]:
    """What has norms of its own inside of a layer: the decoder divides the residual stream, and the epsilon of its norms."""
    for layer in spec.layers:
        if not isinstance(layer.attention, GroupedAttention):
            yield "multipliers of a model with latent attention"
        elif layer.attention.query_key_norm != "none":
            yield "multipliers of a model with norms of queries and keys"


def _of_layer(layer: LayerSpec) -> Iterator[str]:
    attention, found = layer.attention, layer.feed_forward
    if layer.post_norms:
        yield "norms behind attention and feed-forward"
    if isinstance(attention, GroupedAttention):
        yield from _of_grouped(attention)
    else:
        yield from _of_latent(attention)
    clamped = found.activation.kind == "clamped_swiglu" and found.activation.limit is not None
    if not (isinstance(found, Moe) and found.bias and clamped):  # experts have both, or neither
        if found.activation != Activation():
            yield f"the activation {found.activation.kind}"
        if found.bias:
            yield "biases of feed-forwards"
    if not isinstance(found, Moe | Dense):
        yield f"a feed-forward of kind {type(found).__name__}"


def _of_grouped(attention: GroupedAttention) -> Iterator[str]:
    if attention.head_dim % HEAD_DIMENSIONS:
        yield f"'head_dim' {attention.head_dim} (supported: multiples of {HEAD_DIMENSIONS})"
    if attention.gate:
        yield "gated attention"
    rope = attention.rope
    if rope is None:
        yield "attention without rotary embedding"
        return
    if rope.interleaved:
        yield "interleaved rotary embedding"
    if isinstance(rope.scaling, YarnScaling) and rope.scaling.score_factor != 1:
        yield f"a score factor of {rope.scaling.score_factor:g} of the rope scaling 'yarn'"
    yield from _of_rope(rope)


def _of_latent(attention: LatentAttention) -> Iterator[str]:
    sizes = {
        "kv_lora_rank": attention.latent_rank, "qk_rope_head_dim": attention.rope.dimensions,
        "v_head_dim": attention.value_dim,
    }  # fmt: skip
    for name, size in sizes.items():
        if size % HEAD_DIMENSIONS:
            yield f"'{name}' {size} (supported: multiples of {HEAD_DIMENSIONS})"
    if attention.cache_values > MOST_LATENT:
        yield f"latents of {attention.cache_values} dimensions with the rotary key (supported: up to {MOST_LATENT})"
    yield from _of_rope(attention.rope)


def _of_rope(rope: Rope) -> Iterator[str]:
    scaling = rope.scaling
    if scaling is not None and not isinstance(scaling, (LinearScaling, Llama3Scaling, YarnScaling)):
        yield f"the rope scaling '{scaling.__struct_config__.tag}'"
    if isinstance(scaling, YarnScaling) and rope.theta <= 1:
        yield f"the rope scaling 'yarn' of a theta of {rope.theta:g}"
    if isinstance(scaling, Llama3Scaling) and not scaling.low_frequency_factor < scaling.high_frequency_factor:
        yield f"a 'low_freq_factor' of {scaling.low_frequency_factor:g} that is not below 'high_freq_factor'"
