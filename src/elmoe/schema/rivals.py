"""The rivals' second description: named steps that change presets into what the rivals' own sources publish.

A set is data: each step says which keys of which preset it replaces. Applying all of them gives the systems whose names end
in that of the set, such as ``xpu_pim_published``; a single step, or the first few, show what each is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

from elmoe.errors import HardwareError
from elmoe.extras import naming_extra
from elmoe.schema.constants import load_described
from elmoe.schema.drafters import Drafters, drafters_text
from elmoe.schema.hardware import Hardware, described_system, preset_text
from elmoe.untrusted import load_yaml, short

with naming_extra("elmoe.schema"):
    import yaml

_HINT = "a set of rivals is a list of steps, each with a name, a source and what it changes"


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One change: ``systems`` maps a hardware preset to the keys that are replaced in it, ``drafters`` does so for the
    drafters' preset. A constant is replaced as a whole."""

    name: str
    source: str
    systems: dict[str, dict[str, Any]] = {}
    drafters: dict[str, Any] = {}


class RivalSet(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A named description of all rivals, as steps from the presets. ``after``: a set whose steps come first."""

    name: str
    description: str
    steps: tuple[Step, ...]
    after: str | None = None


@cache
def rival_sets() -> tuple[str, ...]:
    """Names of the sets beside the presets themselves."""
    folder = files("elmoe.presets") / "rivals"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


@cache
def steps_of(name: str) -> tuple[Step, ...]:
    """All steps of a set, ``published`` or ``duplex``, in order; HardwareError if there is no such set."""
    if name not in rival_sets():
        raise HardwareError(f"there is no set of rivals '{short(name)}'", f"one of {', '.join(rival_sets())}")
    text = (files("elmoe.presets") / "rivals" / f"{name}.yaml").read_text(encoding="utf-8")
    found = rivals_of_text(text, f"rivals/{name}.yaml")
    return (*(() if found.after is None else steps_of(found.after)), *found.steps)


def rivals_of_text(text: str, where: str) -> RivalSet:
    """From YAML; HardwareError names ``where`` and the key."""
    found: RivalSet = load_yaml(text, where, HardwareError, _HINT).convert(RivalSet, HardwareError, _HINT)
    return found


def system_after(name: str, steps: Sequence[Step], rivals: str = "published") -> Hardware:
    """A preset with the changes of some steps; its name ends in that of the set ``rivals`` if one of them changed it.

    :raises HardwareError: a step names a key that a description does not have, or a value that is not allowed.
    """
    changes = [step.systems[name] for step in steps if name in step.systems]
    if not changes:
        return described_system(preset_text(name), f"{name}.yaml")
    data = yaml.safe_load(preset_text(name))
    for change in changes:
        data = _merged(data, change)
    words = "; ".join(step.name for step in steps if name in step.systems)
    data["name"] = f"{name}_{rivals}"
    data["description"] = f"{data['description'].strip()} As its sources publish it: {words}."
    return described_system(yaml.safe_dump(data), f"rivals/{rivals}.yaml, {name}")


def drafters_after(steps: Sequence[Step]) -> Drafters:
    """The drafters' preset with the changes of some steps.

    :raises HardwareError: a step names a key that drafters do not have, or a value that is not allowed.
    """
    data = yaml.safe_load(drafters_text())
    for step in steps:
        data = _merged(data, step.drafters)
    return load_described(yaml.safe_dump(data), "rivals, drafters", Drafters)


@cache
def variant_names() -> tuple[str, ...]:
    """Names of the systems that the sets change, each with the name of its set at the end."""
    return tuple(dict.fromkeys(
        f"{name}_{rivals}" for rivals in rival_sets() for step in steps_of(rivals) for name in step.systems
    ))  # fmt: skip


@cache
def variant(name: str) -> Hardware:
    """A system of a set by its name, such as ``xpu_pim_published``."""
    base, _, rivals = name.rpartition("_")
    return system_after(base, steps_of(rivals), rivals)


def _merged(data: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Mappings key by key; constants, lists and scalars as a whole."""
    result = dict(data)
    for key, value in change.items():
        old = result.get(key)
        parts = isinstance(value, dict) and isinstance(old, dict) and "value" not in value
        result[key] = _merged(old, value) if parts and isinstance(old, dict) else value
    return result
