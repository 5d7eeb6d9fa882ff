"""What models are, as data: specs, their tensors and sizes, and one file per family that reads its checkpoints.

Both the engine and the simulator import this package; it knows nothing of how a model is computed or priced.
"""

from __future__ import annotations

from typing import Any

from elmoe.errors import ModelError
from elmoe.models import qwen3_moe
from elmoe.models.config import Config
from elmoe.models.family import Family
from elmoe.models.spec import ModelSpec

FAMILIES: dict[str, Family] = {family.name: family for family in (qwen3_moe.FAMILY,)}
"""Families by ``model_type``."""


def family_of(config: dict[str, Any], where: str = "config.json") -> Family:
    """The family of a Hugging Face configuration, by its ``architectures``, or its ``model_type`` where it has none.

    :raises ModelError: it is not known; the message lists those that are.
    """
    names = config.get("architectures")
    if isinstance(names, list) and names:
        for family in FAMILIES.values():
            if names[0] in family.architectures:
                return family
        known = ", ".join(name for family in FAMILIES.values() for name in family.architectures)
        raise ModelError(f"{where}: architecture {str(names[0])[:80]!r} is not supported", f"supported: {known}")
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    raise ModelError(
        f"{where}: there are no 'architectures', and 'model_type' {str(kind)[:80]!r} is not supported",
        f"supported: {', '.join(FAMILIES)}",
    )


def spec_of_config(config: dict[str, Any], where: str = "config.json") -> ModelSpec:
    """The spec of a Hugging Face configuration; ModelError names ``where`` and a value that is not supported."""
    family = family_of(config, where)
    try:
        return family.read_config(Config(config, where))
    except ModelError as error:
        message = str(error)
        raise ModelError(message if message.startswith(where) else f"{where}: {message}", error.hint) from None
