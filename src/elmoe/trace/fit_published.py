"""Fitting a locality to published numbers, by simulation of how each was measured."""

from __future__ import annotations

import math
from itertools import product

import numpy as np

from elmoe.errors import TraceError
from elmoe.trace.fit import Point as Coordinates
from elmoe.trace.fit import search
from elmoe.trace.locality import FitShape, Locality, Statistic
from elmoe.trace.protocols import Synthetic
from elmoe.trace.published import Point, Published

FIT_SEED, CHECK_SEED = 20261130, 20261201
"""A fit reports what other random numbers than its own give."""
FIT_VALUES, CHECK_VALUES = 1 << 20, 1 << 23
"""Latent scores of a draw: a fit is content with few layers, what it reports is not."""
STARTS = ((0.2, 0.5), (0.3, 0.7), (0.3, 0.8), (0.7, 2.3))
STEPS = (0.2, 0.3, 0.2, 0.8)
LOW, HIGH = (0.0, 0.0, 0.0, 0.0), (0.95, 1.0, 1.0, 6.0)
ACROSS = ("static", "distinct")
MOST_POPULARITY = 10.0


def tells_sequences_apart(points: tuple[Point, ...]) -> bool:
    """Whether points say what sequences have in common: without, a fit takes the split as given."""
    return any(point.quantity in ACROSS or point.together for point in points)


def fit_published(published: Published, split: float | None = None) -> Locality:
    """The locality whose synthetic routing gives the published numbers that are for a fit.

    :param split: share of what is fixed in a text that all texts have in common, where no point tells.
    :raises TraceError: no point tells the split and none is given, or the other way round.
    """
    fitted = published.fitted
    if tells_sequences_apart(fitted) == (split is not None):
        told = "a point tells what sequences have in common" if split is not None else "no point tells"
        raise TraceError(f"'{published.model}': {told}", "give a split exactly where no point tells it")
    synthetic = Synthetic(published.experts, fitted, FIT_SEED, FIT_VALUES)
    wanted = [point.value for point in fitted]

    def misfit(coordinates: Coordinates) -> float:
        found = synthetic.measure(_locality(coordinates, split), published.top_k, fitted)
        return sum((one - other) ** 2 for one, other in zip(found, wanted, strict=True))

    start = min(product(*STARTS), key=misfit)
    best = search(misfit, start, STEPS, (LOW, HIGH))
    return judged(_locality(best, split), published, split)


def judged(locality: Locality, published: Published, split: float | None = None) -> Locality:
    """A locality with its errors on every published point, on other random numbers than a fit's."""
    points = published.points
    synthetic = Synthetic(published.experts, points, CHECK_SEED, CHECK_VALUES)
    found = synthetic.measure(locality, published.top_k, points)
    rows = {
        point.name: Statistic.of(point.name, point.value, value, point.source)
        for point, value in zip(points, found, strict=True)
    }
    return Locality(
        popularity=locality.popularity, sequence=locality.sequence, token=locality.token, correlation=locality.correlation,
        source=_told(published, split), status="derived", model=published.model,
        shape=FitShape(
            sequences=1, positions=max(point.tokens for point in points), layers=1, experts=published.experts,
            top_k=published.top_k,
        ),
        fit=tuple(rows[point.name] for point in published.fitted),
        check=tuple(rows[point.name] for point in published.held_out),
    )  # fmt: skip


def _told(published: Published, split: float | None) -> str:
    """How many numbers of how many repositories and papers, and what was assumed."""
    sources = len({point.source.split(" ")[0].split("@")[0].rstrip(",") for point in published.points})
    told = f"published: {published.model}, {len(published.points)} numbers of {sources} source{'s' if sources > 1 else ''}"
    return told if split is None else f"{told}; share of preferences that texts have in common assumed {split:.2f}"


def _locality(coordinates: Coordinates, split: float | None, source: str = "a try") -> Locality:
    """Coordinates of the search: share of all variance that is fixed in a text, share of this that texts have in common,
    share of the rest that decays, and -log of one minus the correlation."""
    fixed, common, decaying, slowness = (float(value) for value in coordinates)
    common = common if split is None else split
    scale = 1 - common * fixed  # the variance of all but popularity, which is one in a locality
    sequence = (1 - common) * fixed / scale
    token = math.floor(1e4 * math.sqrt((1 - sequence) * decaying)) / 1e4
    return Locality(
        popularity=min(MOST_POPULARITY, round(math.sqrt(common * fixed / scale), 4)),
        sequence=math.floor(1e4 * math.sqrt(sequence)) / 1e4, token=token,
        correlation=round(1 - math.exp(-slowness), 4), source=source,
    )  # fmt: skip


def common_share(locality: Locality) -> float:
    """Share of what is fixed in a text that all texts have in common."""
    fixed = locality.popularity**2 + locality.sequence**2
    return locality.popularity**2 / fixed if fixed else 0.0


def scaled(locality: Locality, strength: float) -> Locality:
    """All that is not white noise, times ``strength`` in standard deviation; the shape stays.

    :raises TraceError: the strength is not positive.
    """
    if not strength > 0:
        raise TraceError(f"a strength of {strength} cannot be", "give a positive one")
    parts = np.array([locality.popularity, locality.sequence, locality.token]) * strength
    rest = float(math.sqrt(parts[1] ** 2 + parts[2] ** 2 + locality.noise**2))
    popularity, sequence, token = (float(value) for value in parts / rest)
    return Locality(
        popularity=min(MOST_POPULARITY, round(popularity, 4)), sequence=math.floor(1e4 * sequence) / 1e4,
        token=math.floor(1e4 * token) / 1e4, correlation=locality.correlation, source=locality.source,
    )  # fmt: skip


def fit_strength(published: Published, shape: Locality) -> Locality:
    """The strength at which a locality of another model's ``shape`` gives the first point for a fit, by bisection.

    For models of which one number alone is known.
    """
    point = published.fitted[0]
    synthetic = Synthetic(published.experts, [point], FIT_SEED, CHECK_VALUES)
    low, high = math.log(1e-2), math.log(1e2)
    for _ in range(40):
        middle = (low + high) / 2
        found = synthetic.measure(scaled(shape, math.exp(middle)), published.top_k, [point])[0]
        low, high = (middle, high) if found < point.value else (low, middle)
    return scaled(shape, math.exp((low + high) / 2))
