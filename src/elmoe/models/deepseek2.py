"""GGUF's ``deepseek2``: DeepSeek-V2, V3 and GLM-4.7-Flash, told apart by the router.

Files hold the parts of the projection from latents (``attn_k_b``, ``attn_v_b``), older ones the whole (``attn_kv_b``). Sizes
of heads are ``*_length_mla`` beside the first, ``*_length`` beside the second. YaRN's two ``mscale`` are one number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import log, sqrt
from typing import Any

from elmoe.errors import ModelError
from elmoe.models.common import ROUTED_KEYS, ROUTED_REQUIRED, group_metadata
from elmoe.models.family import GgufFamily
from elmoe.models.gguf_rope import scaling_metadata
from elmoe.models.names import LATENT_GGUF
from elmoe.models.spec import Dense, LatentAttention, Llama3Scaling, ModelSpec, Rope, YarnScaling

ARCHITECTURE = "deepseek2"
SOFTMAX, SIGMOID = 1, 2
"""Values of ``expert_gating_func``."""
FLASH_LAYERS, FLASH_VOCABULARY = (47, 48), 154880
"""Of GLM-4.7-Flash, with which llama.cpp takes a missing ``expert_gating_func`` for a sigmoid."""
ABSENT = {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1}
"""What a file means that does not say it, as llama.cpp takes it: families have other values of their own."""
MULTIPLIER = 0.1
"""Of ``mscale_all_dim`` in ``yarn_log_multiplier``."""


def _value(metadata: Mapping[str, Any], key: str, default: Any = None) -> Any:
    return metadata.get(f"{ARCHITECTURE}.{key}", default)


def gating(metadata: Mapping[str, Any]) -> Any:
    """``expert_gating_func`` of a file, or what llama.cpp takes where there is none."""
    flash = _value(metadata, "block_count") in FLASH_LAYERS and _value(metadata, "vocab_size") == FLASH_VOCABULARY
    return _value(metadata, "expert_gating_func") or (SIGMOID if flash else SOFTMAX)


def grouped(metadata: Mapping[str, Any]) -> bool:
    """Whether a file's experts are chosen by groups."""
    return _value(metadata, "expert_group_count", 1) not in (0, 1)


def is_kimi(metadata: Mapping[str, Any]) -> bool:
    """Whether a file is Kimi-K2's, which is not served."""
    return metadata.get("tokenizer.ggml.pre") == "kimi-k2"


def _config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json would say of heads and YaRN."""
    found: dict[str, Any] = dict(ABSENT)
    if grouped(metadata) and gating(metadata) == SOFTMAX:
        count = _value(metadata, "expert_group_count")
        raise ModelError(
            f"metadata '{ARCHITECTURE}.expert_group_count' is {count!r}, and scores are a softmax",
            "implementations differ in what a group is worth",
        )
    rotary = _value(metadata, "rope.dimension_count")
    for ours, part in (("qk_nope_head_dim", "key"), ("v_head_dim", "value")):
        size = _value(metadata, f"attention.{part}_length_mla", _value(metadata, f"attention.{part}_length"))
        if type(size) is not int or type(rotary) is not int:
            raise ModelError(
                f"metadata '{ARCHITECTURE}.attention.{part}_length_mla' or '{ARCHITECTURE}.rope.dimension_count' is missing",
                "the file is incomplete",
            )
        found[ours] = size - rotary if part == "key" else size
    multiplier = _value(metadata, "rope.scaling.yarn_log_multiplier")
    if _value(metadata, "rope.scaling.type") == "yarn":
        if type(multiplier) is not float or not 0 < multiplier < 1:
            raise ModelError(
                f"metadata '{ARCHITECTURE}.rope.scaling.yarn_log_multiplier' is {multiplier!r}",
                "implementations differ in what YaRN means without it",
            )
        mscale = round(multiplier / MULTIPLIER, 6)
        found["rope_scaling"] = {"mscale": mscale, "mscale_all_dim": mscale}
    return found


def _metadata(spec: ModelSpec) -> dict[str, int | float | str]:
    first, dense, attention = spec.moe_layers[0], spec.layers[0].feed_forward, spec.layers[0].attention
    moe = spec.moe(first)
    router = moe.router
    assert isinstance(attention, LatentAttention)
    if spec.dense_layers != tuple(range(first)) or len(set(spec.layers)) > 2 or moe.shared_width % moe.width:
        raise ModelError("its dense layers are not the first ones, or layers differ otherwise", "deepseek2 cannot say that")
    if not attention.rope.interleaved:
        raise ModelError("its rotary embedding pairs halves (rope_interleave is false)", "deepseek2 always pairs neighbours")
    if router.groups > 1 and router.group_score == "best":
        raise ModelError(
            "a group of experts is worth its best one (topk_method is group_limited_greedy)",
            "readers of deepseek2 take the best two: it cannot be written as GGUF",
        )
    found: dict[str, int | float | str] = {
        "block_count": len(spec.layers), "context_length": spec.max_positions, "embedding_length": spec.hidden,
        "feed_forward_length": dense.width if isinstance(dense, Dense) else moe.width,
        "attention.head_count": attention.heads, "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": spec.norm_epsilon, "attention.kv_lora_rank": attention.latent_rank,
        "attention.key_length": attention.cache_values, "attention.value_length": attention.latent_rank,
        "attention.key_length_mla": attention.query_dim, "attention.value_length_mla": attention.value_dim,
        "rope.freq_base": attention.rope.theta, "rope.dimension_count": attention.rope.dimensions,
        "vocab_size": spec.vocabulary, "leading_dense_block_count": first, "expert_feed_forward_length": moe.width,
        "expert_count": spec.experts, "expert_used_count": spec.top_k, "expert_shared_count": moe.shared_width // moe.width,
        "expert_weights_scale": router.scaling, "expert_weights_norm": router.normalize,
        "expert_gating_func": SIGMOID if router.score == "sigmoid" else SOFTMAX,
    }  # fmt: skip
    if attention.query_rank is not None:
        found["attention.q_lora_rank"] = attention.query_rank
    return found | group_metadata(router) | _scaling(attention.rope)


def _scaling(rope: Rope) -> dict[str, int | float | str]:
    scaling = rope.scaling
    if isinstance(scaling, Llama3Scaling):
        raise ModelError("the rope scaling is llama3", "llama.cpp does not load a deepseek2 file with its factors")
    if not isinstance(scaling, YarnScaling):
        return scaling_metadata(rope)
    if scaling.attention_factor != 1 or scaling.score_factor == 1 or scaling.factor <= 1:
        raise ModelError("'mscale' and 'mscale_all_dim' of YaRN are not one number", "deepseek2 cannot say that")
    mscale = (sqrt(scaling.score_factor) - 1) / (0.1 * log(scaling.factor))
    return scaling_metadata(rope, attention_factor=1.0) | {"rope.scaling.yarn_log_multiplier": MULTIPLIER * round(mscale, 6)}


def _fixed(spec: ModelSpec) -> dict[str, tuple[object, ...]]:
    attention = spec.layers[0].attention
    assert isinstance(attention, LatentAttention)
    return {
        "attention.head_count_kv": (1, attention.heads),
        "attention.key_length": (attention.cache_values, attention.query_dim),
        "attention.value_length": (attention.latent_rank, attention.value_dim),
        "attention.key_length_mla": (attention.query_dim,), "attention.value_length_mla": (attention.value_dim,),
        "rope.dimension_count": (attention.rope.dimensions,), "rope.scale_linear": (1.0, 0.0),
        "rope.scaling.attn_factor": (1.0, 0.0),
    }  # fmt: skip


def deepseek2(recognise: Callable[[Mapping[str, Any]], bool]) -> GgufFamily:
    """A family in ``deepseek2`` files, which ``recognise`` tells from the others."""
    return GgufFamily(
        architecture=ARCHITECTURE,
        keys=ROUTED_KEYS
        | {
            "num_hidden_layers": "block_count",
            "max_position_embeddings": "context_length",
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_attention_heads": "attention.head_count",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
            "rope_theta": "rope.freq_base",
            "kv_lora_rank": "attention.kv_lora_rank",
            "q_lora_rank": "attention.q_lora_rank",
            "qk_rope_head_dim": "rope.dimension_count",
            "yarn_log_multiplier": "rope.scaling.yarn_log_multiplier",
        },
        required=(
            "num_hidden_layers",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "rms_norm_eps",
            "kv_lora_rank",
            "qk_rope_head_dim",
            *ROUTED_REQUIRED,
        ),
        config=_config,
        further="nextn_predict_layers",
        names=LATENT_GGUF,
        metadata=_metadata,
        fixed=_fixed,
        recognise=recognise,
    )
