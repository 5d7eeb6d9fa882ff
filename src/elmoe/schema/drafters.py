"""Constants of drafts by something else than the target's resident experts."""

from __future__ import annotations

from importlib.resources import files

from elmoe.schema.constants import Ratio, Struct, load_described


class Eagle(Struct, frozen=True, kw_only=True):
    """A draft head of ``layers`` decoder layers that shares the target's vocabulary head; ``acceptance`` per token."""

    acceptance: Ratio
    layers: Ratio


class SmallLanguageModel(Struct, frozen=True, kw_only=True):
    """A separate dense model of so many ``parameters``."""

    acceptance: Ratio
    parameters: Ratio


class QuantizedCopy(Struct, frozen=True, kw_only=True):
    """A separate 4-bit copy of the whole target."""

    acceptance: Ratio


class Drafters(Struct, frozen=True, kw_only=True):
    """The rivals' drafts."""

    eagle: Eagle
    small_lm: SmallLanguageModel
    quant: QuantizedCopy


def load_drafters() -> Drafters:
    """The preset."""
    text = (files("elmoe.presets") / "drafters.yaml").read_text(encoding="utf-8")
    return load_described(text, "drafters.yaml", Drafters)
