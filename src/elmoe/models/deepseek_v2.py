"""DeepSeek-V2, DeepSeek-V3 and R1, Kimi-K2 (GGUF ``deepseek2``): latent attention, shared experts, experts chosen by groups.

V2 scores by softmax and takes a group for its best expert; V3 and Kimi score by sigmoid, add a bias for the choice only, and
take a group for its best two. Modules that predict further tokens (``num_nextn_predict_layers``) are not part of a spec.
"""

from __future__ import annotations

from elmoe.models.common import (
    choice,
    experts_with_shared,
    feed_forwards,
    latent_attention,
    model,
    sigmoid_router,
    sparse_layers,
)
from elmoe.models.config import Config
from elmoe.models.deepseek2 import SIGMOID, SOFTMAX, deepseek2, gating, grouped, is_kimi
from elmoe.models.family import Family
from elmoe.models.names import LATENT
from elmoe.models.spec import LayerSpec, ModelSpec, Router


def _v2_router(config: Config) -> Router:
    config.must_be("scoring_func", "softmax")
    config.must_be("topk_method", "greedy", "group_limited_greedy")
    groups = kept = 1
    if config.values.get("topk_method") == "group_limited_greedy":
        groups, kept = config.integer("n_group"), config.integer("topk_group")
    config.must_be("norm_topk_prob", False)  # implementations of DeepSeek-V2 differ in what it does
    experts, top_k = choice(config, "n_routed_experts", "num_experts")
    return Router(
        experts=experts, top_k=top_k, groups=groups, kept_groups=kept, group_score="best",
        scaling=config.number("routed_scaling_factor", 1.0),
    )  # fmt: skip


def _read(config: Config, family: str, router: Router, positions: int) -> ModelSpec:
    config.must_be("hidden_act", "silu")
    layers, attention = config.layers(), latent_attention(config)
    ffns = feed_forwards(config, sparse_layers(config, layers), experts_with_shared(config, router, shared=0))
    return model(
        config, family, (LayerSpec(attention=attention, feed_forward=ffn) for ffn in ffns), epsilon=1e-6, positions=positions
    )


def read_v2(config: Config) -> ModelSpec:
    """The spec of a DeepSeek-V2 configuration; ModelError names any value that is not supported."""
    config.must_be("mlp_bias", False)
    config.must_be("rope_interleave", True)
    return _read(config, FAMILY.name, _v2_router(config), positions=2048)


def read_v3(config: Config) -> ModelSpec:
    """The spec of a DeepSeek-V3 configuration; ModelError names any value that is not supported."""
    return _read(config, V3.name, sigmoid_router(config, True, groups=8, kept=4, scaling=2.5), positions=4096)


def read_kimi(config: Config) -> ModelSpec:
    """The spec of a Kimi-K2 configuration: DeepSeek-V3's parts under a name of its own."""
    return _read(config, KIMI_K2.name, sigmoid_router(config, True, groups=8, kept=4, scaling=2.5), positions=4096)


FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    read_config=read_v2,
    names=LATENT,
    gguf=deepseek2(lambda metadata: gating(metadata) == SOFTMAX),
)
V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    read_config=read_v3,
    names=LATENT,
    gguf=deepseek2(lambda metadata: gating(metadata) == SIGMOID and grouped(metadata) and not is_kimi(metadata)),
)
KIMI_K2 = Family(name="kimi_k2", architectures=("DeepseekV3ForCausalLM", "KimiK2ForCausalLM"), read_config=read_kimi)
