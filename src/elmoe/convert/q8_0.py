"""GGUF's Q8_0 blocks and the nested format: the same codes and scales in another order. No weight is quantised anew."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import NestedMatrix
from elmoe.bitslice.nested import GROUP
from elmoe.errors import ConvertError, NumericsError
from elmoe.kernels.packing import split_codes

BLOCK_BYTES = 2 + GROUP
"""A block: one fp16 scale, then 32 int8 codes."""


def matrix_of(blocks: NDArray[np.uint8], columns: int, name: str) -> NestedMatrix:
    """Q8_0 rows (rows, groups * 34) uint8 as a matrix; codes of -128 are kept.

    :raises NumericsError: a scale is NaN or infinite; the message names the tensor.
    """
    grouped = blocks.reshape(len(blocks), -1, BLOCK_BYTES)
    scales = np.ascontiguousarray(grouped[:, :, :2]).view("<f2")[:, :, 0]
    if not np.isfinite(scales).all():
        raise NumericsError(f"tensor '{name}' holds NaN or infinite scales", "download the file anew")
    hi, lo = split_codes(blocks, BLOCK_BYTES, 2)
    return NestedMatrix.from_planes(len(blocks), columns, hi, lo, scales.astype(np.float16, copy=False))


def blocks_of(matrix: NestedMatrix, first: int, last: int, name: str) -> NDArray[np.uint8]:
    """Rows [first, last) of a nested matrix as Q8_0 blocks, (rows, groups * 34) uint8; ``first`` is a multiple of 16.

    :raises ConvertError: the columns do not fill whole groups of 32, which Q8_0 demands; the message names the tensor.
    """
    if matrix.columns % GROUP:
        raise ConvertError(
            f"tensor '{name}' has {matrix.columns} columns, Q8_0 needs a multiple of {GROUP}",
            "this model cannot be written as Q8_0",
        )
    part = matrix.row_blocks(first, last)
    rows, groups = last - first, matrix.columns // GROUP
    blocks = np.empty((rows, groups, BLOCK_BYTES), np.uint8)
    scales = part.scales.transpose(0, 2, 1).reshape(-1, groups)[:rows]
    blocks[:, :, :2] = np.ascontiguousarray(scales).astype("<f2", copy=False)[:, :, None].view(np.uint8)
    blocks[:, :, 2:] = part.codes[:rows].reshape(rows, groups, GROUP).view(np.uint8)
    return blocks.reshape(rows, -1)
