"""The formats of weights as data: which sections a matrix has, in which slices they lie, and how many bytes they take.

Rows lie in blocks of 16, columns in groups of 32, as the kernels read them; what the bytes mean is defined in
``elmoe.bitslice.formats``. A format is exact for one or more types of GGUF; how it computes is the same for all formats of a
family: ``nested8``, ``affine4``, ``table4``, ``planes6``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from elmoe.errors import ModelError

BLOCK_ROWS, GROUP, SUPER = 16, 32, 8
"""Rows of a block, columns of a group, and groups that share a super-scale where a format has such."""
JOIN = "+"
"""Between the formats of a tensor's parts, where they differ."""


@dataclass(frozen=True)
class Section:
    """One array of a matrix in a block of rows: ``bytes`` per group, or per ``span`` groups. ``slice``: 0 for the MSB slice,
    1 for the LSB slice, which a draft does without."""

    name: str
    bytes: int
    dtype: Literal["u1", "i1", "f2"]
    span: int = 1
    slice: int = 0

    def shape(self, rows: int, columns: int) -> tuple[int, int, int]:
        """(blocks, cells, values of a cell) of a matrix."""
        size = 2 if self.dtype == "f2" else 1
        return -(-rows // BLOCK_ROWS), -(-columns // (GROUP * self.span)), self.bytes // size

    def bytes_of(self, rows: int, columns: int) -> int:
        """Bytes of a matrix's section."""
        return prod(self.shape(rows, columns)[:2]) * self.bytes


@dataclass(frozen=True)
class Format:
    """A format of weights. ``sections``: in the order of a tensor in ``dense.bin``. ``exact``: types of GGUF whose values it
    holds as they are."""

    name: str
    sections: tuple[Section, ...]
    exact: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """Which chain it computes."""
        return self.name.partition("_")[0]

    @cached_property
    def slices(self) -> int:
        """1, or 2 where a draft can leave out low bits."""
        return 1 + max(section.slice for section in self.sections)

    @cached_property
    def bits(self) -> tuple[float, ...]:
        """Bits per weight with scales, by slice."""
        weights = BLOCK_ROWS * GROUP
        return tuple(
            sum(8 * section.bytes / (weights * section.span) for section in self.sections if section.slice == index)
            for index in range(self.slices)
        )

    def bytes_of(self, rows: int, columns: int) -> dict[str, int]:
        """Section -> bytes of a matrix."""
        return {section.name: section.bytes_of(rows, columns) for section in self.sections}


_HI = Section("hi", 256, "u1")
_BY_GROUP, _BY_SUPER = Section("scales", 32, "f2"), Section("scales", 32, "f2", SUPER)

FORMATS: dict[str, Format] = {
    one.name: one
    for one in (
        Format("nested8", (_HI, Section("lo", 256, "u1", slice=1), _BY_GROUP), ("Q8_0",)),
        Format("affine4_0", (_HI, _BY_GROUP), ("Q4_0",)),
        Format("affine4_1", (_HI, _BY_GROUP, Section("minima", 32, "f2")), ("Q4_1",)),
        Format("affine4_k", (_HI, _BY_SUPER, Section("minima", 32, "f2", SUPER), Section("steps", 32, "u1")), ("Q4_K",)),
        Format("table4_nl", (_HI, _BY_GROUP), ("IQ4_NL",)),
        Format("table4_xs", (_HI, _BY_SUPER, Section("steps", 16, "i1")), ("IQ4_XS",)),
        Format("table4_mx", (_HI, Section("steps", 16, "u1")), ("MXFP4",)),
        Format("planes6", (_HI, Section("lo", 128, "u1", slice=1), _BY_SUPER, Section("steps", 32, "i1")), ("Q6_K",)),
    )
}
"""All formats of quantised matrices, by name."""
CHOICES = {"nested8": "nested8", "affine4": "affine4_k", "table4": "table4_nl", "planes6": "planes6"}
"""What users may ask for: a family, or any format by its name."""


def format_named(name: str) -> Format:
    """A format; ModelError lists those that there are."""
    if name not in FORMATS:
        raise ModelError(f"there is no format '{name[:40]}'", f"known: {', '.join(FORMATS)}")
    return FORMATS[name]


def split_formats(name: str, parts: int) -> tuple[Format, ...]:
    """The format of each of ``parts``: one name stands for all, else there is one for each; ModelError otherwise."""
    names = name.split(JOIN)
    if len(names) not in (1, parts):
        raise ModelError(f"'{name[:80]}' gives {len(names)} formats for {parts} parts", "give one, or one for each part")
    found = tuple(format_named(one) for one in names)
    return found * parts if len(found) == 1 else found


def joined_formats(names: list[str]) -> str:
    """The inverse of :func:`split_formats`: one name where all are the same."""
    return names[0] if len(set(names)) == 1 else JOIN.join(names)
