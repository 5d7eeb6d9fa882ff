"""The nested INT8 format: one 8-bit code per weight, stored as two planes of nibbles.

A weight matrix ``W[rows, columns]`` is cut into groups of 32 along its columns. Each group has a scale
``s = fp16(absmax / 127)``; a weight is ``s * q`` with ``q`` in -127..127, stored as ``u = q + 128`` in two nibbles
``hi = u >> 4`` (the MSB slice) and ``lo = u & 15`` (the LSB slice), so ``q = 16 * (hi - 8) + lo``. The draft model reads
the MSB slice alone and puts a constant below it: ``q' = 16 * (hi - 8) + draft_offset``, where 8 is the paper's LSB
augmentation. This is GGUF's Q8_0 in another layout.

Layout, chosen so that kernels use the stored bytes as they lie: rows come in blocks of 16, so that one SIMD lane owns one
output. A plane has shape ``(blocks, groups, 256)``. Within a group, byte ``64 * j + 4 * n + i`` (j, i in 0..3, n in 0..15)
holds row ``n`` of the block: column ``4 * j + i`` of the group in its low nibble, column ``16 + 4 * j + i`` in its high
nibble. Scales have shape ``(blocks, groups, 16)``. Rows and columns beyond the matrix hold ``q = 0``; scales of rows
beyond it are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import NumericsError

GROUP = 32
"""Weights that share a scale, along the input dimension."""
BLOCK_ROWS = 16
"""Output rows interleaved in a block."""
GROUP_BYTES = GROUP * BLOCK_ROWS // 2
"""Bytes of one plane for one group of one block of rows."""


def ceil_div(value: int, divisor: int) -> int:
    """Smallest integer not below ``value / divisor``."""
    return -(-value // divisor)


def quantize(weights: NDArray[np.float32], name: str = "weight") -> tuple[NDArray[np.int8], NDArray[np.float16]]:
    """Quantise a matrix to codes and scales.

    :param weights: (rows, columns) float32.
    :param name: the tensor's name, for errors.
    :returns: codes (rows, groups * 32) int8 with zeros in the padding, scales (rows, groups) float16.
    :raises NumericsError: a weight is NaN or infinite, or ``absmax / 127`` overflows fp16.
    """
    weights = np.asarray(weights, dtype=np.float32)
    if weights.ndim != 2:
        raise NumericsError(f"tensor '{name}' has {weights.ndim} dimensions, a matrix has 2")
    rows, columns = weights.shape
    groups = ceil_div(columns, GROUP)
    padded = np.zeros((rows, groups * GROUP), np.float32)
    padded[:, :columns] = weights
    grouped = padded.reshape(rows, groups, GROUP)
    absmax = np.abs(grouped).max(axis=2) if columns else np.zeros((rows, groups), np.float32)
    scales = group_scales(absmax, name)
    wide = scales.astype(np.float32)[:, :, None]
    ratio = np.divide(grouped, wide, out=np.zeros_like(grouped), where=wide != 0)
    codes = np.clip(np.rint(ratio), -127, 127).astype(np.int8)
    return codes.reshape(rows, groups * GROUP), scales


def group_scales(absmax: NDArray[np.float32], name: str) -> NDArray[np.float16]:
    """Scales of groups with these largest magnitudes, both (rows, groups); raises as :func:`quantize`."""
    if not np.isfinite(absmax).all():
        raise NumericsError(f"tensor '{name}' holds NaN or infinite weights", "re-export the checkpoint")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        scales = (absmax / np.float32(127)).astype(np.float16)
        if not np.isfinite(scales).all():
            raise NumericsError(
                f"tensor '{name}' has weights too large for an fp16 scale (absmax {absmax.max():g}, limit 8.3e6)"
            )
        # A subnormal scale may be rounded down so far that absmax falls outside the code range.
        too_small = np.rint(absmax / scales.astype(np.float32)) > 127
    return np.where(too_small, np.nextafter(scales, np.float16(np.inf)), scales)


def split(codes: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Codes to (hi, lo) nibbles, one per byte."""
    unsigned = (codes.astype(np.int16) + 128).astype(np.uint8)
    hi: NDArray[np.uint8] = unsigned >> np.uint8(4)
    lo: NDArray[np.uint8] = unsigned & np.uint8(15)
    return hi, lo


def recombine(hi: NDArray[np.uint8], lo: NDArray[np.uint8] | int) -> NDArray[np.int8]:
    """(hi, lo) nibbles to codes: the inverse of :func:`split`."""
    return (16 * (hi.astype(np.int16) - 8) + lo).astype(np.int8)


def draft_values(codes: NDArray[np.int8], bits: int, offset: float | None = None) -> NDArray[np.float32]:
    """The integers (or half-integers) a draft of ``bits`` upper bits multiplies with.

    :param codes: any shape, int8.
    :param bits: bits kept, 1 to 8.
    :param offset: constant in place of the dropped bits, in code units; None is half of their range (LSB augmentation),
        half a unit less is unbiased, 0 is truncation. At 8 bits nothing is dropped and the offset is 0.
    """
    if not 1 <= bits <= 8:
        raise NumericsError(f"a draft keeps 1 to 8 bits, not {bits}")
    step = 1 << (8 - bits)
    if bits == 8:
        offset = 0.0
    elif offset is None:
        offset = step / 2
    if not 0 <= offset <= step or float(offset * 2) != int(offset * 2):
        raise NumericsError(f"draft offset {offset} is not a multiple of 0.5 within 0..{step}")
    unsigned = codes.astype(np.int16) + 128
    return ((unsigned & ~(step - 1)) - 128).astype(np.float32) + np.float32(offset)


def pack_plane(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Nibbles (rows, groups * 32), rows a multiple of 16, to a plane (blocks, groups, 256)."""
    rows, columns = nibbles.shape
    # axes: block, row n, group, half (low or high nibble), j, i
    parts = nibbles.reshape(rows // BLOCK_ROWS, BLOCK_ROWS, columns // GROUP, 2, 4, 4)
    packed = parts[:, :, :, 0] | (parts[:, :, :, 1] << 4)
    return np.ascontiguousarray(packed.transpose(0, 2, 3, 1, 4)).reshape(rows // BLOCK_ROWS, columns // GROUP, GROUP_BYTES)


def unpack_plane(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of :func:`pack_plane`."""
    blocks, groups, _ = plane.shape
    packed = plane.reshape(blocks, groups, 4, BLOCK_ROWS, 4).transpose(0, 3, 1, 2, 4)
    parts = np.stack([packed & 15, packed >> 4], axis=3)
    return parts.reshape(blocks * BLOCK_ROWS, groups * GROUP)


@dataclass(frozen=True, eq=False)
class NestedMatrix:
    """A matrix in the nested format; ``lo`` is None where only the MSB slice is at hand.

    ``hi``, ``lo``: (blocks, groups, 256) uint8; ``scales``: (blocks, groups, 16) float16. C-contiguous.
    """

    rows: int
    columns: int
    hi: NDArray[np.uint8]
    lo: NDArray[np.uint8] | None
    scales: NDArray[np.float16]

    def __post_init__(self) -> None:
        blocks, groups = ceil_div(self.rows, BLOCK_ROWS), ceil_div(self.columns, GROUP)
        for label, array, shape, dtype in (
            ("hi", self.hi, (blocks, groups, GROUP_BYTES), np.uint8),
            ("lo", self.lo, (blocks, groups, GROUP_BYTES), np.uint8),
            ("scales", self.scales, (blocks, groups, BLOCK_ROWS), np.float16),
        ):
            if array is None and label == "lo":
                continue
            if array is None or array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
                raise NumericsError(f"plane '{label}' is not a contiguous {shape} array of {np.dtype(dtype).name}")

    @classmethod
    def from_codes(cls, codes: NDArray[np.int8], scales: NDArray[np.float16], columns: int | None = None) -> NestedMatrix:
        """Pack codes (rows, groups * 32) and scales (rows, groups); codes of -128 are kept."""
        rows, padded_columns = codes.shape
        padding = -rows % BLOCK_ROWS
        hi, lo = split(np.pad(codes, ((0, padding), (0, 0))))
        return cls.from_planes(rows, padded_columns if columns is None else columns, pack_plane(hi), pack_plane(lo), scales)

    @classmethod
    def from_planes(
        cls, rows: int, columns: int, hi: NDArray[np.uint8], lo: NDArray[np.uint8], scales: NDArray[np.float16]
    ) -> NestedMatrix:
        """Planes of all blocks, and scales (rows, groups), which are interleaved."""
        blocks, groups, _ = hi.shape
        padded = np.zeros((blocks * BLOCK_ROWS, groups), np.float16)
        padded[:rows] = scales
        interleaved = padded.reshape(blocks, BLOCK_ROWS, groups).transpose(0, 2, 1)
        return cls(rows, columns, hi, lo, np.ascontiguousarray(interleaved))

    @classmethod
    def from_weights(cls, weights: NDArray[np.float32], name: str = "weight") -> NestedMatrix:
        """Quantise and pack; raises as :func:`quantize`."""
        codes, scales = quantize(weights, name)
        return cls.from_codes(codes, scales, weights.shape[1])

    def row_blocks(self, first: int, last: int) -> NestedMatrix:
        """Rows [first, last) without a copy; ``first`` is a multiple of 16."""
        if first % BLOCK_ROWS or not 0 <= first < last <= self.rows:
            raise NumericsError(f"rows {first} to {last} of {self.rows} do not begin a block of {BLOCK_ROWS}")
        blocks = slice(first // BLOCK_ROWS, ceil_div(last, BLOCK_ROWS))
        lo = None if self.lo is None else self.lo[blocks]
        return NestedMatrix(last - first, self.columns, self.hi[blocks], lo, self.scales[blocks])

    @cached_property
    def codes(self) -> NDArray[np.int8]:
        """(blocks * 16, groups * 32) int8. Needs both planes."""
        if self.lo is None:
            raise NumericsError("the LSB slice is not at hand")
        return recombine(unpack_plane(self.hi), unpack_plane(self.lo))

    @cached_property
    def row_scales(self) -> NDArray[np.float32]:
        """(blocks * 16, groups) float32."""
        blocks, groups, _ = self.scales.shape
        return self.scales.transpose(0, 2, 1).reshape(blocks * BLOCK_ROWS, groups).astype(np.float32)

    def values(self, bits: int = 8, offset: float | None = None) -> NDArray[np.float32]:
        """Unscaled operands (blocks * 16, groups * 32) as :func:`draft_values`; 4 bits or fewer need no LSB slice."""
        if self.lo is None and bits <= 4:
            return draft_values(recombine(unpack_plane(self.hi), 0), bits, offset)
        return draft_values(self.codes, bits, offset)

    def dequantize(self, bits: int = 8, offset: float | None = None) -> NDArray[np.float32]:
        """The matrix as float32 (rows, columns); exact: a code times an fp16 scale fits in float32."""
        values = self.values(bits, offset).reshape(-1, self.scales.shape[1], GROUP)
        dense = (values * self.row_scales[:, :, None]).reshape(values.shape[0], -1)
        return dense[: self.rows, : self.columns]
