"""Constants of drafts by something else than the target's resident experts."""

from __future__ import annotations

from importlib.resources import files
from typing import Literal

from elmoe.schema.constants import Ratio, Struct, load_described


class Tree(Struct, frozen=True, kw_only=True):
    """A draft of several candidates per position: ``tokens`` that a verification computes for a sequence, the last committed
    one among them, in ``levels`` below it; every level but the first is drafted from ``width`` tokens of the one above.
    ``committed``: tokens that a verification commits, measured."""

    tokens: Ratio
    levels: Ratio
    width: Ratio
    committed: Ratio

    def __post_init__(self) -> None:
        counts = (self.tokens.value, self.levels.value, self.width.value)
        if any(count != int(count) for count in counts):
            raise ValueError("'tokens', 'levels' and 'width' of a tree are whole numbers")
        if self.tokens.value <= self.levels.value:
            raise ValueError("a tree needs more 'tokens' than 'levels'")
        if not 1 < self.committed.value < 1 + self.levels.value:
            raise ValueError("'committed' lies between 1 and one more than 'levels'")


class Eagle(Struct, frozen=True, kw_only=True):
    """A draft head of ``layers`` decoder layers; ``acceptance`` per token of a chain. ``vocabulary``: rows of a vocabulary
    head of its own, else it shares the target's. ``caches``: whether it reads and stores keys and values of its own, as much
    as the target's last layer. ``trees``: what it may draft beside chains."""

    acceptance: Ratio
    layers: Ratio
    vocabulary: Ratio | None = None
    caches: bool = False
    trees: tuple[Tree, ...] = ()


class SmallLanguageModel(Struct, frozen=True, kw_only=True):
    """A separate dense model of so many ``parameters``, read for each token. ``model``: the preset whose layers it has: then
    it reads and stores keys and values too."""

    acceptance: Ratio
    parameters: Ratio
    model: str | None = None


class QuantizedCopy(Struct, frozen=True, kw_only=True):
    """A separate 4-bit copy of the whole target, over the target's own keys and values."""

    acceptance: Ratio


class Drafters(Struct, frozen=True, kw_only=True):
    """The rivals' drafts."""

    eagle: Eagle
    small_lm: SmallLanguageModel
    quant: QuantizedCopy


RivalDrafts = Literal["none", "eagle", "all"]
"""What rivals may draft with: nothing, an EAGLE head, or that, a small model and a 4-bit copy."""


def drafters_text() -> str:
    """The preset's YAML."""
    return (files("elmoe.presets") / "drafters.yaml").read_text(encoding="utf-8")


def load_drafters() -> Drafters:
    """The preset."""
    return load_described(drafters_text(), "drafters.yaml", Drafters)
