"""Tables of the rotary embedding, plain and scaled, with the same bits everywhere.

Frequencies and angles are rounded to float32 as in transformers, so that a model sees the angles it was trained with.
"""

from __future__ import annotations

from math import ceil, floor, pi

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.arithmetic import exp64, log, sine_cosine

Frequencies = NDArray[np.float64]


def _log(x: float) -> float:
    return float(log(np.array([x], np.float64))[0])


def rotary_frequencies(dimensions: int, theta: float) -> Frequencies:
    """``theta^(-2i / dimensions)`` for each pair of dimensions."""
    log_theta = _log(theta)
    return np.array([exp64(-2.0 * i / dimensions * log_theta) for i in range(dimensions // 2)], np.float64)


def llama3_frequencies(frequencies: Frequencies, factor: float, low: float, high: float, original: int) -> Frequencies:
    """Llama 3.1's scaling: waves longer than ``original / low`` positions are stretched by ``factor``, those shorter than
    ``original / high`` are kept, and those between are a mixture."""
    turns = original * frequencies / (2 * pi)  # within the original context
    kept = (turns - low) / (high - low)
    mixed = (1 - kept) * frequencies / factor + kept * frequencies
    return np.where(turns < low, frequencies / factor, np.where(turns > high, frequencies, mixed))


def yarn_frequencies(
    frequencies: Frequencies, theta: float, factor: float, original: int, fast: float, slow: float, truncate: bool
) -> Frequencies:
    """YaRN (arXiv 2309.00071): pairs that turn more than ``fast`` times within ``original`` positions are kept, those that
    turn less than ``slow`` times are stretched by ``factor``, those between along a ramp over the pairs. ``truncate``: the
    ramp's ends are whole pairs."""
    dimensions = 2 * len(frequencies)

    def pair_with(turns: float) -> float:
        return dimensions * _log(original / (turns * 2 * pi)) / (2 * _log(theta))

    low, high = pair_with(fast), pair_with(slow)
    if truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, dimensions - 1)
    high += 0.001 if low == high else 0
    stretched = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0, 1)
    return frequencies / factor * stretched + frequencies * (1 - stretched)


def tables_of(
    positions: int, frequencies: Frequencies, factor: float = 1.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine tables (positions, pairs), both multiplied by ``factor`` (YaRN's attention factor)."""
    angles = np.arange(positions, dtype=np.float32)[:, None] * frequencies.astype(np.float32)[None, :]
    sine, cosine = (part.astype(np.float32) * np.float32(factor) for part in sine_cosine(angles.astype(np.float64)))
    return np.ascontiguousarray(cosine), np.ascontiguousarray(sine)


def rotary_tables(positions: int, head_dim: int, theta: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Cosine and sine tables (positions, head_dim / 2) for rotary embedding without a scaling."""
    return tables_of(positions, rotary_frequencies(head_dim, theta))
