"""Temporary."""

from elmoe.schema.hardware import Memory


def efficiency_of(memory: Memory) -> float:
    """Share of the peak."""
    return 1.0 if memory.efficiency is None else memory.efficiency.value
