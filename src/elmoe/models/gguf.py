"""GGUF metadata and the families: whose file it is, the spec it describes, and the metadata that describe a spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from elmoe.errors import ModelError
from elmoe.models.config import Config
from elmoe.models.family import Family, GgufFamily
from elmoe.models.gguf_rope import FACTORS, KEYS, scaling_config
from elmoe.models.spec import MOST, ModelSpec
from elmoe.models.tensors import Part
from elmoe.untrusted import short

DAMAGED = "the file is damaged, or of a model that is not supported"
IGNORED = ("rope.scaling.finetuned", "attention.sliding_window", "attention.causal")
"""Metadata keys that change nothing in the architectures here, as in llama.cpp: windows that only others use."""
ELSEWHERE = (
    "final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "embedding_scale", "residual_scale",
    "expert_group_count",
)  # fmt: skip
"""Metadata keys that change what some architectures compute; 0 and 1 change nothing."""


def gguf_family(metadata: Mapping[str, Any], families: Iterable[Family]) -> tuple[Family, GgufFamily]:
    """The family of a file's metadata; ModelError lists the architectures that can be read."""
    known = [(family, family.gguf) for family in families if family.gguf is not None]
    name = metadata.get("general.architecture")
    for family, gguf in known:
        if gguf.architecture == name and gguf.recognise(metadata):
            return family, gguf
    supported = ", ".join(sorted({gguf.architecture for _, gguf in known}))
    experts = " with experts" if any(gguf.architecture == name for _, gguf in known) else ""
    raise ModelError(
        f"architecture {short(name, 40)!r}{experts} is not supported",
        f"supported: {supported}",
    )


def spec_of_metadata(
    metadata: Mapping[str, Any], family: Family, vocabulary: int, eos: list[int], has: Callable[[str], bool],
    values: Callable[[str], Sequence[float]],
) -> ModelSpec:  # fmt: skip
    """The spec of a GGUF file of the family.

    :param vocabulary: rows of the embedding. :param eos: ids that end a generation.
    :param has: whether a tensor is in the file: a head, a layer's router. :param values: those of a small tensor.
    :raises ModelError: a value is not supported or missing; the message names its metadata key.
    """
    gguf = family.gguf
    assert gguf is not None
    config: dict[str, Any] = {"vocab_size": vocabulary, "eos_token_id": eos, **gguf.config(metadata)}
    written = set[str]()
    for ours, theirs in gguf.keys.items():
        value = metadata.get(f"{gguf.architecture}.{theirs}")
        if value is not None:
            config[ours] = value
            written.add(ours)
        elif ours in gguf.required:
            raise ModelError(f"metadata '{gguf.architecture}.{theirs}' is missing", "the file is incomplete")
    if "n_group" in written and config["n_group"] in (0, 1):  # llama.cpp does not look at those kept then
        config |= {"n_group": 1, "topk_group": 1}
    elif "n_group" in written and "topk_group" not in written:
        raise ModelError(f"metadata '{gguf.architecture}.{gguf.keys['topk_group']}' is missing", "the file is incomplete")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])  # as llama.cpp takes it
    layers = config["num_hidden_layers"]
    if isinstance(layers, bool) or not isinstance(layers, int) or not 0 < layers <= MOST["layers"]:
        raise ModelError(f"metadata '{gguf.architecture}.block_count' is {layers!r}", f"supported: 1 to {MOST['layers']}")
    further = further_layers(metadata, gguf)
    config["num_hidden_layers"] = layers = layers - len(further)
    if "router" in gguf.names:
        router = gguf.names["router"]
        config["mlp_only_layers"] = [layer for layer in range(layers) if not has(router.format(layer=layer))]
        if len(config["mlp_only_layers"]) == layers:
            raise ModelError(f"tensor '{router.format(layer=0)}' is missing", "the file has no layer with experts")
    config["tie_word_embeddings"] = not has(gguf.names["head"])
    config |= {key: has(gguf.names[role].format(layer=0)) for key, role in gguf.flags.items()}
    plain = Config(config, "metadata", DAMAGED)
    try:
        rotary, theta = _rotary_dim(plain), plain.number("rope_theta", 10000.0)
        if "head_dim" in gguf.keys:
            config.setdefault("head_dim", rotary)  # as llama.cpp takes it; a family may have another default elsewhere
        scaling = scaling_config(
            metadata, gguf.architecture, lambda: values(FACTORS) if has(FACTORS) else None, rotary, theta
        ) or {"rope_type": "default"}  # fmt: skip
        config["rope_scaling"] = (config.get("rope_scaling", {}) if scaling["rope_type"] == "yarn" else {}) | scaling
        spec = family.read_config(Config(config, "metadata", DAMAGED))
    except ModelError as error:
        message, hint = str(error), error.hint or plain.hint(str(error), written)
        for ours, theirs in gguf.keys.items():
            told = f"'{gguf.architecture}.{theirs}'"
            message, hint = message.replace(f"'{ours}'", told), hint.replace(f"'{ours}'", told)
        raise ModelError(message, hint) from error
    known = {*gguf.keys.values(), *gguf.fixed(spec), *IGNORED, *KEYS}
    for key in metadata:
        _, _, rest = key.partition(f"{gguf.architecture}.")
        if rest.startswith(("rope.", "attention.")) and rest not in known:
            raise ModelError(f"metadata '{key}' is not supported", "it changes what attention computes")
        if rest in ELSEWHERE and rest not in known and metadata[key] not in (0, 1):
            raise ModelError(f"metadata '{key}' is {metadata[key]!r}", f"the family {family.name} does not have it")
    for key, allowed in gguf.fixed(spec).items():
        value = metadata.get(f"{gguf.architecture}.{key}", allowed[0])
        if value not in allowed:
            raise ModelError(f"metadata '{gguf.architecture}.{key}' is {value!r}", f"supported: {allowed[0]!r}")
    return spec


def _rotary_dim(config: Config) -> int:
    """Dimensions that a scaling of the rotary embedding is about."""
    if config.has("qk_rope_head_dim"):
        return config.integer("qk_rope_head_dim")
    return config.heads(config.integer("hidden_size"))[2]


def further_layers(metadata: Mapping[str, Any], gguf: GgufFamily) -> tuple[str, ...]:
    """What names of tensors begin with that predict further tokens: the last layers of a file.

    :raises ModelError: their number is no number of layers.
    """
    count, layers = metadata.get(f"{gguf.architecture}.{gguf.further}", 0), metadata[f"{gguf.architecture}.block_count"]
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count < layers:
        raise ModelError(f"metadata '{gguf.architecture}.{gguf.further}' is {count!r}", f"supported: 0 to {layers - 1}")
    return tuple(f"blk.{layer}." for layer in range(layers - count, layers))


def metadata_of_spec(spec: ModelSpec, gguf: GgufFamily) -> dict[str, int | float | str]:
    """Metadata of a spec; ModelError if GGUF's architecture cannot say what the model computes."""
    return {f"{gguf.architecture}.{key}": value for key, value in gguf.metadata(spec).items()}


def gguf_shape(part: Part) -> tuple[int, ...]:
    """The shape of a tensor in a GGUF file: a gate of one row is a vector there, and rows of heads have an axis of heads."""
    if part.heads:
        return part.heads, part.shape[0] // part.heads, part.shape[1]
    return part.shape[1:] if part.role == "shared_expert_gate" else part.shape
