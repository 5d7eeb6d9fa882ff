"""Blocks of GGUF's quantised types and the formats that hold them exactly: the same numbers in another order.

The layouts of blocks are those of ggml (``ggml-common.h``). Bytes of nibbles are reordered as they are where GGUF pairs the
columns c and c + 16 of a group, as a plane does.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix
from elmoe.bitslice.formats import AffineMatrix, PlanesMatrix, TableMatrix
from elmoe.bitslice.formats.packing import pack_lanes
from elmoe.convert.q8_0 import matrix_of
from elmoe.errors import NumericsError
from elmoe.kernels.packing import paired_groups_plane, pairs_plane
from elmoe.models.formats import FORMATS

Bytes = NDArray[np.uint8]
EXACT: dict[TensorType, str] = {TensorType[kind]: name for name, format in FORMATS.items() for kind in format.exact}
"""Type of a matrix -> format that holds exactly its values."""
FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)
LOW_BITS = 4.0
"""Types of fewer bits become ``affine4_k``, the others ``nested8``."""
QUANTISED_ANEW = (
    "Q5_0", "Q5_1", "Q5_K", "Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0",
    "TQ2_0", "NVFP4",
)  # fmt: skip
"""Types that no format holds exactly."""
SUPPORTED = (*EXACT, *FLOATS, *(TensorType[name] for name in QUANTISED_ANEW if name in TensorType.__members__))
"""Types that a matrix may have."""
INTERLEAVE = np.array([0, 4], np.uint8)


def nearest_format(kind: TensorType) -> str:
    """The format that a matrix of this type has in a store unless another is asked for."""
    if kind in EXACT:
        return EXACT[kind]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    return "affine4_k" if 8 * size / weights < LOW_BITS else "nested8"


def read_blocks(kind: TensorType, raw: Bytes, columns: int, name: str) -> QuantizedMatrix:
    """Rows of a type of ``EXACT`` as a matrix of its format.

    :param raw: (rows, bytes of a row). NumericsError names a tensor with scales that are NaN or infinite.
    """
    if kind == TensorType.Q8_0:
        return matrix_of(raw, columns, name)
    blocks = np.ascontiguousarray(raw).reshape(len(raw), -1, gguf.GGML_QUANT_SIZES[kind][1])
    return _READERS[kind](blocks, columns, name)


def dequantized(kind: TensorType, raw: Bytes, columns: int) -> NDArray[np.float32]:
    """Rows of any type of ``SUPPORTED`` as (rows, columns) float32."""
    raw = np.ascontiguousarray(raw)
    if kind == TensorType.BF16:
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in FLOATS:
        return raw.view("<f2" if kind == TensorType.F16 else "<f4").astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        return gguf.quants.dequantize(raw, kind).reshape(len(raw), columns).astype(np.float32, copy=False)


def _halves(blocks: Bytes, at: int, name: str) -> NDArray[np.float16]:
    """(rows, blocks) fp16 scales at a byte of every block; NumericsError where one is not finite."""
    scales = np.ascontiguousarray(blocks[:, :, at : at + 2]).view("<f2")[:, :, 0].astype(np.float16, copy=False)
    if not np.isfinite(scales).all():
        raise NumericsError(f"tensor '{name}' holds NaN or infinite scales", "download the file anew")
    return scales


def _pairs(blocks: Bytes, offset: int) -> Bytes:
    """The plane of (rows, blocks, bytes) whose codes, as pairs of columns, lie behind ``offset``."""
    return pairs_plane(blocks.reshape(len(blocks), -1), blocks.shape[2], offset)


def _q4_0(blocks: Bytes, columns: int, name: str) -> QuantizedMatrix:
    scales = pack_lanes(_halves(blocks, 0, name))
    return AffineMatrix.of("affine4_0", len(blocks), columns, hi=_pairs(blocks, 2), scales=scales)


def _q4_1(blocks: Bytes, columns: int, name: str) -> QuantizedMatrix:
    return AffineMatrix.of(
        "affine4_1", len(blocks), columns, hi=_pairs(blocks, 4), scales=pack_lanes(_halves(blocks, 0, name)),
        minima=pack_lanes(-_halves(blocks, 2, name)),
    )  # fmt: skip


def _q4_k(blocks: Bytes, columns: int, name: str) -> QuantizedMatrix:
    packed = blocks[:, :, 4:16]
    d, m, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    steps = np.concatenate([d & 63, rest & 15 | d >> 2 & 0x30], axis=2)
    minimum_steps = np.concatenate([m & 63, rest >> 4 | m >> 2 & 0x30], axis=2)
    both = np.stack([steps, minimum_steps], axis=3).reshape(len(blocks), -1, 2)
    return AffineMatrix.of(
        "affine4_k", len(blocks), columns, hi=paired_groups_plane(blocks.reshape(len(blocks), -1), blocks.shape[2], 16),
        scales=pack_lanes(_halves(blocks, 0, name)), minima=pack_lanes(_halves(blocks, 2, name)), steps=pack_lanes(both),
    )  # fmt: skip


def _q6_k(blocks: Bytes, columns: int, name: str) -> QuantizedMatrix:
    rows, count = blocks.shape[:2]
    low = blocks[:, :, :128].reshape(rows, count, 2, 1, 64) >> INTERLEAVE.reshape(2, 1) & 15
    high = blocks[:, :, 128:192].reshape(rows, count, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1) & 3
    unsigned = low.reshape(rows, count, 2, 4, 32) | high << 4
    codes = (unsigned.reshape(rows, -1).astype(np.int16) - 32).astype(np.int8)
    steps = np.ascontiguousarray(blocks[:, :, 192:208]).view(np.int8).reshape(rows, -1, 2)
    return PlanesMatrix.from_codes(columns, codes, _halves(blocks, 208, name), steps)


def _iq4_nl(blocks: Bytes, columns: int, name: str) -> QuantizedMatrix:
    scales = pack_lanes(_halves(blocks, 0, name))
    return TableMatrix.of("table4_nl", len(blocks), columns, hi=_pairs(blocks, 2), scales=scales)


def _iq4_xs(blocks: Bytes, columns: int, name: str) -> QuantizedMatrix:
    rows, count = blocks.shape[:2]
    high = np.ascontiguousarray(blocks[:, :, 2:4]).view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = (blocks[:, :, 4:8, None] >> INTERLEAVE).reshape(rows, count, 8) & 15
    steps = ((low | high << 4).astype(np.int16) - 32).astype(np.int8).reshape(rows, -1)
    return TableMatrix.of(
        "table4_xs", rows, columns, hi=_pairs(blocks, 8),
        scales=pack_lanes(_halves(blocks, 0, name)), steps=pack_lanes(steps),
    )  # fmt: skip


def _mxfp4(blocks: Bytes, columns: int, name: str) -> QuantizedMatrix:
    steps = np.ascontiguousarray(blocks[:, :, 0])
    if (steps == 255).any():
        raise NumericsError(f"tensor '{name}' holds an E8M0 scale of 255, which means NaN", "download the file anew")
    return TableMatrix.of("table4_mx", len(blocks), columns, hi=_pairs(blocks, 1), steps=pack_lanes(steps))


_READERS = {
    TensorType.Q4_0: _q4_0, TensorType.Q4_1: _q4_1, TensorType.Q4_K: _q4_k, TensorType.Q6_K: _q6_k,
    TensorType.IQ4_NL: _iq4_nl, TensorType.IQ4_XS: _iq4_xs, TensorType.MXFP4: _mxfp4,
}  # fmt: skip
