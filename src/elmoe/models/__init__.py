"""One file per family says what its checkpoints look like. Knows nothing of sequences, budgets or files."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from elmoe.errors import ConvertError
from elmoe.models import qwen3_moe

FAMILIES = {name: module for module in (qwen3_moe,) for name in module.ARCHITECTURES}


def family_of(config: dict[str, Any]) -> ModuleType:
    """The family module of a Hugging Face config; ConvertError lists the known architectures."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in FAMILIES:
        raise ConvertError(f"config.json: architecture {name!r} is not supported", f"supported: {', '.join(FAMILIES)}")
    return FAMILIES[name]
