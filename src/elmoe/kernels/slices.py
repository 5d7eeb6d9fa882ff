"""The door to the enforced tier's native mechanism (declared in native/expert_slices.hpp)."""

from elmoe._native import ExpertArena, ExpertSlices, SliceReadFailure  # noqa: TID251 - this package is the door

MSB, LSB = 0, 1
"""Kinds of slices."""

__all__ = ["LSB", "MSB", "ExpertArena", "ExpertSlices", "SliceReadFailure"]
