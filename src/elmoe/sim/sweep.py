"""Changing constants of described hardware: one at a time, for sweeps and sensitivities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from elmoe.errors import HardwareError
from elmoe.schema.constants import Constant

Described = TypeVar("Described", bound=msgspec.Struct)


@dataclass(frozen=True)
class Ranged:
    """A constant whose sources disagree: ``path`` such as ``main.energy``."""

    path: str
    constant: Constant


def constants(described: msgspec.Struct) -> Iterator[Ranged]:
    """All constants of a description."""
    yield from _walk(described, "")


def ranged(described: msgspec.Struct) -> list[Ranged]:
    """Those with a range."""
    return [item for item in constants(described) if item.constant.low < item.constant.high]


def changed(described: Described, path: str, value: float) -> Described:
    """The description with another value (SI) at ``path``; HardwareError if there is no constant, or no such hardware."""
    try:
        return _changed(described, path.split("."), value, path)
    except ValueError as error:
        raise HardwareError(f"'{path}' cannot be {value:g}: {error}", "give a value within its range") from error


def _changed(node: Any, path: list[str], value: float, whole: str) -> Any:
    child = getattr(node, path[0], None)
    if len(path) == 1:
        if not isinstance(child, Constant):
            raise HardwareError(f"'{whole}' is no constant of this description", "name one such as main.bandwidth")
        return msgspec.structs.replace(node, **{path[0]: child.at(value)})
    if not isinstance(child, msgspec.Struct):
        raise HardwareError(f"'{whole}' is no constant of this description", "name one such as main.bandwidth")
    return msgspec.structs.replace(node, **{path[0]: _changed(child, path[1:], value, whole)})


def _walk(node: msgspec.Struct, prefix: str) -> Iterator[Ranged]:
    for name in node.__struct_fields__:
        value = getattr(node, name)
        if isinstance(value, Constant):
            yield Ranged(prefix + name, value)
        elif isinstance(value, msgspec.Struct):
            yield from _walk(value, f"{prefix}{name}.")
