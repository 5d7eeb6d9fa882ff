"""Feed-forwards whose gates and ups are one tensor of the checkpoint, gates above ups; of experts, all of a layer in one."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from elmoe.models.family import Names
from elmoe.models.tensors import FeedForward


class Stacked(NamedTuple):
    """Names of the two tensors."""

    gate_up: str
    down: str


def stacked_names(names: Names, part: FeedForward, checkpoint: Collection[str] = ()) -> Stacked | None:
    """The tensors of a feed-forward. They are those that the family names (``expert_gate_up`` and ``expert_down``, or
    ``shared_gate_up`` and ``shared_down``), else those that transformers 5 writes for experts, if the ``checkpoint`` has
    them. None where each projection has its own.
    """
    role = f"{part.kind}_gate_up"
    if role in names:
        return Stacked(*(names[one].format(layer=part.layer) for one in (role, f"{part.kind}_down")))
    if part.kind != "expert":
        return None
    before, _, _ = names["expert_gate"].format(layer=part.layer, expert="{expert}").partition("{expert}")
    found = Stacked(before + "gate_up_proj", before + "down_proj")
    return found if found.gate_up in checkpoint else None


def stacked_shapes(part: FeedForward) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the two: (experts, 2 * width, hidden) and (experts, hidden, width); without experts if shared."""
    many = (part.count,) if part.kind == "expert" else ()
    return (*many, 2 * part.width, part.hidden), (*many, part.hidden, part.width)
