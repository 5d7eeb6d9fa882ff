"""Four bits with a scale and a minimum: ``w = S * u - M``, ``u`` in 0..15, for groups of 32.

``affine4_0``: M = 8 * S, and the zero point 8 is subtracted inside the integer dot; S is fp16 and may be negative (GGUF's
Q4_0). ``affine4_1``: S and M are fp16 (Q4_1, whose minimum is -M). ``affine4_k``: ``S = d * sc`` and ``M = dmin * m`` with
fp16 d and dmin for 8 groups and bytes sc and m, exact in float32 (Q4_K).

A group adds to the chain ``float(dot) * (S * sx) - M * (sx * float(sum x))``, the difference rounded once before it is
added; in ``affine4_0`` it adds ``float(dot - 8 * sum x) * (S * sx)``. Sections: ``hi`` (the codes as a plane of nibbles),
``scales``, ``minima``, ``steps`` (16 times sc, then 16 times m, for each group).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.formats.packing import (
    PackedMatrix,
    check_finite,
    code_sums,
    group_dots,
    half_scales,
    pack_codes,
    pack_lanes,
    rows_by_group,
)
from elmoe.bitslice.matmul import Activations
from elmoe.bitslice.nested import GROUP
from elmoe.models.formats import SUPER

ZERO_POINT = 8
LARGEST_STEP = 63
"""Of sc and m where weights are quantised here, so that Q4_K can hold them."""


@dataclass(frozen=True, eq=False)
class AffineMatrix(PackedMatrix):
    """See the module."""

    format_names = ("affine4_0", "affine4_1", "affine4_k")

    @property
    def _scales(self) -> NDArray[np.float32]:
        """S of every row and group."""
        scales = self.by_group("scales")[:, :, 0]
        return scales * self.by_group("steps")[:, :, 0] if "steps" in self.sections else scales

    @property
    def _minima(self) -> NDArray[np.float32] | None:
        """M of every row and group; None where the zero point is 8."""
        if "minima" not in self.sections:
            return None
        minima = self.by_group("minima")[:, :, 0]
        return minima * self.by_group("steps")[:, :, 1] if "steps" in self.sections else minima

    def dequantize(self, draft: bool = False) -> NDArray[np.float32]:
        """See ``PackedMatrix``; a draft reads the same bits."""
        codes = self.nibbles.astype(np.float32).reshape(-1, self.groups, GROUP)
        scales, minima = self._scales[:, :, None], self._minima
        if minima is None:
            return self._cut((codes - np.float32(ZERO_POINT)) * scales)
        return self._cut(codes * scales - minima[:, :, None])

    def matmul(self, x: Activations, draft: bool, offset: float) -> NDArray[np.float32]:
        """See ``PackedMatrix``."""
        codes = self.nibbles.astype(np.float32).reshape(-1, self.groups, GROUP)
        scales, minima, sums = self._scales, self._minima, x.scales * code_sums(x)
        dots = group_dots(x, codes if minima is not None else codes - np.float32(ZERO_POINT))
        result = np.zeros((len(x.codes), len(codes)), np.float32)
        for group in range(self.groups):
            term = dots[group] * (scales[None, :, group] * x.scales[:, group, None])
            if minima is not None:
                term = term - minima[None, :, group] * sums[:, group, None]
            result = result + term
        return result

    @classmethod
    def from_weights(cls, name: str, weights: NDArray[np.float32], tensor: str = "weight") -> Self:
        """Between the least (at most 0) and the largest weight of a group in 15 steps; around 0 for ``affine4_0``."""
        check_finite(weights, tensor)
        grouped = rows_by_group(weights, SUPER if name == "affine4_k" else 1)
        groups = -(-weights.shape[1] // GROUP)
        if name == "affine4_0":
            # The weight of the largest magnitude becomes code 0, that is -8.
            place = np.abs(grouped).argmax(axis=2)[:, :, None]
            halves = half_scales(np.take_along_axis(grouped, place, axis=2)[:, :, 0] / np.float32(-8), tensor)
            wide = halves.astype(np.float32)
            codes = _nearest(grouped, wide, np.full_like(wide, ZERO_POINT) * wide)
            return cls.of(name, *weights.shape, hi=pack_codes(codes), scales=pack_lanes(halves))
        minima = -np.minimum(grouped.min(axis=2), 0)
        scales = (np.maximum(grouped.max(axis=2), 0) + minima) / np.float32(15)
        if name == "affine4_1":
            halves, least = half_scales(scales, tensor), half_scales(minima, tensor)
            codes = _nearest(grouped, halves.astype(np.float32), least.astype(np.float32))
            return cls.of(name, *weights.shape, hi=pack_codes(codes), scales=pack_lanes(halves), minima=pack_lanes(least))
        halves, scale_steps = _stepped(scales, tensor)
        least, minimum_steps = _stepped(minima, tensor)
        wide = np.repeat(halves.astype(np.float32), SUPER, axis=1) * scale_steps
        codes = _nearest(grouped, wide, np.repeat(least.astype(np.float32), SUPER, axis=1) * minimum_steps)
        steps = np.stack([scale_steps, minimum_steps], axis=2)[:, :groups]
        return cls.of(
            name, *weights.shape, hi=pack_codes(codes[:, : groups * GROUP]), scales=pack_lanes(halves),
            minima=pack_lanes(least), steps=pack_lanes(steps),
        )  # fmt: skip


def _stepped(values: NDArray[np.float32], tensor: str) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """(rows, supers) fp16 and (rows, groups) steps whose products are near to values that are not negative."""
    most = values.reshape(len(values), -1, SUPER).max(axis=2)
    halves = half_scales(most / np.float32(LARGEST_STEP), tensor)
    wide = np.repeat(halves.astype(np.float32), SUPER, axis=1)
    ratio = np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)
    return halves, np.clip(np.rint(ratio), 0, LARGEST_STEP).astype(np.uint8)


def _nearest(grouped: NDArray[np.float32], scales: NDArray[np.float32], minima: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Codes (rows, groups * 32) of the values nearest to the weights."""
    wide = np.broadcast_to(scales[:, :, None], grouped.shape)
    ratio = np.divide(grouped + minima[:, :, None], wide, out=np.zeros_like(grouped), where=wide != 0)
    return np.clip(np.rint(ratio), 0, 15).astype(np.uint8).reshape(len(grouped), -1)
