"""Six bits as planes of 4 and 2: ``w = d * sc * q``, ``q`` in -32..31, GGUF's Q6_K in another layout.

``u = q + 32`` is cut into ``hi = u >> 2`` (the MSB slice) and ``lo = u & 3`` (the LSB slice). d is fp16 for 8 groups of 32,
sc an int8 for 16 columns. A draft reads ``hi`` alone and puts 2 below it, half of what is missing, as ``nested8`` does (in
general its offset divided by 4, rounded down).

A group adds to the chain ``float(sc0 * dot0 + sc1 * dot1) * (d * sx)``: dot0 and dot1 are over the first and the last 16
columns; the integer is at most 2 * 128 * 16 * 32 * 127, below 2^24, so its float is exact.

Sections: ``hi``, a plane of nibbles; ``lo`` (blocks, groups, 128): byte ``64 * v + 4 * n + i`` (v in 0..1, n in 0..15, i in
0..3) holds row n of the block, from the lowest bits up: columns ``8 * v + i``, ``16 + 8 * v + i``, ``8 * v + 4 + i``,
``16 + 8 * v + 4 + i`` of the group; ``scales`` d; ``steps``: of each group 16 times sc0, then 16 times sc1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.formats.packing import (
    PackedMatrix,
    check_finite,
    group_dots,
    half_scales,
    pack_codes,
    pack_lanes,
    padded_rows,
    rows_by_group,
)
from elmoe.bitslice.matmul import Activations
from elmoe.bitslice.nested import BLOCK_ROWS, GROUP
from elmoe.errors import NumericsError
from elmoe.models.formats import SUPER

HALF = GROUP // 2


def pack_pairs(pairs: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two bits of every weight (rows, groups * 32) to a plane (blocks, groups, 128)."""
    padded = padded_rows(pairs)
    rows, columns = padded.shape
    # axes: block, row n, group, half, v, vector of v, i
    parts = padded.reshape(rows // BLOCK_ROWS, BLOCK_ROWS, columns // GROUP, 2, 2, 2, 4)
    packed = (
        parts[:, :, :, 0, :, 0] | parts[:, :, :, 1, :, 0] << 2 | parts[:, :, :, 0, :, 1] << 4 | parts[:, :, :, 1, :, 1] << 6
    )
    return np.ascontiguousarray(packed.transpose(0, 2, 3, 1, 4)).reshape(rows // BLOCK_ROWS, columns // GROUP, 128)


def unpack_pairs(plane: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The inverse of :func:`pack_pairs`."""
    blocks, groups, _ = plane.shape
    packed = plane.reshape(blocks, groups, 2, BLOCK_ROWS, 4).transpose(0, 3, 1, 2, 4)
    parts = np.stack(
        [np.stack([packed & 3, packed >> 4 & 3], axis=4), np.stack([packed >> 2 & 3, packed >> 6], axis=4)], axis=3
    )
    return parts.reshape(blocks * BLOCK_ROWS, groups * GROUP)


@dataclass(frozen=True, eq=False)
class PlanesMatrix(PackedMatrix):
    """See the module."""

    format_names = ("planes6",)

    @classmethod
    def from_codes(cls, columns: int, codes: NDArray[np.int8], scales: NDArray[np.float16], steps: NDArray[np.int8]) -> Self:
        """Pack codes (rows, groups * 32), scales (rows, supers) and steps (rows, groups, 2)."""
        unsigned = (codes.astype(np.int16) + 32).astype(np.uint8)
        upper: NDArray[np.uint8] = unsigned >> np.uint8(2)
        lower: NDArray[np.uint8] = unsigned & np.uint8(3)
        return cls.of(
            "planes6", len(codes), columns, hi=pack_codes(upper), lo=pack_pairs(lower),
            scales=pack_lanes(scales), steps=pack_lanes(steps),
        )  # fmt: skip

    def _values(self, draft: bool, offset: float = 8.0) -> NDArray[np.float32]:
        """Integers (blocks * 16, groups, 2, 16) that are multiplied."""
        upper = self.nibbles.astype(np.int16) * 4 - 32
        if draft:
            return (upper + int(offset // 4)).astype(np.float32).reshape(len(upper), -1, 2, HALF)
        if "lo" not in self.sections:
            raise NumericsError("the LSB slice is not at hand")
        return (upper + unpack_pairs(self.sections["lo"])).astype(np.float32).reshape(len(upper), -1, 2, HALF)

    def dequantize(self, draft: bool = False) -> NDArray[np.float32]:
        """See ``PackedMatrix``."""
        scales = self.by_group("scales") * self.by_group("steps")
        values = self._values(draft) * scales[:, :, :, None]
        return self._cut(values.reshape(len(values), -1, GROUP))

    def matmul(self, x: Activations, draft: bool, offset: float) -> NDArray[np.float32]:
        """See ``PackedMatrix``."""
        values, steps, scales = self._values(draft, offset), self.by_group("steps"), self.by_group("scales")[:, :, 0]
        dots = group_dots(x, values.reshape(len(values), -1, HALF), HALF)
        result = np.zeros((len(x.codes), len(values)), np.float32)
        for group in range(self.groups):
            whole = steps[None, :, group, 0] * dots[2 * group] + steps[None, :, group, 1] * dots[2 * group + 1]
            result = result + whole * (scales[None, :, group] * x.scales[:, group, None])
        return result

    @classmethod
    def from_weights(cls, name: str, weights: NDArray[np.float32], tensor: str = "weight") -> Self:
        """The weight of the largest magnitude of 16 becomes -32."""
        check_finite(weights, tensor)
        halves = rows_by_group(weights, SUPER).reshape(len(weights), -1, HALF)
        place = np.abs(halves).argmax(axis=2)[:, :, None]
        wanted = np.take_along_axis(halves, place, axis=2)[:, :, 0] / np.float32(-32)
        supers = wanted.reshape(len(wanted), -1, 2 * SUPER)
        most = np.take_along_axis(supers, np.abs(supers).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        scales = half_scales(most / np.float32(-128), tensor)
        wide = np.repeat(scales.astype(np.float32), 2 * SUPER, axis=1)
        steps = np.clip(np.rint(np.divide(wanted, wide, out=np.zeros_like(wanted), where=wide != 0)), -128, 127)
        actual = np.broadcast_to((wide * steps)[:, :, None], halves.shape)
        ratio = np.divide(halves, actual, out=np.zeros_like(halves), where=actual != 0)
        codes = np.clip(np.rint(ratio), -32, 31).astype(np.int8).reshape(len(weights), -1)
        groups = -(-weights.shape[1] // GROUP)
        by_group = steps.astype(np.int8).reshape(len(weights), -1, 2)
        return cls.from_codes(weights.shape[1], codes[:, : groups * GROUP], scales, by_group[:, :groups])
