"""How one expert lies in memory: an MSB record (nibbles and scales) and an LSB record (nibbles).

The MSB record holds, each section aligned to 64 bytes: gate hi, up hi, down hi, gate scales, up scales, down scales.
The LSB record holds gate lo, up lo, down lo. Either record is one contiguous read and is padded to whole pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.nested import BLOCK_ROWS, GROUP, GROUP_BYTES, NestedMatrix, ceil_div
from elmoe.errors import NumericsError

PAGE = 4096
"""Alignment of a record, bytes: what direct disk reads need."""
SECTION_ALIGNMENT = 64
PROJECTIONS = ("gate", "up", "down")


@dataclass(frozen=True)
class ExpertLayout:
    """Sizes and offsets of the records of an expert with ``hidden`` inputs and outputs and ``width`` inner units."""

    hidden: int
    width: int

    def shape(self, projection: str) -> tuple[int, int]:
        """(rows, columns) of a projection."""
        return (self.hidden, self.width) if projection == "down" else (self.width, self.hidden)

    def _grid(self, projection: str) -> tuple[int, int]:
        rows, columns = self.shape(projection)
        return ceil_div(rows, BLOCK_ROWS), ceil_div(columns, GROUP)

    def _sections(self, kinds: tuple[tuple[str, int], ...]) -> tuple[dict[str, int], int]:
        offsets: dict[str, int] = {}
        end = 0
        for kind, bytes_per_group in kinds:
            for projection in PROJECTIONS:
                offsets[f"{projection}_{kind}"] = end
                blocks, groups = self._grid(projection)
                end += ceil_div(blocks * groups * bytes_per_group, SECTION_ALIGNMENT) * SECTION_ALIGNMENT
        return offsets, ceil_div(end, PAGE) * PAGE

    @cached_property
    def msb(self) -> tuple[dict[str, int], int]:
        """Offsets of the sections of the MSB record ("gate_hi", ..., "down_scales"), and its size in bytes."""
        return self._sections((("hi", GROUP_BYTES), ("scales", 2 * BLOCK_ROWS)))

    @cached_property
    def lsb(self) -> tuple[dict[str, int], int]:
        """Offsets of the sections of the LSB record ("gate_lo", ...), and its size in bytes."""
        return self._sections((("lo", GROUP_BYTES),))

    @property
    def msb_bytes(self) -> int:
        """Size of the MSB record, bytes."""
        return self.msb[1]

    @property
    def lsb_bytes(self) -> int:
        """Size of the LSB record, bytes."""
        return self.lsb[1]

    def pack(self, matrices: dict[str, NestedMatrix]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Records (msb, lsb) of an expert given its "gate", "up" and "down" matrices."""
        records = np.zeros(self.msb_bytes, np.uint8), np.zeros(self.lsb_bytes, np.uint8)
        for projection in PROJECTIONS:
            matrix = matrices[projection]
            if (matrix.rows, matrix.columns) != self.shape(projection):
                raise NumericsError(
                    f"{projection} projection is {matrix.rows}x{matrix.columns}, expected {self.shape(projection)}"
                )
            for record, (offsets, _), kind, plane in (
                (records[0], self.msb, "hi", matrix.hi),
                (records[0], self.msb, "scales", matrix.scales),
                (records[1], self.lsb, "lo", matrix.lo),
            ):
                if plane is None:
                    raise NumericsError(f"{projection} projection has no LSB slice")
                data = plane.view(np.uint8).reshape(-1)
                start = offsets[f"{projection}_{kind}"]
                record[start : start + data.size] = data
        return records

    def unpack(self, msb: NDArray[np.uint8], lsb: NDArray[np.uint8] | None) -> dict[str, NestedMatrix]:
        """The matrices of an expert as views of its records; without ``lsb`` they can only draft."""
        matrices = {}
        for projection in PROJECTIONS:
            rows, columns = self.shape(projection)
            blocks, groups = self._grid(projection)

            def view(record: NDArray[np.uint8], start: int, shape: tuple[int, int, int], dtype: type) -> NDArray:
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                return record[start : start + size].view(dtype).reshape(shape)

            plane = (blocks, groups, GROUP_BYTES)
            matrices[projection] = NestedMatrix(
                rows,
                columns,
                view(msb, self.msb[0][f"{projection}_hi"], plane, np.uint8),
                None if lsb is None else view(lsb, self.lsb[0][f"{projection}_lo"], plane, np.uint8),
                view(msb, self.msb[0][f"{projection}_scales"], (blocks, groups, BLOCK_ROWS), np.float16),
            )
        return matrices
