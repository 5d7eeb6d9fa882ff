"""Measurements and claims of others that the simulator is checked against, as data with sources."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Annotated, Literal

import msgspec

from elmoe.errors import HardwareError
from elmoe.schema.constants import Status
from elmoe.untrusted import load_yaml

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_Count = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
_Text = Annotated[str, msgspec.Meta(min_length=1)]


class FusedRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One kernel run: ``tokens`` in the batch, distinct ``experts`` they use, time in ``microseconds``."""

    tokens: _Count
    experts: _Count
    microseconds: _Positive


class FusedKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="fused_moe"):
    """Times of a fused MoE layer of preset ``model`` on preset ``hardware``, weights of ``bits_per_weight``; ``fixed`` and
    ``per_expert`` (microseconds) are the line through the rows of at most 64 tokens."""

    description: _Text
    source: _Text
    status: Status
    model: _Text
    hardware: _Text
    bits_per_weight: _Positive
    fixed: _Positive
    per_expert: _Positive
    rows: tuple[FusedRow, ...]


class DecodingRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Decoding speed of one sequence: the model that was ``measured``, the preset ``model`` of the same shapes, the
    ``format`` of its weights; ``fitted``: the hardware preset was fitted to this row, so it checks nothing."""

    measured: _Text
    model: _Text
    format: Literal["Q8_0", "MXFP4", "BF16"]
    tokens_per_second: _Positive
    fitted: bool


class Decoding(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="decoding"):
    """Decoding speeds at batch 1 on preset ``hardware``."""

    description: _Text
    source: _Text
    status: Status
    hardware: _Text
    rows: tuple[DecodingRow, ...]


class StreamingRow(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Share of the peak, 0 to 1, that streaming reads of a kind of memory reach."""

    memory: _Text
    efficiency: _Share


class Streaming(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="streaming"):
    """Streaming efficiencies of memories."""

    description: _Text
    source: _Text
    status: Status
    rows: tuple[StreamingRow, ...]


class Claim(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One number of the paper; status ``A``: its abstract, ``N``: second-hand notes. Ratios are plain numbers."""

    name: _Text
    value: _Positive
    status: Literal["A", "N"]
    statement: _Text


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="claims"):
    """What a paper claims, to be tested."""

    description: _Text
    source: _Text
    status: Status
    rows: tuple[Claim, ...]

    def value(self, name: str) -> float:
        """A claim's number by name; HardwareError if the paper claims no such thing."""
        for row in self.rows:
            if row.name == name:
                return row.value
        raise HardwareError(f"there is no claim '{name}'", ", ".join(row.name for row in self.rows))


class Gain(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One ratio that a rival's source gives; ``fitted``: a preset's constant was derived from it, so it checks nothing.
    ``reason``: why the simulator differs from it."""

    name: _Text
    value: _Positive
    fitted: bool
    statement: _Text
    source: _Text
    reason: str = ""


class Gains(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="gains"):
    """What the rivals' sources claim of them."""

    description: _Text
    source: _Text
    status: Status
    rows: tuple[Gain, ...]


Validation = FusedKernel | Decoding | Streaming | Claims | Gains


def load_validation(name: str) -> Validation:
    """Data of one of :func:`validation_names`, such as ``fused_moe``; HardwareError names what is wrong."""
    if name not in validation_names():
        raise HardwareError(f"there is no validation data '{name}'", f"one of {', '.join(validation_names())}")
    text = (files("elmoe.presets") / "validation" / f"{name}.yaml").read_text(encoding="utf-8")
    return validation_of_text(text, f"{name}.yaml")


def validation_of_text(text: str, where: str) -> Validation:
    """From YAML; HardwareError names ``where`` and the path in it."""
    hint = f"compare with one of {', '.join(validation_names())}"
    data: Validation = load_yaml(text, where, HardwareError, hint).convert(Validation, HardwareError, hint)  # type: ignore[arg-type]
    return data


@cache
def validation_names() -> tuple[str, ...]:
    """Validation data, alphabetically."""
    folder = files("elmoe.presets") / "validation"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))
