"""Hardware and system descriptions: YAML with a unit, a source and a status on every constant.

A constant is written ``{value: 102.4 GB/s, source: "...", status: published}``; ``range: [low, high]`` names the least and
greatest value that sources give, for sweeps. Values are held in SI units (bytes, bytes/s, s, Hz, op/s, J/bit, J/B, J, W).
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar

import msgspec
import yaml

from elmoe.errors import ElmoeError, HardwareError
from elmoe.units import parse_quantity

Described = TypeVar("Described", bound=msgspec.Struct)
Status = Literal["published", "derived", "measured", "assumed"]


def _short(data: Any) -> str:
    """Scalars as they are; of anything else only the kind, as aliases make YAML lists of any printed size."""
    return f"'{data}'" if isinstance(data, str | int | float) else f"a {type(data).__name__}"


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
        return isinstance(other, Constant) and repr(self) == repr(other) and self.source == other.source

    def __hash__(self) -> int:
        return hash((self.value, self.source))

    def at(self, value: float) -> Self:
        """The same constant at another value, for sweeps."""
        return type(self)(value, self.source, self.status, self.low, self.high)

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
        if data["status"] not in ("published", "derived", "measured", "assumed"):
            raise ValueError(f"status is {_short(data['status'])}, allowed: published, derived, measured, assumed")
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
        return cls(value, data["source"], data["status"], low, high)


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


class Power(Constant):
    """Watts."""

    dimension = "power"


class Ratio(Constant):
    """A number without unit, or per cent."""

    dimension = "ratio"


class OperationsPerByte(Constant):
    """Operations per byte."""

    dimension = "operations per byte"


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of described things: frozen, and loud about unknown keys."""


class Refresh(Struct, frozen=True, kw_only=True):
    """All-bank refresh: each ``interval`` (tREFI) a rank is busy for ``duration`` (tRFCab) and must close its rows before
    and open them again after it (``reopen``: tRTP + tRP + tRCD)."""

    interval: Seconds
    duration: Seconds
    reopen: Seconds

    def __post_init__(self) -> None:
        if self.duration.value + self.reopen.value >= self.interval.value:
            raise ValueError("refresh never ends: 'duration' + 'reopen' must be less than 'interval'")


class Memory(Struct, frozen=True, kw_only=True):
    """A memory: ``bandwidth`` is its peak. ``refresh`` gives the share that streaming reads reach, or ``efficiency`` states
    it; a measured box states one efficiency for all its models. With neither, streaming reads reach the peak."""

    kind: str
    capacity: Capacity
    bandwidth: Bandwidth
    energy: EnergyPerBit
    refresh: Refresh | None = None
    efficiency: Ratio | None = None

    def __post_init__(self) -> None:
        if self.refresh is not None and self.efficiency is not None:
            raise ValueError("give 'refresh' or 'efficiency', not both")
        if self.efficiency is not None and self.efficiency.value > 1:
            raise ValueError("'efficiency' is above 100 %")


class PeArray(Struct, frozen=True, kw_only=True, tag="pe_array", tag_field="kind"):
    """Bit-slice multipliers: ``elements`` PEs of ``tokens x outputs x inputs`` multiply-accumulates per clock and pass; a
    pass takes 4 bits of the weight. ``mac_energy``: one whole INT8 multiply-accumulate, two passes."""

    elements: Ratio
    tokens: Ratio
    outputs: Ratio
    inputs: Ratio
    clock: Frequency
    mac_energy: EnergyPerOperation


class Processor(Struct, frozen=True, kw_only=True, tag="processor", tag_field="kind"):
    """A processor known by its peak alone: ``throughput`` on 8-bit operands."""

    throughput: Throughput
    mac_energy: EnergyPerOperation


class NearMemory(Struct, frozen=True, kw_only=True):
    """Compute inside or under the main memory (``placement: main``) or under the fast memory (``placement: fast``): its
    ``bandwidth`` and the operations it can do per byte it reads; ``energy`` of a bit that does not leave the memory."""

    placement: Literal["main", "fast"]
    bandwidth: Bandwidth
    intensity: OperationsPerByte
    energy: EnergyPerBit


class Sram(Struct, frozen=True, kw_only=True):
    """Buffers beside the multipliers: energy of a byte of weights or activations that passes through."""

    energy: EnergyPerByte


class Links(Struct, frozen=True, kw_only=True):
    """``aggregation``: partial sums between processing elements. ``stream``: the main memory's broadcast to them."""

    aggregation: Bandwidth
    stream: Bandwidth
    energy: EnergyPerBit


class VectorUnit(Struct, frozen=True, kw_only=True):
    """Norms, softmax, activation functions, routing: elementwise operations."""

    throughput: Throughput
    energy: EnergyPerOperation


class Features(Struct, frozen=True, kw_only=True):
    """What of ELMoE-3D is switched on; all off is the bare processor over its main memory.

    ``fast_dense``: dense parts live in the fast memory. ``expert_cache``: expert slices are kept there (``bit_slices``: MSB
    slices first, else whole experts). ``parallel_tiers``: both memories are read at once. ``refill``: the set of resident
    experts follows the routing, else it stays what the prompts made it. ``lsb_augmentation``: drafts round to the middle.
    """

    fast_dense: bool = False
    expert_cache: bool = False
    bit_slices: bool = False
    parallel_tiers: bool = False
    refill: bool = False
    lsb_augmentation: bool = False


class Hardware(Struct, frozen=True, kw_only=True):
    """A machine and how it is used. ``layer_overhead``: fixed seconds per layer and pass (kernel launches, synchronisation);
    ``decision_overhead``: those of deciding about residents, per layer with experts and target pass.
    ``static_share``: static power as a share of the main processor's whole power, swept."""

    name: str
    description: str
    main: Memory
    fast: Memory | None = None
    compute: PeArray | Processor
    near: NearMemory | None = None
    sram: Sram
    links: Links | None = None
    vector: VectorUnit
    static_share: Ratio
    layer_overhead: Seconds | None = None
    decision_overhead: Seconds | None = None
    features: Features = Features()

    def __post_init__(self) -> None:
        if self.static_share.value >= 1:
            raise ValueError("'static_share' must be below 100 %")
        if self.fast is None and any(msgspec.structs.astuple(self.features)):
            raise ValueError("features need a 'fast' memory")
        if self.near is not None and self.near.placement == "fast" and self.fast is None:
            raise ValueError("near-memory compute under the fast memory needs a 'fast' memory")


def _decode(kind: type, data: Any) -> Any:
    if issubclass(kind, Constant):
        try:
            return kind.parse(data)
        except ElmoeError as error:
            raise ValueError(f"{error}; {error.hint}") from None
    raise NotImplementedError(kind)


def load_hardware(name_or_path: str | Path) -> Hardware:
    """A preset by name, or a YAML file; HardwareError names the file, the path in it and the mend."""
    return load_described(*_read(name_or_path), Hardware)


def load_described(text: str, where: str, kind: type[Described]) -> Described:
    """YAML text of described constants as a typed structure; ``where`` is what errors name."""
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise HardwareError(f"'{where}' is not YAML: {error}", "a hardware description is a YAML mapping") from error
    try:
        return msgspec.convert(data, kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise HardwareError(
            f"'{where}': {error}", "compare with a preset: `elmoe simulate --show-preset elmoe3d_8gb`"
        ) from error


@cache
def preset_names() -> tuple[str, ...]:
    """Hardware presets, alphabetically."""
    folder = files("elmoe.presets") / "hardware"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


def preset_text(name: str) -> str:
    """A preset's YAML, to copy and change."""
    return (files("elmoe.presets") / "hardware" / f"{name}.yaml").read_text(encoding="utf-8")


def _read(name_or_path: str | Path) -> tuple[str, str]:
    if str(name_or_path) in preset_names():
        return preset_text(str(name_or_path)), f"{name_or_path}.yaml"
    path = Path(name_or_path)
    if not path.is_file():
        raise HardwareError(f"there is no hardware '{name_or_path}'", f"a YAML file, or one of {', '.join(preset_names())}")
    if path.stat().st_size > 1 << 20:
        raise HardwareError(f"'{path}' is larger than 1 MiB", "a hardware description is a few KB of YAML")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise HardwareError(f"'{path}' is not text: {error}", "a hardware description is YAML") from None
