"""Weights of other types as ``nested8``: what a GGUF type stands for, and what is lost when it is quantised anew.

Until the store holds more formats, every type but Q8_0 goes through float32.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import quants
from numpy.typing import NDArray

from elmoe.bitslice.nested import GROUP

REQUANTISED = tuple(
    TensorType[name]
    for name in (
        "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "IQ2_XXS",
        "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0",
    )
)  # fmt: skip
"""Quantised types that are read by what they stand for."""
SAMPLED = 32
"""Rows of each piece in which the loss is measured: all of them would take as long as the quantisation."""


def dequantised(rows: NDArray[np.uint8], kind: TensorType) -> NDArray[np.float32]:
    """Rows of a quantised type, (rows, bytes), as the float32 values they stand for."""
    with np.errstate(all="ignore"):  # a damaged scale may be anything: whoever quantises the values refuses it
        return quants.dequantize(rows, kind)


class Losses:
    """Energy of weights and of what quantising them anew lost, by type."""

    def __init__(self) -> None:
        self._energy: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._names: dict[str, set[str]] = defaultdict(set)

    def note(
        self, kind: str, name: str, values: NDArray[np.float32], codes: NDArray[np.int8], scales: NDArray[np.float16]
    ) -> None:
        """A piece of the tensor ``name`` has become these codes and scales."""
        sample = values[:SAMPLED].astype(np.float64)
        stored = codes[:SAMPLED] * np.repeat(scales[:SAMPLED].astype(np.float64), GROUP, axis=1)[:, : codes.shape[1]]
        self._energy[kind][0] += float(np.square(sample).sum())
        self._energy[kind][1] += float(np.square(stored[:, : sample.shape[1]] - sample).sum())
        self._names[kind].add(name)

    def lines(self) -> tuple[str, ...]:
        """A line for each type."""
        lines = []
        for kind, (signal, noise) in sorted(self._energy.items()):
            count, exact = len(self._names[kind]), noise == 0 or signal == 0
            error = "no error" if exact else f"an error of {10 * np.log10(noise / signal):.1f} dB"
            lines.append(f"{count} tensor{'s' * (count > 1)} of type {kind} quantised anew to 8 bits, with {error}")
        return tuple(lines)
