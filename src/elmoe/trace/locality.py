"""How local routing is: what is measured of facts, and the parameters of the synthesiser that reproduces it."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.files import whole_file
from elmoe.trace.facts import RoutingFacts
from elmoe.untrusted import decode_json, nearest, read_bytes, short

LOCALITY_VERSION = 2
"""Version 2 has agreement, model and the sources of statistics; files of version 1 are read."""
FILE_LIMIT, MAX_MARKS = 1 << 20, 1 << 28
PRESETS = Path(__file__).resolve().parent.parent / "presets" / "locality"
HOTTEST, LAGS, BATCHES = (0.10, 0.25, 0.50), (1, 4, 16), (2, 4, 8, 16)


class Statistic(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One number of a recording, or one that was published, and of the synthetic facts that stand for it."""

    name: str
    measured: float
    synthetic: float
    relative_error: float | None
    source: str | None = None

    @classmethod
    def of(cls, name: str, measured: float, synthetic: float, source: str | None = None) -> Statistic:
        """With the error relative to what was measured; None where that is 0."""
        error = round(synthetic / measured - 1, 5) if measured else None
        return cls(
            name=name, measured=round(measured, 5), synthetic=round(synthetic, 5), relative_error=error, source=source
        )  # fmt: skip

    @property
    def points(self) -> float:
        """The error in percentage points, where both numbers are shares."""
        return 100 * (self.synthetic - self.measured)


class FitShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a locality was fitted on; ``positions``: the most decoded in a sequence."""

    sequences: int
    positions: int
    layers: int
    experts: int
    top_k: int


class Locality(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of the latent scores by which synthetic facts rank experts; see :mod:`elmoe.trace.synthesis`.

    Standard deviations: ``popularity`` between the experts of a layer, ``sequence`` of what is fixed in a sequence,
    ``token`` of what decays from token to token by the factor ``correlation``. The variances of all but popularity sum to
    one; white ``noise`` takes what is left. ``agreement``: share of the variance of all but popularity that all sequences
    have in common; 0 is independent sequences, 1 makes them route alike. ``fit``: statistics that were matched; ``check``:
    others, which were not. ``model``: the one whose routing this is, None for a recording of any.

    :raises TraceError: a parameter is out of range.
    """

    popularity: float
    sequence: float
    token: float
    correlation: float
    source: str
    status: Literal["derived", "assumed"] = "assumed"
    version: int = LOCALITY_VERSION
    model: str | None = None
    agreement: float = 0.0
    shape: FitShape | None = None
    fit: tuple[Statistic, ...] = ()
    check: tuple[Statistic, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.popularity <= 10:
            raise TraceError(f"popularity is {self.popularity}, allowed is 0..10")
        for name in ("sequence", "token", "correlation", "agreement"):
            if not 0 <= getattr(self, name) <= 1:
                raise TraceError(f"{name} is {getattr(self, name)}, allowed is 0..1")
        if self.sequence**2 + self.token**2 > 1 + 1e-9:
            raise TraceError("the squares of sequence and token sum to more than 1", "lower one of them")

    @property
    def noise(self) -> float:
        """Standard deviation of what is new in every token."""
        return math.sqrt(max(0.0, 1 - self.sequence**2 - self.token**2))


def save_locality(locality: Locality, path: str | Path) -> None:
    """Write JSON; TraceError if it cannot be written."""
    write_json(path, msgspec.json.format(msgspec.json.encode(locality), indent=1))


def load_locality(name_or_path: str | Path, further: tuple[str, ...] = ()) -> Locality:
    """A file of ``elmoe trace fit``, or a preset by its name: a prompt set such as ``mt_bench``, or a model.

    :param further: other names that the caller knows, for the hint.
    :raises TraceError: there is none, or it is no locality.
    """
    hint = "write one with `elmoe trace fit`"
    path, raw = read_json(name_or_path, PRESETS, "locality", hint, further=further)
    locality = decode_json(raw, str(path), Locality, TraceError, "no locality", "write it anew with `elmoe trace fit`")
    if not 1 <= locality.version <= LOCALITY_VERSION:
        raise TraceError(
            f"'{path}' has version {locality.version}, this elmoe reads up to {LOCALITY_VERSION}", "update elmoe"
        )
    return locality


def read_json(
    name_or_path: str | Path, presets: Path, kind: str, hint: str, limit: int = FILE_LIMIT, further: tuple[str, ...] = ()
) -> tuple[Path, bytes]:  # fmt: skip
    """The bytes of a preset, if one has this name, or else of a file; TraceError without one or above ``limit`` bytes.
    ``further``: names that are neither, but may be meant."""
    preset = presets / f"{name_or_path}.json"
    path = preset if preset.parent == presets and os.path.isfile(preset) else Path(name_or_path)
    if not str(name_or_path) or not os.path.lexists(path):
        names = [*further, *sorted(file.stem for file in presets.glob("*.json"))]
        hint += f", or take a preset: {', '.join(names)}" if names else ""
        raise TraceError(f"there is no {kind} '{short(name_or_path)}'", nearest(name_or_path, names, hint))
    return path, read_bytes(path, TraceError, limit, kind, hint)


def write_json(path: str | Path, data: bytes) -> None:
    """Write a small file; it appears when it is whole. TraceError if it cannot be written."""
    with whole_file(path, TraceError) as partial:
        partial.write_bytes(data + b"\n")


def membership(chosen: NDArray, computed: NDArray[np.bool_], experts: int) -> NDArray[np.bool_]:
    """(sequences, positions, layers, k) ids as (sequences, positions, layers, experts) marks; none where not computed."""
    marks = np.zeros((*chosen.shape[:3], experts), bool)
    np.put_along_axis(marks, chosen.astype(np.intp), True, axis=3)
    marks &= computed[:, :, None, None]
    return marks


def measured(facts: RoutingFacts) -> dict[str, float]:
    """Statistics of facts by name, those that their size allows, over all positions (see ``RoutingFacts.decoding``).

    ``hottest N %``: share of the routing that a layer's most used N % of experts take. ``reuse at N``: share of a token's
    experts that the N-th token before it used too. ``distinct in N``: experts that N sequences use at the same step over the
    most they could (N top-k), a mean over steps and layers. Facts of more than ``MAX_MARKS`` (sequence, position, layer,
    expert) are judged by as many of their layers, evenly spaced.
    """
    sequences, positions, layers, _ = facts.ranked.shape
    count = max(1, min(layers, MAX_MARKS // (sequences * positions * facts.experts)))
    chosen = facts.chosen if count == layers else facts.chosen[:, :, np.arange(count) * layers // count]
    return statistics_of(membership(chosen, facts.computed, facts.experts), facts.computed, facts.top_k)


def statistics_of(marks: NDArray[np.bool_], computed: NDArray[np.bool_], top_k: int) -> dict[str, float]:
    """See :func:`measured`; ``marks`` as of :func:`membership`, ``computed`` (sequences, positions)."""
    sequences, positions, layers, experts = marks.shape
    use = np.sort(marks.sum(axis=(0, 1)), axis=1)[:, ::-1]
    covered = np.concatenate([np.zeros((layers, 1)), np.cumsum(use, axis=1) / use.sum(axis=1, keepdims=True)], axis=1)
    curve, found = covered.mean(axis=0), {}
    for share in HOTTEST:
        found[f"hottest {100 * share:g} %"] = float(np.interp(share * experts, np.arange(experts + 1), curve))
    for lag in LAGS:
        pairs = int((computed[:, lag:] & computed[:, :-lag]).sum())
        if pairs:
            again = np.count_nonzero(marks[:, lag:] & marks[:, :-lag])
            found[f"reuse at {lag}"] = float(again / (pairs * layers * top_k))
    for batch in BATCHES:
        groups = sequences // batch
        whole = computed[: groups * batch].reshape(groups, batch, positions).sum(axis=1) == batch
        if whole.any():
            together = marks[: groups * batch].reshape(groups, batch, positions, layers, experts)
            union: NDArray[np.bool_] = np.logical_or.reduce(together, axis=1)
            most = int(whole.sum()) * layers * batch * top_k
            found[f"distinct in {batch}"] = float(np.count_nonzero(union[whole]) / most)
    return found
