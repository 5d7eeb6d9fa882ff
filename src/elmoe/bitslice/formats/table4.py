"""Four bits that name one of 16 integers: ``w = s * table[u]`` for groups of 32.

``table4_nl``: the table of GGUF's IQ4_NL, s is fp16. ``table4_xs``: the same table, ``s = d * step`` with fp16 d for 8
groups and an int8 step, exact in float32 (IQ4_XS). ``table4_mx``: twice the values of e2m1, ``s = 2^(e - 128)`` with a byte
e (MXFP4); e = 255, which means NaN, is refused.

A group adds to the chain ``float(dot) * (s * sx)``. Sections: ``hi`` (the codes as a plane of nibbles), ``scales``,
``steps``.
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
    rows_by_group,
    unpack_lanes,
)
from elmoe.bitslice.matmul import Activations
from elmoe.bitslice.nested import GROUP
from elmoe.errors import NumericsError
from elmoe.models.formats import SUPER

NONLINEAR = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
NOT_A_NUMBER = 255
"""The E8M0 scale that is refused."""


def power_scales(exponents: NDArray[np.uint8]) -> NDArray[np.float32]:
    """``2^(e - 128)`` as float32, subnormal for e of 0 and 1."""
    e = exponents.astype(np.uint32)
    return np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (np.maximum(e, 1) - 1) << 23).astype("<u4").view("<f4")


@dataclass(frozen=True, eq=False)
class TableMatrix(PackedMatrix):
    """See the module."""

    format_names = ("table4_nl", "table4_xs", "table4_mx")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format.name == "table4_mx" and (self.sections["steps"] == NOT_A_NUMBER).any():
            raise NumericsError("an E8M0 scale is 255, which means NaN", "download the checkpoint anew")

    @property
    def table(self) -> NDArray[np.int8]:
        """The 16 integers."""
        return E2M1 if self.format.name == "table4_mx" else NONLINEAR

    @property
    def _scales(self) -> NDArray[np.float32]:
        """s of every row and group."""
        if "scales" not in self.sections:
            return power_scales(unpack_lanes(self.sections["steps"])[:, :, 0])
        scales = self.by_group("scales")[:, :, 0]
        return scales * self.by_group("steps")[:, :, 0] if "steps" in self.sections else scales

    def _values(self) -> NDArray[np.float32]:
        return self.table.astype(np.float32)[self.nibbles].reshape(-1, self.groups, GROUP)

    def dequantize(self, draft: bool = False) -> NDArray[np.float32]:
        """See ``PackedMatrix``; a draft reads the same bits. The largest powers of two overflow to infinity."""
        with np.errstate(over="ignore"):
            return self._cut(self._values() * self._scales[:, :, None])

    def matmul(self, x: Activations, draft: bool, offset: float) -> NDArray[np.float32]:
        """See ``PackedMatrix``."""
        values, scales = self._values(), self._scales
        dots = group_dots(x, values)
        result = np.zeros((len(x.codes), len(values)), np.float32)
        for group in range(self.groups):
            result = result + dots[group] * (scales[None, :, group] * x.scales[:, group, None])
        return result

    @classmethod
    def from_weights(cls, name: str, weights: NDArray[np.float32], tensor: str = "weight") -> Self:
        """The weight of the largest magnitude becomes an end of the table, the others what is nearest in it."""
        check_finite(weights, tensor)
        grouped = rows_by_group(weights, SUPER if name == "table4_xs" else 1)
        groups = -(-weights.shape[1] // GROUP)
        if name == "table4_mx":
            _, exponent = np.frexp(np.abs(grouped).max(axis=2))  # absmax = m * 2^exponent, m in [1/2, 1)
            steps = np.clip(exponent - 3 + 127, 0, 254).astype(np.uint8)
            codes = _nearest(grouped, power_scales(steps), E2M1)
            return cls.of(name, *weights.shape, hi=pack_codes(codes), steps=pack_lanes(steps))
        place = np.abs(grouped).argmax(axis=2)[:, :, None]
        scales = np.take_along_axis(grouped, place, axis=2)[:, :, 0] / np.float32(NONLINEAR[0])
        if name == "table4_nl":
            halves = half_scales(scales, tensor)
            codes = _nearest(grouped, halves.astype(np.float32), NONLINEAR)
            return cls.of(name, *weights.shape, hi=pack_codes(codes), scales=pack_lanes(halves))
        most = np.abs(scales).reshape(len(scales), -1, SUPER).max(axis=2)
        halves = half_scales(most / np.float32(31), tensor)  # IQ4_XS has steps of -32..31
        wide = np.repeat(halves.astype(np.float32), SUPER, axis=1)
        ratio = np.divide(scales, wide, out=np.zeros_like(scales), where=wide != 0)
        steps = np.clip(np.rint(ratio), -32, 31).astype(np.int8)
        codes = _nearest(grouped, wide * steps, NONLINEAR)
        return cls.of(
            name, *weights.shape, hi=pack_codes(codes[:, : groups * GROUP]), scales=pack_lanes(halves),
            steps=pack_lanes(steps[:, :groups]),
        )  # fmt: skip


def _nearest(grouped: NDArray[np.float32], scales: NDArray[np.float32], table: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes (rows, groups * 32) of the table's values nearest to the weights."""
    order = np.argsort(table, kind="stable")
    values = table[order].astype(np.float32)
    wide = np.broadcast_to(scales[:, :, None], grouped.shape)
    ratio = np.divide(grouped, wide, out=np.zeros_like(grouped), where=wide != 0)
    found = np.searchsorted((values[1:] + values[:-1]) / np.float32(2), ratio.reshape(-1))
    return order[found].astype(np.uint8).reshape(len(grouped), -1)
