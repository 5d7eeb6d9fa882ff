"""What others have published of a model's routing locality: every number with what was measured, how, and where it stands.

A file per model in ``presets/published``; ``bench/model_locality.py`` fits a locality to the points for ``fit`` and judges
it by the points that are held out. Knows nothing of how a synthetic text is measured (:mod:`elmoe.trace.protocols`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from elmoe.errors import TraceError
from elmoe.trace.locality import read_json
from elmoe.untrusted import decode_json

PUBLISHED_VERSION = 1
PRESETS = Path(__file__).resolve().parent.parent / "presets" / "published"
Quantity = Literal["reuse", "window", "lru", "belady", "hottest", "touched", "static", "distinct"]
"""``reuse``: share of a token's experts that the token ``lag`` before used. ``window``: that any of the last ``lag`` tokens
used. ``lru``, ``belady``: hit rate of a cache of ``slots`` experts per layer, empty at the start of each sequence.
``hottest``: share of the routing that the most used ``share`` of the experts take. ``touched``: share of the experts that a
sequence uses at all. ``static``: share of the routing that the ``slots`` most used experts of ``lag`` other sequences take.
``distinct``: experts that ``lag`` sequences use at one step, over the most they could."""
NEEDS: dict[str, tuple[str, ...]] = {
    "reuse": ("lag",), "window": ("lag",), "lru": ("slots",), "belady": ("slots",), "hottest": ("share",), "touched": (),
    "static": ("slots", "lag"), "distinct": ("lag",),
}  # fmt: skip
"""Keys without which a quantity says nothing."""


class Point(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One published number; where it was published per text, all of them.

    ``values``: shares in 0..1; their mean is fitted or compared. ``use``: whether a fit may see it. ``tokens``: of a
    sequence. ``skip``: tokens at its start that were not counted. ``together``: the sequences are counted as one, over all
    their tokens. ``all_layers``: experts of all layers are ranked together. ``first_use_hits``: the first use of an expert
    counts as a hit while the cache has room. ``in_turn``: experts of a token are looked up and kept one after another, in
    place of all at once, which matters where a cache holds few more than one token uses. ``top_k``: experts per token where
    the model was run with others than its own. ``measured``: what exactly, on which prompts. ``status``: ``measured`` as a
    number, ``digitised`` from the vectors of a published figure, ``computed`` from published data.

    :raises TraceError: a value is no share, or what the quantity needs is missing.
    """

    name: str
    quantity: Quantity
    values: tuple[float, ...]
    use: Literal["fit", "held out"]
    tokens: int
    measured: str
    source: str
    status: Literal["measured", "digitised", "computed"] = "measured"
    slots: float | None = None
    share: float | None = None
    lag: int | None = None
    skip: int = 0
    together: bool = False
    all_layers: bool = False
    first_use_hits: bool = False
    in_turn: bool = False
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not self.values or not all(0 <= value <= 1 for value in self.values):
            raise TraceError(f"point '{self.name}': values must be shares in 0..1")
        missing = [key for key in NEEDS[self.quantity] if not getattr(self, key)]
        if missing:
            raise TraceError(f"point '{self.name}': a point of {self.quantity} needs {' and '.join(missing)}")
        for name in ("slots", "share", "lag", "top_k"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1 << 16:
                raise TraceError(f"point '{self.name}': {name} is {value}")
        if not 0 <= self.skip < self.tokens <= 1 << 16:
            raise TraceError(f"point '{self.name}': {self.skip} of {self.tokens} tokens cannot be skipped")
        if not self.source.strip() or not self.measured.strip():
            raise TraceError(f"point '{self.name}' has no source, or does not say what was measured")

    @property
    def value(self) -> float:
        """The mean of what was published."""
        return sum(self.values) / len(self.values)


class Published(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """All points of a model of ``experts`` per layer, ``top_k`` per token; ``model``: a preset of presets/models.

    :raises TraceError: two points have one name, or there is none for a fit.
    """

    model: str
    experts: int
    top_k: int
    points: tuple[Point, ...]
    version: int = PUBLISHED_VERSION

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        if len(set(names)) < len(names):
            raise TraceError(f"'{self.model}': two points have one name")
        if not 1 <= self.top_k < self.experts <= 1 << 14:
            raise TraceError(f"'{self.model}': top {self.top_k} of {self.experts} experts cannot be")
        if not self.fitted:
            raise TraceError(f"'{self.model}': no point is for a fit")

    @property
    def fitted(self) -> tuple[Point, ...]:
        """What a fit sees."""
        return tuple(point for point in self.points if point.use == "fit")

    @property
    def held_out(self) -> tuple[Point, ...]:
        """What a fit never sees."""
        return tuple(point for point in self.points if point.use == "held out")


def load_published(name_or_path: str | Path) -> Published:
    """A file of points, or those of a model by its preset's name; TraceError if there are none."""
    path, raw = read_json(name_or_path, PRESETS, "file of published points", "see presets/published")
    found = decode_json(raw, str(path), Published, TraceError, "no file of published points")
    if not 1 <= found.version <= PUBLISHED_VERSION:
        raise TraceError(f"'{path}' has version {found.version}, this elmoe reads up to {PUBLISHED_VERSION}", "update elmoe")
    return found


def published_models() -> tuple[str, ...]:
    """Models of which points are known."""
    return tuple(sorted(file.stem for file in PRESETS.glob("*.json")))
