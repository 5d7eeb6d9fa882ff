"""GPT-OSS's tensors of experts: all experts of a layer in one, rows of gates and ups in alternation, in MXFP4 or as floats.

MXFP4: ``gate_up_proj_blocks`` (experts, 2 * width, hidden / 32, 16) with two codes in a byte, the lower one first, and
``gate_up_proj_scales`` (experts, 2 * width, hidden / 32) of exponents; ``down_proj`` alike. Floats, which are transposed:
``gate_up_proj`` (experts, hidden, 2 * width) and ``down_proj`` (experts, width, hidden). Biases: ``gate_up_proj_bias``
(experts, 2 * width).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix, quantized
from elmoe.bitslice.formats import TableMatrix
from elmoe.bitslice.formats.packing import pack_codes, pack_lanes
from elmoe.bitslice.nested import GROUP
from elmoe.convert.checkpoint import Checkpoint
from elmoe.convert.losses import Losses
from elmoe.errors import ConvertError, NumericsError
from elmoe.models.formats import Format
from elmoe.models.tensors import PROJECTIONS, FeedForward

MXFP4 = "table4_mx"
BLOCKS, SCALES, BIAS = "_blocks", "_scales", "_bias"
FIRST_ROW = {"gate": 0, "up": 1}


def fused_name(prefix: str, part: FeedForward, projection: str) -> str:
    """The tensor that holds a projection of a layer's experts; ``prefix`` as in ``Family.alternating``."""
    return prefix.format(layer=part.layer) + ("down_proj" if projection == "down" else "gate_up_proj")


def fused_shape(part: FeedForward, projection: str) -> tuple[int, int]:
    """(rows, columns) of an expert's fused matrix."""
    rows, columns = part.shape(projection)
    return (rows, columns) if projection == "down" else (2 * rows, columns)


def rows_of(values: NDArray, projection: str) -> NDArray:
    """A projection's rows of a fused matrix, or of a fused bias seen as one column."""
    return values if projection == "down" else values[FIRST_ROW[projection] :: 2]


def mxfp4_matrix(blocks: NDArray[np.uint8], scales: NDArray[np.uint8], name: str) -> TableMatrix:
    """A matrix of (rows, groups, 16) bytes of codes and (rows, groups) exponents; NumericsError names the tensor."""
    rows, groups = scales.shape
    if (scales == 255).any():
        raise NumericsError(f"tensor '{name}' holds an E8M0 scale of 255, which means NaN", "download the checkpoint anew")
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(rows, groups * GROUP)
    return TableMatrix.of(MXFP4, rows, groups * GROUP, hi=pack_codes(codes), steps=pack_lanes(np.ascontiguousarray(scales)))


class FusedExperts:
    """The experts of a checkpoint. ``packed``: whether they are MXFP4."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, losses: Losses) -> None:
        self._checkpoint, self._prefix, self._losses = checkpoint, prefix, losses
        self.packed = any(name.endswith("experts.gate_up_proj" + BLOCKS) for name in checkpoint.names())

    def check(self, part: FeedForward) -> set[str]:
        """The names of a layer's tensors; ConvertError unless they are there, with their shapes."""
        found = set()
        for projection in ("gate", "down"):
            name, (rows, columns) = fused_name(self._prefix, part, projection), fused_shape(part, projection)
            if not self.packed:
                self._checkpoint.check(name, (part.count, columns, rows))
                found.add(name)
                continue
            if columns % GROUP:
                raise ConvertError(f"tensor '{name + BLOCKS}' has {columns} columns, MXFP4 needs a multiple of {GROUP}")
            self._checkpoint.check_bytes(name + BLOCKS, (part.count, rows, columns // GROUP, GROUP // 2))
            self._checkpoint.check_bytes(name + SCALES, (part.count, rows, columns // GROUP))
            found |= {name + BLOCKS, name + SCALES}
        return found

    def projections(self, part: FeedForward, expert: int, formats: tuple[Format, ...]) -> dict[str, QuantizedMatrix]:
        """Gate, up and down of an expert, each in its format."""
        found = {}
        for projection, format in zip(PROJECTIONS, formats, strict=True):
            name = fused_name(self._prefix, part, projection)
            found[projection] = (self._mxfp4 if self.packed else self._floats)(name, part, projection, expert, format)
        return found

    def _mxfp4(self, name: str, part: FeedForward, projection: str, expert: int, format: Format) -> QuantizedMatrix:
        blocks, scales = (rows_of(self._checkpoint.raw(name + end, expert), projection) for end in (BLOCKS, SCALES))
        matrix = mxfp4_matrix(blocks, scales, name + SCALES)
        if format.name == MXFP4:
            self._losses.exact("MXFP4", format.name, name)
            return matrix
        return self._quantised(matrix.dequantize(), name, "MXFP4", format)

    def _floats(self, name: str, part: FeedForward, projection: str, expert: int, format: Format) -> QuantizedMatrix:
        values = self._checkpoint.rows([name], expert, expert + 1)[0].T
        weights = np.ascontiguousarray(rows_of(values, projection))
        return self._quantised(weights, name, self._checkpoint.dtype(name), format)

    def _quantised(self, weights: NDArray[np.float32], name: str, kind: str, format: Format) -> QuantizedMatrix:
        matrix = quantized(format, weights, name)
        self._losses.quantised(kind, format.name, name, weights, matrix)
        return matrix
