"""The formats of weights, one module each; ``nested8`` is ``elmoe.bitslice.nested``. Which sections they have is data:
``elmoe.models.formats``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.formats.affine4 import AffineMatrix
from elmoe.bitslice.formats.packing import PackedMatrix, pack_codes, pack_lanes, unpack_lanes
from elmoe.bitslice.formats.planes6 import PlanesMatrix, pack_pairs, unpack_pairs
from elmoe.bitslice.formats.table4 import TableMatrix
from elmoe.bitslice.matmul import nested_matmul, quantize_activations
from elmoe.bitslice.nested import BLOCK_ROWS, NestedMatrix, unpack_plane
from elmoe.errors import NumericsError
from elmoe.models.formats import FORMATS, Format

__all__ = [
    "AffineMatrix",
    "Matrix",
    "PackedMatrix",
    "PlanesMatrix",
    "QuantizedMatrix",
    "StackedMatrix",
    "TableMatrix",
    "concatenated",
    "dequantized_rows",
    "format_of",
    "from_sections",
    "matmul",
    "quantized",
    "sections_of",
]

QuantizedMatrix = NestedMatrix | PackedMatrix
"""A matrix of one format."""
_CLASSES: dict[str, type[PackedMatrix]] = {
    name: one for one in (AffineMatrix, TableMatrix, PlanesMatrix) for name in one.format_names
}


@dataclass(frozen=True, eq=False)
class StackedMatrix:
    """Matrices of different formats one below the other; all but the last fill whole blocks of 16 rows."""

    parts: tuple[QuantizedMatrix, ...]

    def __post_init__(self) -> None:
        if len({part.columns for part in self.parts}) != 1 or any(part.rows % BLOCK_ROWS for part in self.parts[:-1]):
            raise NumericsError("the parts of a stacked matrix have equal columns and whole blocks of rows")

    @cached_property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts)

    @property
    def columns(self) -> int:
        """Columns of each part."""
        return self.parts[0].columns

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix as float32 (rows, columns)."""
        return np.concatenate([part.dequantize() for part in self.parts])


Matrix = QuantizedMatrix | StackedMatrix
"""What stands for a matrix of weights."""


def format_of(matrix: QuantizedMatrix) -> Format:
    """The format of a matrix."""
    return FORMATS["nested8"] if isinstance(matrix, NestedMatrix) else matrix.format


def sections_of(matrix: QuantizedMatrix) -> dict[str, NDArray]:
    """The sections at hand, by name."""
    if isinstance(matrix, PackedMatrix):
        return matrix.sections
    return {"hi": matrix.hi, **({} if matrix.lo is None else {"lo": matrix.lo}), "scales": matrix.scales}


def from_sections(format: Format, rows: int, columns: int, sections: dict[str, NDArray[np.uint8]]) -> QuantizedMatrix:
    """A matrix as views of the bytes of its sections; an LSB section may be missing, which leaves a draft."""
    views = {
        section.name: sections[section.name].view(section.dtype).reshape(section.shape(rows, columns))
        for section in format.sections
        if section.name in sections
    }
    if format.name == "nested8":
        return NestedMatrix(rows, columns, views["hi"], views.get("lo"), views["scales"])
    return _CLASSES[format.name](format, rows, columns, views)


def quantized(format: Format, weights: NDArray[np.float32], name: str = "weight") -> QuantizedMatrix:
    """(rows, columns) float32 in a format, by a simple rule. NumericsError names a tensor that does not fit it."""
    if format.name == "nested8":
        return NestedMatrix.from_weights(weights, name)
    return _CLASSES[format.name].from_weights(format.name, weights, name)


def concatenated(matrices: list[QuantizedMatrix]) -> QuantizedMatrix:
    """Matrices of one format one below the other, as one matrix."""
    first, format = matrices[0], format_of(matrices[0])
    if len(matrices) == 1:
        return first
    rows, sections = sum(one.rows for one in matrices), {}
    whole = all(one.rows % BLOCK_ROWS == 0 for one in matrices[:-1])
    planes: dict[str, tuple[Callable[[NDArray], NDArray], Callable[[NDArray], NDArray]]] = {
        "hi": (unpack_plane, pack_codes),
        "lo": (unpack_plane, pack_codes) if format.name == "nested8" else (unpack_pairs, pack_pairs),
    }
    for section in format.sections:
        parts = [sections_of(one)[section.name] for one in matrices]
        if whole:
            sections[section.name] = np.concatenate(parts)
        else:
            unpack, pack = planes.get(section.name, (unpack_lanes, pack_lanes))
            loose = [unpack(part)[: one.rows] for part, one in zip(parts, matrices, strict=True)]
            sections[section.name] = pack(np.concatenate(loose))
    return from_sections(format, rows, first.columns, sections)


def matmul(
    matrix: Matrix, x: NDArray[np.float32], draft: bool = False, offset: float | None = None, bits: int = 4
) -> NDArray[np.float32]:
    """(tokens, columns) float32 times the matrix transposed: (tokens, rows) float32.

    :param draft: read MSB slices only; formats of one slice compute the same. ``offset``, ``bits``: see ``nested_matmul``.
    """
    if isinstance(matrix, StackedMatrix):
        return np.concatenate([matmul(part, x, draft, offset, bits) for part in matrix.parts], axis=1)
    if isinstance(matrix, NestedMatrix):
        return nested_matmul(matrix, x, draft, offset, bits)
    result = matrix.matmul(quantize_activations(x), draft and bits < 8, 8.0 if offset is None else offset)
    return np.ascontiguousarray(result[:, : matrix.rows])


def dequantized_rows(matrix: QuantizedMatrix, rows: NDArray[np.int32]) -> NDArray[np.float32]:
    """Some rows of a matrix as float32: (rows, columns)."""
    if len(rows) == 0:
        return np.empty((0, matrix.columns), np.float32)
    found = []
    for row in rows.tolist():
        first = row - row % BLOCK_ROWS
        found.append(matrix.row_blocks(first, min(first + BLOCK_ROWS, matrix.rows)).dequantize()[row - first])
    return np.stack(found)
