"""Where the constants of a user's own description come from: what was copied from a preset and changed is the user's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

import msgspec

from elmoe.schema.constants import Constant
from elmoe.units import format_quantity

Described = TypeVar("Described", bound=msgspec.Struct)


def constants(described: msgspec.Struct, prefix: str = "") -> Iterator[tuple[str, Constant]]:
    """All constants of a description with their paths, such as ``main.bandwidth``."""
    for name in described.__struct_fields__:
        value = getattr(described, name)
        if isinstance(value, Constant):
            yield prefix + name, value
        elif isinstance(value, msgspec.Struct):
            yield from constants(value, f"{prefix}{name}.")
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                yield from constants(item, f"{prefix}{name}.{index}.")


def mark_changes(described: Described, presets: Iterable[msgspec.Struct], where: str) -> Described:
    """The description with status ``user`` for every constant that has a preset's source and not what it says.

    A constant with a source of its own is left alone: it is the user's claim.
    """
    stated: dict[str, dict[str, list[Constant]]] = {}
    for preset in presets:
        for path, constant in constants(preset):
            stated.setdefault(constant.source, {}).setdefault(path, []).append(constant)
    return _marked(described, "", stated, where)


def _marked(
    node: Described, prefix: str, stated: dict[str, dict[str, list[Constant]]], where: str
) -> Described:  # fmt: skip
    changes: dict[str, object] = {}
    for name in node.__struct_fields__:
        value, path = getattr(node, name), prefix + name
        if isinstance(value, msgspec.Struct):
            changes[name] = _marked(value, path + ".", stated, where)
        elif isinstance(value, Constant) and value.source in stated:
            known = stated[value.source].get(path, [])
            if not any(_facts(value) == _facts(constant) for constant in known):
                source = f"changed by the user in {where}"
                if known:
                    said = ", ".join(dict.fromkeys(format_quantity(item.value, item.dimension) for item in known))
                    source += f"; presets state {said} ({value.source})"
                changes[name] = type(value)(value.value, source, "user", value.low, value.high)
    return msgspec.structs.replace(node, **changes)


def _facts(constant: Constant) -> tuple[object, ...]:
    return constant.value, constant.low, constant.high, constant.status
