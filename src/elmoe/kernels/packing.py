"""The door to the native code of conversions: rows of files, or of floats, as planes (declared in native/packing.cpp).

Each is defined in NumPy by ``bitslice.nested``: ``pack_plane``, ``split`` and ``quantize``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elmoe import _native, bitslice  # noqa: TID251 - this package is the door
from elmoe.bitslice import NestedMatrix, QuantizedMatrix
from elmoe.bitslice.nested import BLOCK_ROWS, GROUP, GROUP_BYTES, ceil_div, group_scales
from elmoe.models.formats import Format

__all__ = ["pairs_plane", "paired_groups_plane", "quantized", "split_codes"]

Bytes = NDArray[np.uint8]
NO_WEIGHT = 0x88
"""Of rows beyond a nested matrix, in the upper plane: code 0 of both columns."""


def pairs_plane(rows: Bytes, block_bytes: int, offset: int) -> Bytes:
    """Bytes of the column pairs (c, c + 16), 16 a group, behind ``offset`` in every block of (rows, bytes), as a plane."""
    plane = _plane(len(rows), rows.shape[1] // block_bytes * ((block_bytes - offset) // 16))
    _native.pack_pairs(np.ascontiguousarray(rows), block_bytes, offset, plane)
    return plane


def paired_groups_plane(rows: Bytes, block_bytes: int, offset: int) -> Bytes:
    """Bytes of one column of two groups, the first in the low nibble, 32 for two groups, as a plane of all groups."""
    plane = _plane(len(rows), rows.shape[1] // block_bytes * ((block_bytes - offset) // GROUP) * 2)
    _native.split_groups(np.ascontiguousarray(rows), block_bytes, offset, plane)
    return plane


def split_codes(rows: Bytes, block_bytes: int, offset: int) -> tuple[Bytes, Bytes]:
    """int8 codes, 32 a group, as the planes (hi, lo) of ``nested8``."""
    groups = rows.shape[1] // block_bytes * ((block_bytes - offset) // GROUP)
    high, low = _plane(len(rows), groups, NO_WEIGHT), _plane(len(rows), groups)
    _native.split_codes(np.ascontiguousarray(rows), block_bytes, offset, 0x80, low, high)
    return high, low


def quantized(format: Format, weights: NDArray[np.float32], name: str) -> QuantizedMatrix:
    """``bitslice.quantized``, the same bits; fast where the format is ``nested8``."""
    if format.name != "nested8":
        return bitslice.quantized(format, weights, name)
    weights = np.ascontiguousarray(weights, np.float32)
    rows, columns = weights.shape
    groups = ceil_div(columns, GROUP)
    maxima = np.empty((rows, groups), np.float32)
    _native.group_maxima(weights, maxima)
    scales = group_scales(maxima, name)
    high, low = _plane(rows, groups, NO_WEIGHT), _plane(rows, groups)
    _native.quantize_planes(weights, scales.astype(np.float32), low, high)
    return NestedMatrix.from_planes(rows, columns, high, low, scales)


def _plane(rows: int, groups: int, filling: int = 0) -> Bytes:
    return np.full((ceil_div(rows, BLOCK_ROWS), groups, GROUP_BYTES), filling, np.uint8)
