"""Qwen2-MoE and Qwen1.5-MoE (``Qwen2MoeForCausalLM``, GGUF ``qwen2moe``): biases of queries, keys and values, experts of a
softmax router, and an expert that every token uses, weighted by a sigmoid gate.
"""

from __future__ import annotations

import msgspec

from elmoe.errors import ModelError
from elmoe.models.common import (
    EXPERT_KEYS,
    EXPERTS_REQUIRED,
    GROUPED_KEYS,
    choice,
    experts_fixed,
    experts_metadata,
    grouped_attention,
    model,
    sparse_by_step,
)
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.names import EXPERTS, EXPERTS_GGUF, GROUPED, GROUPED_GGUF
from elmoe.models.spec import LayerSpec, ModelSpec, Moe, Router

_PARTS = ("gate", "up", "down")


def read_config(config: Config) -> ModelSpec:
    """The spec of a configuration; ModelError names any value that is not supported."""
    config.must_be("hidden_act", "silu")
    layers, sliding = config.layers(), config.flag("use_sliding_window", False)
    attention = grouped_attention(config, query_key_value_bias=config.flag("qkv_bias", True))
    experts, top_k = choice(config, "num_experts", "num_local_experts")
    router = Router(experts=experts, top_k=top_k, normalize=config.flag("norm_topk_prob", False))
    moe = Moe(
        router=router, width=config.integer("moe_intermediate_size"),
        shared_width=config.integer("shared_expert_intermediate_size"), shared_gate=True,
    )  # fmt: skip
    last = config.integer("max_window_layers", default=28, least=0) if sliding else 0
    kinds = ["sliding_attention" if index < last and index % 2 == 0 else "full_attention" for index in range(layers)]
    if not sliding and "sliding_attention" in (
        config.words("layer_types", layers, ("full_attention", "sliding_attention")) or ()
    ):
        config.fail("'layer_types' names 'sliding_attention', and 'use_sliding_window' is not true")
    specs = (
        LayerSpec(attention=msgspec.structs.replace(attention, window=window), feed_forward=one)
        for window, one in zip(config.windows(layers, kinds), sparse_by_step(config, moe), strict=True)
    )
    return model(config, FAMILY.name, specs, epsilon=1e-6, positions=32768)


def _gguf_metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    common, moe = experts_metadata(spec, normalize=False), spec.moe(0)
    return common | {
        "expert_feed_forward_length": moe.width, "expert_shared_feed_forward_length": moe.shared_width
    }  # fmt: skip


def _gguf_fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    if spec.dense_layers:
        raise ModelError("the file has layers without experts", "qwen2moe has experts in every layer")
    return experts_fixed(spec) | {"expert_shared_count": (0, 1)}


FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM",),
    read_config=read_config,
    names=GROUPED
    | EXPERTS
    | {"shared_expert_gate": "model.layers.{layer}.mlp.shared_expert_gate.weight"}
    | {f"shared_{part}": f"model.layers.{{layer}}.mlp.shared_expert.{part}_proj.weight" for part in _PARTS},
    gguf=GgufFamily(
        architecture="qwen2moe",
        flags={"qkv_bias": "query_bias"},
        keys=GROUPED_KEYS
        | EXPERT_KEYS
        | {
            "moe_intermediate_size": "expert_feed_forward_length",
            "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
        },
        required=(*EXPERTS_REQUIRED, "moe_intermediate_size", "shared_expert_intermediate_size"),
        names=GROUPED_GGUF
        | EXPERTS_GGUF
        | {"shared_expert_gate": "blk.{layer}.ffn_gate_inp_shexp.weight"}
        | {f"shared_{part}": f"blk.{{layer}}.ffn_{part}_shexp.weight" for part in _PARTS},
        metadata=_gguf_metadata,
        fixed=_gguf_fixed,
    ),
)
