"""Granite: Llama's layers with a scale of scores, and multipliers of the embedding, of what a layer adds, of the logits.

Dense (``GraniteForCausalLM``, GGUF ``granite``); with experts of a softmax over the chosen ones (``GraniteMoeForCausalLM``,
GGUF ``granitemoe``), which are all in two tensors of a layer; and with an expert beside them that every token uses
(``GraniteMoeSharedForCausalLM``, GGUF ``granitemoe`` too). Rows in GGUF files are those of :mod:`elmoe.models.llama`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import sqrt
from typing import Any

import msgspec

from elmoe.models.common import (
    EXPERT_KEYS,
    EXPERTS_REQUIRED,
    GROUPED_KEYS,
    GROUPED_REQUIRED,
    choice,
    experts_fixed,
    experts_metadata,
    grouped_attention,
    grouped_fixed,
    grouped_metadata,
    model,
)
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import EXPERTS_GGUF, GROUPED, GROUPED_GGUF, NEIGHBOURS
from elmoe.models.spec import Dense, GroupedAttention, LayerSpec, ModelSpec, Moe, Multipliers, Router

SHARED_WIDTH = "expert_shared_feed_forward_length"
"""GGUF's key, without the architecture, by which a model with a shared expert is told."""
_MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}


def _spec(config: Config, family: str, feed_forward: Moe | Dense) -> ModelSpec:
    """A model of equal layers; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    config.must_be("activation_function", "silu")  # as PowerMoE's configuration calls it beside
    config.must_be("position_embedding_type", "rope")
    bias = config.flag("attention_bias", False)
    attention = grouped_attention(
        config, query_key_value_bias=bias, output_bias=bias, score_scale=config.number("attention_multiplier", 1.0)
    )
    layer = LayerSpec(attention=attention, feed_forward=feed_forward)
    found = model(config, family, [layer] * config.layers(), epsilon=1e-6, positions=2048)
    multipliers = Multipliers(
        embedding=config.number("embedding_multiplier", 1.0), residual=config.number("residual_multiplier", 1.0),
        logits=config.number("logits_scaling", 1.0),
    )  # fmt: skip
    return msgspec.structs.replace(found, multipliers=multipliers)


def _experts(config: Config, shared: int = 0) -> Moe:
    """The softmax over the chosen experts is that over all of them, rescaled."""
    experts, top_k = choice(config, "num_local_experts", "num_experts")
    router = Router(experts=experts, top_k=top_k, normalize=True)
    return Moe(router=router, width=config.integer("intermediate_size"), shared_width=shared)


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration with experts; ModelError names any value that is not supported."""
    config.must_be("shared_intermediate_size", None)
    return _spec(config, FAMILY.name, _experts(config))


def read_shared(config: Config) -> ModelSpec:
    """As ``read_config``, with an expert that every token uses."""
    shared = config.integer("shared_intermediate_size", default=1024)
    return _spec(config, SHARED.name, _experts(config, shared))


def read_dense(config: Config) -> ModelSpec:
    """The spec of a configuration without experts; ModelError names any value that is not supported."""
    dense = Dense(width=config.integer("intermediate_size"), bias=config.flag("mlp_bias", False))
    return _spec(config, DENSE.name, dense)


def _metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    """GGUF's metadata; ModelError where its layers differ, which GGUF cannot say."""
    common = experts_metadata(spec, normalize=True) if spec.moe_layers else grouped_metadata(spec)
    attention, multipliers = spec.layers[0].attention, spec.multipliers
    assert isinstance(attention, GroupedAttention) and attention.score_scale is not None
    if spec.moe_layers and spec.moe(0).shared_width:
        common[SHARED_WIDTH] = spec.moe(0).shared_width
    return common | {
        "attention.scale": attention.score_scale, "embedding_scale": multipliers.embedding,
        "residual_scale": multipliers.residual, "logit_scale": multipliers.logits,
    }  # fmt: skip


def _fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    """Without ``rope.scaling.finetuned``, a file's positions are not rotated at all."""
    return (experts_fixed if spec.moe_layers else grouped_fixed)(spec) | {"rope.scaling.finetuned": (True,)}


def _gguf(
    architecture: str, keys: dict[str, str], required: tuple[str, ...], names: dict[str, str],
    recognise: Callable[[Mapping[str, Any]], bool],
) -> GgufFamily:  # fmt: skip
    def config(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
        """A file without a scale of scores has the usual one, where transformers takes 1."""
        heads, hidden = (metadata.get(f"{architecture}.{key}") for key in ("attention.head_count", "embedding_length"))
        head_dim = metadata.get(f"{architecture}.attention.key_length")
        if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
            head_dim = hidden // heads
        return {"attention_multiplier": 1 / sqrt(head_dim)} if isinstance(head_dim, int) and head_dim > 0 else {}

    return GgufFamily(
        architecture=architecture,
        flags={"attention_bias": "attention_output_bias"},
        keys=GROUPED_KEYS | keys | _MULTIPLIERS,
        required=(*required, "logits_scaling"),
        names=GROUPED_GGUF | names,
        metadata=_metadata,
        fixed=_fixed,
        config=config,
        recognise=recognise,
        neighbours=NEIGHBOURS,
    )


_BLOCK, _SHARED = "model.layers.{layer}.block_sparse_moe.", "model.layers.{layer}.shared_mlp."
_NAMES = GROUPED | {
    "router": _BLOCK + "router.layer.weight",
    "expert_gate_up": _BLOCK + "input_linear.weight",
    "expert_down": _BLOCK + "output_linear.weight",
}
FAMILY = Family(
    name="granitemoe",
    architectures=("GraniteMoeForCausalLM",),
    read_config=read_config,
    names=_NAMES,
    gguf=_gguf(
        "granitemoe", EXPERT_KEYS, EXPERTS_REQUIRED, EXPERTS_GGUF,
        lambda metadata: not metadata.get(f"granitemoe.{SHARED_WIDTH}"),
    ),
)  # fmt: skip
SHARED = Family(
    name="granitemoeshared",
    architectures=("GraniteMoeSharedForCausalLM",),
    read_config=read_shared,
    names=_NAMES | {"shared_gate_up": _SHARED + "input_linear.weight", "shared_down": _SHARED + "output_linear.weight"},
    gguf=_gguf(
        "granitemoe", EXPERT_KEYS | {"shared_intermediate_size": SHARED_WIDTH}, EXPERTS_REQUIRED,
        EXPERTS_GGUF | {f"shared_{part}": f"blk.{{layer}}.ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
        lambda metadata: bool(metadata.get(f"granitemoe.{SHARED_WIDTH}")),
    ),
)  # fmt: skip
DENSE = Family(
    name="granite",
    architectures=("GraniteForCausalLM",),
    read_config=read_dense,
    names=GROUPED,
    gguf=_gguf(
        "granite", {}, GROUPED_REQUIRED, {}, lambda metadata: not metadata.get("granite.expert_count")
    ),
)  # fmt: skip
