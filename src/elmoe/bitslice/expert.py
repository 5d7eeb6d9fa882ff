"""How one expert lies in memory: an MSB record, all that a draft reads, and perhaps an LSB record.

Sections are aligned to 64 bytes. The MSB record holds the first MSB section of gate, up and down projection, then the
second of each that has one, and so on: for ``nested8`` gate hi, up hi, down hi, gate scales, up scales, down scales. The LSB
record holds the LSB sections alike: gate lo, up lo, down lo; an expert whose formats have one slice has no LSB record.
Either record is one contiguous read and is padded to whole pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.formats import QuantizedMatrix, format_of, from_sections, sections_of
from elmoe.bitslice.nested import ceil_div
from elmoe.errors import NumericsError
from elmoe.models.formats import FORMATS, Format

PAGE = 4096
"""Alignment of a record, bytes: what direct disk reads need."""
SECTION_ALIGNMENT = 64
PROJECTIONS = ("gate", "up", "down")
RECORDS = ("MSB", "LSB")


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes and offsets of the records of an expert with ``hidden`` inputs and outputs and ``width`` inner units.
    ``formats``: of gate, up and down projection."""

    hidden: int
    width: int
    formats: tuple[Format, ...] = (FORMATS["nested8"],) * 3

    def shape(self, projection: str) -> tuple[int, int]:
        """(rows, columns) of a projection."""
        return (self.hidden, self.width) if projection == "down" else (self.width, self.hidden)

    def _format(self, projection: str) -> Format:
        return self.formats[PROJECTIONS.index(projection)]

    def _sections(self, slice: int) -> tuple[dict[str, int], int]:
        offsets: dict[str, int] = {}
        end = 0
        own = [[section for section in format.sections if section.slice == slice] for format in self.formats]
        for together in zip_longest(*own):
            for projection, section in zip(PROJECTIONS, together, strict=True):
                if section is None:
                    continue
                offsets[f"{projection}_{section.name}"] = end
                end += ceil_div(section.bytes_of(*self.shape(projection)), SECTION_ALIGNMENT) * SECTION_ALIGNMENT
        return offsets, ceil_div(end, PAGE) * PAGE

    @cached_property
    def msb(self) -> tuple[dict[str, int], int]:
        """Offsets of the sections of the MSB record ("gate_hi", ..., "down_scales"), and its size in bytes."""
        return self._sections(0)

    @cached_property
    def lsb(self) -> tuple[dict[str, int], int]:
        """Offsets of the sections of the LSB record ("gate_lo", ...), and its size in bytes, 0 if there is none."""
        return self._sections(1)

    @property
    def msb_bytes(self) -> int:
        """Size of the MSB record, bytes."""
        return self.msb[1]

    @property
    def lsb_bytes(self) -> int:
        """Size of the LSB record, bytes; 0 where the expert is one slice."""
        return self.lsb[1]

    def pack(self, matrices: dict[str, QuantizedMatrix]) -> tuple[NDArray[np.uint8], ...]:
        """Records (msb, lsb), or (msb,), of an expert given its "gate", "up" and "down" matrices."""
        records = [np.zeros(size, np.uint8) for size in (self.msb_bytes, self.lsb_bytes) if size]
        for projection in PROJECTIONS:
            matrix, format = matrices[projection], self._format(projection)
            if (matrix.rows, matrix.columns) != self.shape(projection) or format_of(matrix) is not format:
                raise NumericsError(
                    f"{projection} projection is {matrix.rows}x{matrix.columns} in {format_of(matrix).name}, expected "
                    f"{self.shape(projection)} in {format.name}"
                )
            found = sections_of(matrix)
            for section in format.sections:
                if section.name not in found:
                    raise NumericsError(f"{projection} projection has no {RECORDS[section.slice]} slice")
                data = found[section.name].view(np.uint8).reshape(-1)
                start = (self.msb, self.lsb)[section.slice][0][f"{projection}_{section.name}"]
                records[section.slice][start : start + data.size] = data
        return tuple(records)

    def unpack(self, msb: NDArray[np.uint8], lsb: NDArray[np.uint8] | None = None) -> dict[str, QuantizedMatrix]:
        """The matrices of an expert as views of its records; without ``lsb`` those of two slices can only draft."""
        matrices = {}
        for projection in PROJECTIONS:
            rows, columns = self.shape(projection)
            format, sections = self._format(projection), {}
            for section in format.sections:
                record, (offsets, _) = ((msb, self.msb), (lsb, self.lsb))[section.slice]
                if record is not None:
                    start = offsets[f"{projection}_{section.name}"]
                    sections[section.name] = record[start : start + section.bytes_of(rows, columns)]
            matrices[projection] = from_sections(format, rows, columns, sections)
        return matrices
