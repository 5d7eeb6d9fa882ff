"""What all formats share: how values of rows and columns lie in blocks of 16 rows, and matrices made of such sections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.matmul import Activations
from elmoe.bitslice.nested import BLOCK_ROWS, GROUP, ceil_div, pack_plane, unpack_plane
from elmoe.errors import NumericsError
from elmoe.models.formats import FORMATS, Format

_DTYPES: dict[str, np.dtype] = {"u1": np.dtype(np.uint8), "i1": np.dtype(np.int8), "f2": np.dtype(np.float16)}


def padded_rows(values: NDArray) -> NDArray:
    """Rows filled up with zeros to whole blocks."""
    return np.pad(values, ((0, -len(values) % BLOCK_ROWS), *((0, 0),) * (values.ndim - 1)))


def pack_lanes(values: NDArray) -> NDArray:
    """(rows, cells) or (rows, cells, k) to (blocks, cells, 16 * k): of a cell the first value of all rows, then the next."""
    values = padded_rows(values)
    rows, cells = values.shape[:2]
    wide = values.reshape(rows // BLOCK_ROWS, BLOCK_ROWS, cells, -1).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(wide).reshape(rows // BLOCK_ROWS, cells, -1)


def unpack_lanes(section: NDArray) -> NDArray:
    """The inverse of :func:`pack_lanes`: (rows, cells, k)."""
    blocks, cells, width = section.shape
    lanes = section.reshape(blocks, cells, width // BLOCK_ROWS, BLOCK_ROWS).transpose(0, 3, 1, 2)
    return lanes.reshape(blocks * BLOCK_ROWS, cells, -1)


def pack_codes(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Codes of 4 bits (rows, groups * 32) to a plane."""
    return pack_plane(padded_rows(codes))


def rows_by_group(weights: NDArray[np.float32], groups_together: int = 1) -> NDArray[np.float32]:
    """(rows, columns) to (rows, groups, 32), filled up with zeros to a multiple of ``groups_together`` groups."""
    rows, columns = weights.shape
    unit = GROUP * groups_together
    padded = np.zeros((rows, ceil_div(columns, unit) * unit), np.float32)
    padded[:, :columns] = weights
    return padded.reshape(rows, -1, GROUP)


@dataclass(frozen=True, eq=False)
class PackedMatrix(ABC):
    """A matrix as the sections of its format, C-contiguous; an LSB section may be missing where only a draft is wanted."""

    format_names: ClassVar[tuple[str, ...]]
    format: Format
    rows: int
    columns: int
    sections: dict[str, NDArray] = field(repr=False)

    def __post_init__(self) -> None:
        for section in self.format.sections:
            array = self.sections.get(section.name)
            if array is None and section.slice:
                continue
            shape = section.shape(self.rows, self.columns)
            dtype = _DTYPES[section.dtype]
            if array is None or array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise NumericsError(f"section '{section.name}' is not a contiguous {shape} array of {dtype.name}")

    @classmethod
    def of(cls, name: str, rows: int, columns: int, **sections: NDArray) -> Self:
        """A matrix of a format by its name."""
        return cls(FORMATS[name], rows, columns, sections)

    @classmethod
    @abstractmethod
    def from_weights(cls, name: str, weights: NDArray[np.float32], tensor: str = "weight") -> Self:
        """(rows, columns) float32 by a simple rule; NumericsError names a tensor that is not finite."""

    @property
    def groups(self) -> int:
        """Groups of 32 columns."""
        return ceil_div(self.columns, GROUP)

    @cached_property
    def nibbles(self) -> NDArray[np.uint8]:
        """(blocks * 16, groups * 32): the upper plane."""
        return unpack_plane(self.sections["hi"])

    def row_blocks(self, first: int, last: int) -> Self:
        """Rows [first, last) without a copy; ``first`` is a multiple of 16."""
        if first % BLOCK_ROWS or not 0 <= first < last <= self.rows:
            raise NumericsError(f"rows {first} to {last} of {self.rows} do not begin a block of {BLOCK_ROWS}")
        blocks = slice(first // BLOCK_ROWS, ceil_div(last, BLOCK_ROWS))
        parts = {name: array[blocks] for name, array in self.sections.items()}
        return type(self)(self.format, last - first, self.columns, parts)

    def by_group(self, name: str) -> NDArray[np.float32]:
        """A section's values (blocks * 16, groups, k) as float32; those of super-groups are repeated."""
        span = next(section.span for section in self.format.sections if section.name == name)
        values = unpack_lanes(self.sections[name]).astype(np.float32)
        return np.repeat(values, span, axis=1)[:, : self.groups] if span > 1 else values

    def _cut(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """(blocks * 16, groups, 32) to the (rows, columns) of the matrix."""
        return np.ascontiguousarray(values.reshape(len(values), -1)[: self.rows, : self.columns])

    @abstractmethod
    def dequantize(self, draft: bool = False) -> NDArray[np.float32]:
        """The matrix as float32 (rows, columns): the value that its format defines, rounded once."""

    @abstractmethod
    def matmul(self, x: Activations, draft: bool, offset: float) -> NDArray[np.float32]:
        """Quantised (tokens, columns) times the matrix transposed: (tokens, blocks * 16), in the canonical order."""


def group_dots(x: Activations, weights: NDArray[np.float32], size: int = GROUP) -> NDArray[np.float32]:
    """(groups, tokens, rows) exact dot products of ``size`` columns with weights (rows, groups, size), small integers.

    A BLAS product is allowed: every partial sum is an integer below 2^24, so any order gives the same bits.
    """
    codes = x.codes.astype(np.float32).reshape(len(x.codes), -1, size)
    return np.matmul(codes.transpose(1, 0, 2), weights.transpose(1, 2, 0))


def code_sums(x: Activations) -> NDArray[np.float32]:
    """(tokens, groups) sums of a group's codes, exact."""
    return x.codes.astype(np.int32).reshape(len(x.codes), -1, GROUP).sum(axis=2).astype(np.float32)


def check_finite(weights: NDArray[np.float32], tensor: str) -> None:
    """NumericsError where a weight is NaN or infinite."""
    if not np.isfinite(weights).all():
        raise NumericsError(f"tensor '{tensor}' holds NaN or infinite weights", "re-export the checkpoint")


def half_scales(values: NDArray, tensor: str) -> NDArray[np.float16]:
    """fp16 scales; NumericsError where one is not finite in fp16."""
    with np.errstate(over="ignore"):
        scales = values.astype(np.float16)
    if not np.isfinite(scales).all():
        raise NumericsError(f"tensor '{tensor}' has weights too large for an fp16 scale")
    return scales
