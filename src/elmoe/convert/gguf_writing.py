"""Matrices of a store as blocks of the GGUF type that their format is: the inverse of ``gguf_blocks``."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import LlamaFileType
from numpy.typing import NDArray

from elmoe.bitslice import NestedMatrix, PackedMatrix, QuantizedMatrix, format_of
from elmoe.bitslice.formats.packing import unpack_lanes
from elmoe.bitslice.formats.planes6 import unpack_pairs
from elmoe.bitslice.nested import BLOCK_ROWS
from elmoe.convert.gguf_blocks import EXACT, Bytes
from elmoe.convert.q8_0 import blocks_of
from elmoe.errors import ConvertError
from elmoe.models.formats import Format

TYPES = {format: kind for kind, format in EXACT.items()}
"""Name of a format -> type of GGUF."""
FILE_TYPES = {
    TensorType.Q8_0: LlamaFileType.MOSTLY_Q8_0, TensorType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    TensorType.Q4_1: LlamaFileType.MOSTLY_Q4_1, TensorType.Q4_K: LlamaFileType.MOSTLY_Q4_K_M,
    TensorType.Q6_K: LlamaFileType.MOSTLY_Q6_K, TensorType.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    TensorType.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS, TensorType.MXFP4: LlamaFileType.MOSTLY_MXFP4_MOE,
}  # fmt: skip
"""What a file is called whose experts have a type."""
LARGEST_STEP = {"affine4_k": (0, 63), "table4_xs": (-32, 31)}
"""Sub-scales that GGUF's types can hold; the store's are bytes."""


def type_of(format: Format) -> TensorType:
    """The type that holds a format bit for bit."""
    return TYPES[format.name]


def tensor_bytes(name: str, shape: tuple[int, ...], kind: TensorType) -> int:
    """Bytes of a tensor; ConvertError where its columns do not fill whole blocks of the type."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ConvertError(
            f"tensor '{name}' has {shape[-1]} columns, {kind.name} needs a multiple of {block}",
            f"this model cannot be written as {kind.name}",
        )
    count = 1
    for side in shape:
        count *= side
    return count // block * size


def write_blocks(matrix: QuantizedMatrix, first: int, last: int, name: str) -> Bytes:
    """Rows [first, last) as blocks, (rows, bytes of a row) uint8; ``first`` is a multiple of 16. ConvertError where the
    type cannot hold them; the message names the tensor."""
    kind = type_of(format_of(matrix))
    tensor_bytes(name, (matrix.columns,), kind)
    if isinstance(matrix, NestedMatrix):
        return blocks_of(matrix, first, last, name)
    part = matrix.row_blocks(first, last)
    least, most = LARGEST_STEP.get(part.format.name, (-128, 255))
    if "steps" in part.sections and (part.sections["steps"].min() < least or part.sections["steps"].max() > most):
        raise ConvertError(f"tensor '{name}' has sub-scales that {kind.name} does not have", "convert the model anew")
    return np.concatenate(_fields(part), axis=2)[: part.rows].reshape(part.rows, -1)


def _fields(part: PackedMatrix) -> list[Bytes]:
    """The fields of a block in their order, (rows, blocks, bytes) each."""
    name, pairs = part.format.name, _pairs(part.sections["hi"])
    if name in ("affine4_0", "table4_nl"):
        return [_bytes(part, "scales"), pairs]
    if name == "affine4_1":
        return [_bytes(part, "scales"), _halves(-unpack_lanes(part.sections["minima"])), pairs]
    if name == "table4_mx":
        return [unpack_lanes(part.sections["steps"]), pairs]
    steps = unpack_lanes(part.sections["steps"])
    if name == "affine4_k":
        by_super = steps.reshape(len(steps), -1, 8, 2)
        d, m = by_super[..., 0], by_super[..., 1]
        packed = [d[..., :4] | d[..., 4:] >> 4 << 6, m[..., :4] | m[..., 4:] >> 4 << 6, d[..., 4:] & 15 | m[..., 4:] << 4]
        groups = pairs.reshape(len(pairs), -1, 4, 2, 16)
        first, second = groups[..., 0, :], groups[..., 1, :]
        codes = np.concatenate([first & 15 | second << 4, first >> 4 | second & 0xF0], axis=3)
        return [_bytes(part, "scales"), _bytes(part, "minima"), *packed, codes.reshape(len(codes), -1, 128)]
    if name == "table4_xs":
        codes6 = (steps.reshape(len(steps), -1, 8).astype(np.int16) + 32).astype(np.uint16)
        high = (codes6 >> 4 << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=2, dtype=np.uint16)
        low = (codes6[..., ::2] & 15 | (codes6[..., 1::2] & 15) << 4).astype(np.uint8)
        codes = pairs.reshape(len(pairs), -1, 128)
        return [_bytes(part, "scales"), high.astype("<u2")[:, :, None].view(np.uint8), low, codes]
    return _six_bits(part, steps)


def _six_bits(part: PackedMatrix, steps: NDArray) -> list[Bytes]:
    unsigned = part.nibbles << 2 | unpack_pairs(part.sections["lo"])
    runs = unsigned.reshape(len(unsigned), -1, 2, 4, 32)  # of 256 columns: two halves of four runs
    low = (runs[:, :, :, :2] & 15) | (runs[:, :, :, 2:] & 15) << 4
    high = (runs >> 4 << np.array([0, 2, 4, 6], np.uint8)[:, None]).sum(axis=3, dtype=np.uint8)
    rows, count = runs.shape[:2]
    scales = steps.view(np.uint8).reshape(rows, count, 16)
    return [low.reshape(rows, count, 128), high.reshape(rows, count, 64), scales, _bytes(part, "scales")]


def _pairs(plane: Bytes) -> Bytes:
    """A plane as bytes of the column pairs (c, c + 16), (rows, groups, 16)."""
    blocks, groups, _ = plane.shape
    words = plane.view("<u4").reshape(blocks, groups, 4, BLOCK_ROWS).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(words).view(np.uint8).reshape(blocks * BLOCK_ROWS, groups, 16)


def _bytes(part: PackedMatrix, section: str) -> Bytes:
    return _halves(unpack_lanes(part.sections[section]))


def _halves(values: NDArray[np.float16]) -> Bytes:
    return np.ascontiguousarray(values).astype("<f2", copy=False).view(np.uint8)
