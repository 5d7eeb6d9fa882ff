"""Which formats the tensors of a conversion get, and what of them is lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf, log10

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix
from elmoe.errors import ConvertError
from elmoe.models.formats import CHOICES, FORMATS, JOIN, joined_formats
from elmoe.models.tensors import PROJECTIONS

KINDS = ("experts", "matrices")
"""What a format may be chosen for: routed experts, and all other matrices."""
SAMPLED_ROWS = 16
"""Rows of every piece of a tensor that the error is measured on."""


@dataclass(frozen=True)
class FormatChoice:
    """Formats that the user asks for; None takes what is exact, or nearest."""

    experts: str | None = None
    matrices: str | None = None

    @classmethod
    def parse(cls, texts: Iterable[str]) -> FormatChoice:
        """Of ``FORMAT`` (for all matrices) or ``KIND=FORMAT``; that of experts may be three, joined by ``+``, for gate, up
        and down. ConvertError lists what there is."""
        chosen: dict[str, str] = {}
        for text in texts:
            kind, equals, name = text.rpartition("=")
            names = [CHOICES.get(one, one) for one in name.split(JOIN)]
            if len(names) not in ((1, len(PROJECTIONS)) if kind == "experts" else (1,)):
                raise ConvertError(
                    f"'{text[:60]}' gives {len(names)} formats", "give one, or for experts three: experts=GATE+UP+DOWN"
                )
            if not set(names) <= set(FORMATS) or (equals and kind not in KINDS):
                known = ", ".join([*CHOICES, *(one for one in FORMATS if one not in CHOICES)])
                raise ConvertError(f"there is no format '{text[:60]}'", f"give {known}, or experts=..., matrices=...")
            name = joined_formats(names)
            chosen |= {kind: name} if equals else dict.fromkeys(KINDS, name)
        return cls(**chosen)


@dataclass
class _Loss:
    tensors: set[str] = field(default_factory=set)
    signal: float = 0.0
    noise: float = 0.0


class Losses:
    """What became of tensors, by their type in the source and their format in the store."""

    def __init__(self) -> None:
        self._by_kind: dict[tuple[str, str], _Loss] = {}

    def exact(self, kind: str, format: str, tensor: str) -> None:
        """A tensor's values are in the store as they were."""
        self._by_kind.setdefault((kind, format), _Loss()).tensors.add(tensor)

    def quantised(self, kind: str, format: str, tensor: str, weights: NDArray[np.float32], matrix: QuantizedMatrix) -> None:
        """Rows of a tensor were quantised; the error is that of the first ``SAMPLED_ROWS`` of them."""
        loss = self._by_kind.setdefault((kind, format), _Loss())
        loss.tensors.add(tensor)
        rows = min(SAMPLED_ROWS, len(weights))
        sample = weights[:rows].astype(np.float64)
        loss.signal += float((sample**2).sum())
        loss.noise += float(((sample - matrix.row_blocks(0, rows).dequantize()) ** 2).sum())

    def lines(self) -> list[str]:
        """One line for each type and format."""
        found = []
        for (kind, format), loss in sorted(self._by_kind.items()):
            decibel = inf if loss.noise == 0 else 10 * log10(loss.signal / loss.noise) if loss.signal else 0.0
            kept = "exact" if decibel == inf else f"{decibel:.1f} dB"
            tensors = f"{len(loss.tensors)} tensor{'s' if len(loss.tensors) != 1 else ''}"
            found.append(f"{kind} -> {format}: {kept} ({tensors})")
        return found
