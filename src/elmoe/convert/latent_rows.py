"""Parts of the projection from latents to keys and values, which checkpoints and older GGUF files hold as one tensor: of
each head first the rows of its keys, then those of its values. A store has the keys' part transposed, so that it is grouped
along the dimensions of a head's query."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.models.spec import LatentAttention, ModelSpec

KEYS, VALUES = "key_up", "value_up"
ROLES = (KEYS, VALUES)
"""Roles of the parts."""


@dataclass(frozen=True)
class FusedRows:
    """Where the rows of the parts are in the whole."""

    heads: int
    rank: int
    plain: int
    value: int

    @classmethod
    def of(cls, spec: ModelSpec) -> FusedRows:
        """Of a model of latent attention, which is alike in all layers."""
        attention = spec.layers[0].attention
        assert isinstance(attention, LatentAttention)
        return cls(attention.heads, attention.latent_rank, attention.plain_dim, attention.value_dim)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of the whole."""
        return self.heads * (self.plain + self.value), self.rank

    def value_spans(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """Rows of the whole that are rows [first, last) of the values' part, head by head."""
        for head in range(first // self.value, -(-last // self.value)):
            start, before = head * (self.plain + self.value) + self.plain, head * self.value
            yield start + max(first - before, 0), start + min(last - before, self.value)

    def keys(self, read: Callable[[int, int], NDArray[np.float32]], first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) of the keys' part. ``read`` gives rows of the whole as floats."""
        found = []
        for head in range(first // self.rank, -(-last // self.rank)):
            start, before = head * (self.plain + self.value), head * self.rank
            columns = slice(max(first - before, 0), min(last - before, self.rank))
            found.append(read(start, start + self.plain)[:, columns].T)
        return np.ascontiguousarray(np.concatenate(found))
