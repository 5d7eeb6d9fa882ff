"""Matmul of a nested matrix with group-wise INT8 activations, in the canonical order.

Per token and group of 32: ``sx = absmax / 127``, ``x = clip(rint(v / sx), -127, 127)``. The dot product of a group is
exact in integers; float32 sees one chain over groups in ascending order, ``acc = acc + float(dot) * (s * sx)`` from 0.
No output depends on how many tokens are in the call.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.nested import GROUP, NestedMatrix, ceil_div
from elmoe.errors import NumericsError


@dataclass(frozen=True, eq=False)
class Activations:
    """Quantised activations: ``codes`` (tokens, groups * 32) int8, ``scales`` (tokens, groups) float32."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]


def quantize_activations(x: NDArray[np.float32]) -> Activations:
    """Quantise (tokens, columns) float32; raises NumericsError where a value is NaN or infinite."""
    tokens, columns = x.shape
    if not np.isfinite(x).all():
        raise NumericsError("activations hold NaN or infinite values", "check the checkpoint's weights")
    groups = ceil_div(columns, GROUP)
    padded = np.zeros((tokens, groups * GROUP), np.float32)
    padded[:, :columns] = x
    grouped = padded.reshape(tokens, groups, GROUP)
    scales = np.abs(grouped).max(axis=2) / np.float32(127)
    wide = scales[:, :, None]
    ratio = np.divide(grouped, wide, out=np.zeros_like(grouped), where=wide != 0)
    codes = np.clip(np.rint(ratio), -127, 127).astype(np.int8)
    return Activations(codes.reshape(tokens, -1), scales)


def nested_matmul(
    matrix: NestedMatrix, x: NDArray[np.float32], draft: bool = False, offset: float | None = None, bits: int = 4
) -> NDArray[np.float32]:
    """(tokens, columns) float32 times the matrix transposed: (tokens, rows) float32.

    :param draft: use the upper ``bits`` of every weight with ``offset`` below them (see ``draft_values``) instead of all 8.
    """
    activations = quantize_activations(x)
    values = matrix.values(bits, offset) if draft else matrix.values()
    groups = matrix.scales.shape[1]
    tokens = x.shape[0]
    codes = activations.codes.astype(np.float32).reshape(tokens, groups, GROUP)
    weights = values.reshape(-1, groups, GROUP)
    # A BLAS product is allowed here: every partial sum is a (half-)integer below 2^21, so any order gives the same bits.
    dots = np.matmul(codes.transpose(1, 0, 2), weights.transpose(1, 2, 0))
    result = np.zeros((tokens, weights.shape[0]), np.float32)
    for group in range(groups):
        scale = matrix.row_scales[None, :, group] * activations.scales[:, group, None]
        result = result + dots[group] * scale
    return np.ascontiguousarray(result[:, : matrix.rows])
