"""Hardware and system descriptions: YAML with a unit, a source and a status on every constant (see ``constants.py``)."""

from __future__ import annotations

import os
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from elmoe.errors import HardwareError
from elmoe.files import write_whole
from elmoe.schema.constants import (
    Bandwidth,
    Capacity,
    EnergyPerBit,
    EnergyPerByte,
    EnergyPerOperation,
    Frequency,
    OperationsPerByte,
    Ratio,
    Seconds,
    Struct,
    Throughput,
    described_text,
    load_described,
)  # fmt: skip
from elmoe.schema.provenance import mark_changes
from elmoe.untrusted import MAX_YAML_BYTES, nearest, read_text, short

LONGEST_NAME = 64
"""Characters of a machine's name, which is a column of tables."""


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
    ``bandwidth`` and the operations it can do per byte it reads; ``energy`` of a bit that does not leave the memory.

    ``dense``: whether layers that every token uses run where they are faster or always on the processor; keys and values,
    and experts, always take the faster place. ``experts``: each expert takes the faster place, or both work on them at
    once (``both``, under the main memory alone). ``narrow``: whether weights of 4 bits multiply at the rate of 8 bits
    (``same``) or at twice that rate (``twice``). ``efficiency``: share of ``bandwidth``, and of the rate of the units, that
    real products reach. ``interface``: rate at which inputs reach the units and results leave them; they cost no time
    without it. ``mac_energy``: of an INT8 multiply-accumulate in the memory, that of the processor without it.
    """

    placement: Literal["main", "fast"]
    bandwidth: Bandwidth
    intensity: OperationsPerByte
    energy: EnergyPerBit
    dense: Literal["faster", "processor"] = "faster"
    experts: Literal["faster", "both"] = "faster"
    narrow: Literal["same", "twice"] = "same"
    efficiency: Ratio | None = None
    interface: Bandwidth | None = None
    mac_energy: EnergyPerOperation | None = None

    def __post_init__(self) -> None:
        if self.efficiency is not None and self.efficiency.value > 1:
            raise ValueError("'efficiency' of near-memory compute is above 100 %")
        if self.experts == "both" and self.placement != "main":
            raise ValueError("'experts: both' needs 'placement: main'")


class Sram(Struct, frozen=True, kw_only=True):
    """Buffers beside the multipliers: energy of a byte of weights or activations that passes through."""

    energy: EnergyPerByte


class Links(Struct, frozen=True, kw_only=True):
    """``aggregation``: partial sums between processing elements."""

    aggregation: Bandwidth
    energy: EnergyPerBit


class VectorUnit(Struct, frozen=True, kw_only=True):
    """Norms, softmax, activation functions, routing: elementwise operations."""

    throughput: Throughput
    energy: EnergyPerOperation


class Features(Struct, frozen=True, kw_only=True):
    """What of ELMoE-3D is switched on; all off is the bare processor over its main memory.

    ``fast_dense``: dense parts live in the fast memory. ``expert_cache``: expert slices are kept there (``bit_slices``: MSB
    slices first, else whole experts). ``parallel_tiers``: both memories are read at once. ``refill``: the set of resident
    experts follows the routing, else it stays what the prompts made it.
    """

    fast_dense: bool = False
    expert_cache: bool = False
    bit_slices: bool = False
    parallel_tiers: bool = False
    refill: bool = False


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
        if not (self.name.strip() and self.name.isprintable() and len(self.name) <= LONGEST_NAME):
            raise ValueError(f"'name' must have 1 to {LONGEST_NAME} printable characters")
        if self.static_share.value >= 1:
            raise ValueError("'static_share' must be below 100 %")
        if self.fast is None and any(msgspec.structs.astuple(self.features)):
            raise ValueError("features need a 'fast' memory")
        if self.near is not None and self.near.placement == "fast" and self.fast is None:
            raise ValueError("near-memory compute under the fast memory needs a 'fast' memory")


def load_hardware(name_or_path: str | Path) -> Hardware:
    """A preset by name, a rival of a set (``xpu_pim_published``), or a YAML file.

    :raises HardwareError: it names the file, the path in it and the mend.
    """
    from elmoe.schema.rivals import variant, variant_names

    if str(name_or_path) in variant_names():
        return variant(str(name_or_path))
    hardware = described_system(*_read(name_or_path))
    return hardware if str(name_or_path) in preset_names() else mark_changes(hardware, _presets(), Path(name_or_path).name)


def described_system(text: str, where: str) -> Hardware:
    """A description from its YAML; HardwareError names ``where`` and the path in it."""
    return load_described(text, where, Hardware)


def write_hardware(hardware: Hardware, path: str | Path) -> None:
    """Write YAML that :func:`load_hardware` reads as an equal description.

    :raises HardwareError: the file cannot be written. :raises RequestError: a constant is not positive and finite.
    """
    write_whole(path, described_text(hardware).encode())


@cache
def preset_names() -> tuple[str, ...]:
    """Hardware presets, alphabetically."""
    folder = files("elmoe.presets") / "hardware"
    return tuple(sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml")))


@cache
def _presets() -> tuple[Hardware, ...]:
    from elmoe.schema.rivals import variant_names

    return tuple(load_hardware(name) for name in (*preset_names(), *variant_names()))


def preset_text(name: str) -> str:
    """A preset's YAML, to copy and change."""
    from elmoe.schema.rivals import variant, variant_names

    if name not in preset_names() and name in variant_names():
        return described_text(variant(name))
    return (files("elmoe.presets") / "hardware" / f"{name}.yaml").read_text(encoding="utf-8")


def _read(name_or_path: str | Path) -> tuple[str, str]:
    if str(name_or_path) in preset_names():
        return preset_text(str(name_or_path)), f"{name_or_path}.yaml"
    from elmoe.schema.rivals import variant_names

    names = (*preset_names(), *variant_names())
    hint = f"a YAML file, or one of {', '.join(names)}"
    if not os.path.exists(name_or_path):  # which is False of a name that is too long
        raise HardwareError(f"there is no hardware '{short(name_or_path)}'", nearest(name_or_path, names, hint))
    return read_text(name_or_path, HardwareError, MAX_YAML_BYTES, "hardware description", hint), str(name_or_path)
