"""What models are, as data: specs, their tensors and sizes, and one file per family that reads its checkpoints.

Both the engine and the simulator import this package; it knows nothing of how a model is computed or priced.
"""

from __future__ import annotations

from typing import Any

from elmoe.errors import ModelError
from elmoe.models import (
    deepseek_v2,
    dots1,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granite,
    llama,
    mixtral,
    olmoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from elmoe.models.config import Config
from elmoe.models.family import Family
from elmoe.models.spec import ModelSpec

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        deepseek_v2.FAMILY, deepseek_v2.V3, deepseek_v2.KIMI_K2, dots1.FAMILY, glm4_moe.FAMILY, glm4_moe_lite.FAMILY,
        gpt_oss.FAMILY, granite.FAMILY, granite.SHARED, granite.DENSE, llama.FAMILY, mixtral.FAMILY, olmoe.FAMILY,
        qwen2.FAMILY, qwen2_moe.FAMILY, qwen3.FAMILY, qwen3_moe.FAMILY,
    )
}  # fmt: skip
"""Families by ``model_type``."""


def family_of(config: dict[str, Any], where: str = "config.json") -> Family:
    """The family of a Hugging Face configuration, by ``architectures`` and ``model_type``; one of them may be absent.

    :raises ModelError: it is not known, and the message lists those that are; or the two disagree.
    """
    names, kind = config.get("architectures"), config.get("model_type")
    if names is not None and not isinstance(names, list):
        raise ModelError(
            f"{where}: 'architectures' is {str(names)[:80]!r}, not a list", 'it looks like ["MixtralForCausalLM"]'
        )
    if isinstance(names, list) and names:
        found = [family for family in FAMILIES.values() if names[0] in family.architectures]
        if not found:
            known = ", ".join(dict.fromkeys(name for family in FAMILIES.values() for name in family.architectures))
            raise ModelError(f"{where}: architecture {str(names[0])[:80]!r} is not supported", f"supported: {known}")
        if kind is None:
            return found[0]
        same = [family for family in found if family.name == kind]
        if not same:
            allowed = " or ".join(f"'{family.name}'" for family in found)
            raise ModelError(
                f"{where}: 'model_type' {str(kind)[:80]!r} does not go with architecture '{names[0]}'", f"expected {allowed}"
            )
        return same[0]
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    problem = (
        "there are no 'architectures' and no 'model_type'" if kind is None
        else f"there are no 'architectures', and 'model_type' {str(kind)[:80]!r} is not supported"
    )  # fmt: skip
    raise ModelError(f"{where}: {problem}", f"supported: {', '.join(FAMILIES)}")


def spec_of_config(config: dict[str, Any], where: str = "config.json") -> ModelSpec:
    """The spec of a Hugging Face configuration; ModelError names ``where`` and a value that is not supported."""
    family = family_of(config, where)
    read = Config(config, where)
    try:
        spec = family.read_config(read)
        read.check_elsewhere(family.name)
        return spec
    except ModelError as error:
        message = str(error)
        told = message if message.startswith(where) else f"{where}: {message}"
        raise ModelError(told, error.hint or read.hint(message)) from None
