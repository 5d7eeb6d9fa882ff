"""Mixtral (``MixtralForCausalLM``): grouped-query attention, perhaps in a window, and experts of a softmax router.

GGUF's ``llama`` with experts; see :mod:`elmoe.models.llama` for the order of rows there.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from elmoe.models.common import (
    EXPERT_KEYS,
    EXPERTS_REQUIRED,
    GROUPED_KEYS,
    choice,
    experts_fixed,
    experts_metadata,
    grouped_attention,
    model,
)
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import EXPERTS_GGUF, GROUPED, GROUPED_GGUF, NEIGHBOURS
from elmoe.models.spec import LayerSpec, ModelSpec, Moe, Router


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    window = config.integer("sliding_window") if config.has("sliding_window") else None
    attention = grouped_attention(config, theta=1e6, window=window)
    experts, top_k = choice(config, "num_local_experts", "num_experts")
    router = Router(experts=experts, top_k=top_k, normalize=True)
    layer = LayerSpec(attention=attention, feed_forward=Moe(router=router, width=config.integer("intermediate_size")))
    return model(config, FAMILY.name, [layer] * config.layers(), epsilon=1e-5, positions=131072)


def _with_experts(metadata: Mapping[str, Any]) -> bool:
    return bool(metadata.get("llama.expert_count"))


_BLOCK = "model.layers.{layer}.block_sparse_moe."
_EXPERT = _BLOCK + "experts.{expert}."
FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    read_config=read_config,
    names=GROUPED
    | {"router": _BLOCK + "gate.weight", "expert_gate": _EXPERT + "w1.weight"}
    | {"expert_up": _EXPERT + "w3.weight", "expert_down": _EXPERT + "w2.weight"},
    gguf=GgufFamily(
        architecture="llama",
        keys=GROUPED_KEYS | EXPERT_KEYS,
        required=EXPERTS_REQUIRED,
        names=GROUPED_GGUF | EXPERTS_GGUF,
        metadata=partial(experts_metadata, normalize=True),
        fixed=experts_fixed,
        recognise=_with_experts,
        neighbours=NEIGHBOURS,
    ),
)
