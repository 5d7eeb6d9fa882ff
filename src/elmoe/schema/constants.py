"""Physical constants with a unit, a source and a status, and YAML descriptions that are made of them: loading, writing.

A constant is written ``{value: 102.4 GB/s, source: "...", status: published}``; ``range: [low, high]`` names the least and
greatest value that sources give, for sweeps. Values are held in SI units (bytes, bytes/s, s, Hz, op/s, J/bit, J/B, J).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self, TypeVar, cast, get_args

import msgspec

from elmoe.errors import ElmoeError, HardwareError
from elmoe.extras import naming_extra
from elmoe.units import format_quantity, parse_quantity
from elmoe.untrusted import load_yaml, short

with naming_extra("elmoe.schema"):
    import yaml

Described = TypeVar("Described", bound=msgspec.Struct)
Status = Literal["published", "derived", "measured", "assumed", "user"]
"""``user``: a preset's constant that the user changed, so the preset's source says nothing of it."""


def _short(data: Any) -> str:
    """Scalars as they are; of anything else only the kind, as aliases make YAML lists of any printed size."""
    return f"'{short(data, 60)}'" if isinstance(data, str | int | float) else f"a {type(data).__name__}"


class Constant:
    """A physical constant: ``value`` in SI, ``low`` and ``high`` of what sources say, ``source``, ``status``.

    Subclasses name the dimension that its unit must have.
    """

    dimension: ClassVar[str]
    __slots__ = ("high", "low", "source", "status", "value")

    def __init__(
        self, value: float, source: str, status: Status, low: float | None = None, high: float | None = None
    ) -> None:
        self.value, self.source, self.status = value, source, status
        self.low = value if low is None else low
        self.high = value if high is None else high

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.value:g}, {self.status})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(getattr(self, name) == getattr(other, name) for name in Constant.__slots__)

    def __hash__(self) -> int:
        return hash((self.value, self.source))

    def at(self, value: float) -> Self:
        """The same constant at another value, for sweeps."""
        return type(self)(value, self.source, self.status, self.low, self.high)

    def written(self) -> dict[str, Any]:
        """The YAML mapping that :meth:`parse` reads as an equal constant."""
        data: dict[str, Any] = {"value": format_quantity(self.value, self.dimension)}
        if (self.low, self.high) != (self.value, self.value):
            data["range"] = [format_quantity(bound, self.dimension) for bound in (self.low, self.high)]
        return data | {"status": self.status, "source": self.source}

    @classmethod
    def parse(cls, data: Any) -> Self:
        """From the YAML mapping; ValueError says what is wrong with it."""
        if not isinstance(data, dict):
            raise ValueError(f"{_short(data)} needs a source: write {{value: ..., source: ..., status: ...}}")
        unknown = data.keys() - {"value", "source", "status", "range"}
        missing = {"value", "source", "status"} - data.keys()
        if unknown or missing:
            raise ValueError(
                f"unknown key {min(map(_short, unknown))}" if unknown else f"the constant has no '{min(missing)}'",
            )
        status: Any = data["status"]
        if not isinstance(status, str) or status not in get_args(Status):
            raise ValueError(f"status is {_short(status)}, allowed: {', '.join(get_args(Status))}")
        if not isinstance(data["source"], str) or not data["source"].strip():
            raise ValueError("the source is empty: name where the value comes from, or say that nobody states it")
        span = data.get("range")
        if span is not None and not (isinstance(span, list) and len(span) == 2):
            raise ValueError("range must be [least, greatest]")

        def number(text: Any) -> float:
            if isinstance(text, bool) or not isinstance(text, str | int | float):
                raise ValueError(f"{_short(text)} is not a number with a unit of {cls.dimension}")
            return parse_quantity(str(text), cls.dimension)

        value = number(data["value"])
        low, high = (value, value) if span is None else (number(span[0]), number(span[1]))
        if not low <= value <= high:
            raise ValueError(f"value {data['value']} lies outside its range {span}")
        return cls(value, data["source"], cast(Status, status), low, high)


class Capacity(Constant):
    """Bytes."""

    dimension = "capacity"


class Bandwidth(Constant):
    """Bytes per second."""

    dimension = "bandwidth"


class Seconds(Constant):
    """Seconds."""

    dimension = "time"


class Frequency(Constant):
    """Hertz."""

    dimension = "frequency"


class Throughput(Constant):
    """Operations per second; a multiply-accumulate is two."""

    dimension = "throughput"


class EnergyPerBit(Constant):
    """Joules per bit."""

    dimension = "energy per bit"


class EnergyPerByte(Constant):
    """Joules per byte."""

    dimension = "energy per byte"


class EnergyPerOperation(Constant):
    """Joules per operation."""

    dimension = "energy per operation"


class Ratio(Constant):
    """A number without unit, or per cent."""

    dimension = "ratio"


class OperationsPerByte(Constant):
    """Operations per byte."""

    dimension = "operations per byte"


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of described things: frozen, and loud about unknown keys."""


def _decode(kind: type, data: Any) -> Any:
    if issubclass(kind, Constant):
        try:
            return kind.parse(data)
        except ElmoeError as error:
            raise ValueError(f"{error}; {error.hint}") from None
    raise NotImplementedError(kind)


def load_described(text: str, where: str, kind: type[Described]) -> Described:
    """YAML text of described constants as a typed structure; errors name ``where``, the line and the path."""
    described = load_yaml(text, where, HardwareError, "a hardware description is a YAML mapping")
    return described.convert(
        kind, HardwareError, "compare with a preset: `elmoe simulate --show-preset elmoe3d_8gb`", _decode
    )


class _OnOneLine(dict[str, Any]):
    """A mapping that YAML writes in braces."""


class _Dumper(yaml.SafeDumper):
    """Writes ``_OnOneLine``, and no aliases: the same source may stand at many constants."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text, in quotes where a reader of YAML may take it for a number: ``1e100`` is one to some and not to others."""
    try:
        float(text)
    except ValueError:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _text)
_Dumper.add_representer(_OnOneLine, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, True))


def described_text(described: msgspec.Struct) -> str:
    """YAML that :func:`load_described` reads as an equal structure.

    :raises RequestError: a constant is not positive and finite.
    """

    def shown(data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known = {key: shown(value) for key, value in data.items() if value is not None}
        return known if any(isinstance(value, dict) for value in known.values()) else _OnOneLine(known)

    data = msgspec.to_builtins(described, enc_hook=lambda constant: constant.written())
    return yaml.dump(shown(data), Dumper=_Dumper, sort_keys=False, width=120)
