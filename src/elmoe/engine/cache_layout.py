"""How the layers of a model share pages of the cache: in groups, each with pages of its own for the same positions.

Layers that see all positions keep all pages; those with a window let go of the pages that no token to come will see. So that
a page of any group can serve any other, all have the same size: a group has as many layers as divide every kind's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import gcd

import numpy as np
from numpy.typing import NDArray

from elmoe.models.spec import GroupedAttention, LayerSpec, ModelSpec

PAGE_POSITIONS = 64
"""Positions per page, a multiple of 16 (the kernels' block)."""


@dataclass(frozen=True, eq=False)
class CacheLayout:
    """``windows``: positions that the layers of each group see, None for all. ``layers``: of a group. ``places``: (layers of
    the model, 2) group and place in a page, None where there is one group. ``page_bytes``: of one page of a group."""

    windows: tuple[int | None, ...]
    layers: int
    places: NDArray[np.int32] | None
    page_bytes: int

    @property
    def groups(self) -> int:
        """Pages of a stretch of ``PAGE_POSITIONS`` positions."""
        return len(self.windows)

    @property
    def stretch_bytes(self) -> int:
        """Bytes of the pages of a stretch."""
        return self.groups * self.page_bytes

    @property
    def windowed(self) -> list[int]:
        """Groups of layers whose pages are let go."""
        return [group for group, window in enumerate(self.windows) if window is not None]

    def first_seen(self, group: int, computed: int) -> int:
        """The first position that a token at position ``computed`` or later sees in the layers of a group."""
        window = self.windows[group]
        return 0 if window is None else max(0, computed + 1 - window)

    def pages(self, positions: int, at_once: int) -> int:
        """Most pages that a sequence of so many positions holds, of which at most ``at_once`` are computed in a step."""
        stretches, total = pages_for(positions), 0
        for window in self.windows:
            total += stretches if window is None else min(stretches, pages_for(window - 1 + at_once) + 1)
        return total


def window_of(layer: LayerSpec) -> int | None:
    """Positions that a token sees in a layer; None is all."""
    return layer.attention.window if isinstance(layer.attention, GroupedAttention) else None


def layout_of(spec: ModelSpec) -> CacheLayout:
    """The layout of a model's cache."""
    kinds: dict[int | None, list[int]] = {}
    for index, layer in enumerate(spec.layers):
        kinds.setdefault(window_of(layer), []).append(index)
    size = reduce(gcd, map(len, kinds.values()))
    page_bytes = PAGE_POSITIONS * spec.kv_bytes_per_position * size // len(spec.layers)
    if len(kinds) == 1:
        return CacheLayout(tuple(kinds), size, None, page_bytes)
    windows: list[int | None] = []
    places = np.empty((len(spec.layers), 2), np.int32)
    for window, layers in kinds.items():
        for order, index in enumerate(layers):
            places[index] = len(windows) + order // size, order % size
        windows += [window] * (len(layers) // size)
    return CacheLayout(tuple(windows), size, places, page_bytes)


def pages_for(positions: int) -> int:
    """Stretches of ``PAGE_POSITIONS`` that hold ``positions`` positions."""
    return -(-positions // PAGE_POSITIONS)
