"""What a conversion takes, before it begins: seconds by the kind of weights, memory by the largest record."""

from __future__ import annotations

from elmoe.models.spec import ModelSpec
from elmoe.models.tensors import Formats, feed_forwards, tensors
from elmoe.store.layout import record_sections

EXACT, FLOATS, REQUANTISED = 5e-9, 12e-9, 50e-9
"""Seconds of a weight on one core of a server: codes that are reordered, floats that are quantised, codes that become floats
before."""
BASE_MEMORY, PIECE_MEMORY = 160 << 20, 128 << 20
"""Bytes of the program, and of a piece of rows while it is quantised."""


def weights_of(spec: ModelSpec) -> int:
    """How many weights a store of the model holds in matrices."""
    count = sum(tensor.shape[0] * tensor.shape[1] for tensor in tensors(spec) if tensor.kind == "matrix")
    parts = feed_forwards(spec)
    return count + sum(3 * part.count * part.hidden * part.width for part in parts)


def conversion_seconds(floats: int, exact: int = 0, requantised: int = 0) -> float:
    """About how long so many weights take."""
    return EXACT * exact + FLOATS * floats + REQUANTISED * requantised


def conversion_memory(spec: ModelSpec, formats: Formats) -> int:
    """About how much memory: the largest feed-forward as codes, twice, beside a piece of rows."""
    parts = feed_forwards(spec)
    largest = max(sum(record_sections(part, part.format(formats)).values()) for part in parts)
    return BASE_MEMORY + PIECE_MEMORY + 3 * largest
