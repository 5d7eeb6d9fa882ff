"""Fitting a locality to facts by simulation: the same random numbers in every try, so that the search is deterministic."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.policy.residency import ResidencyParameters
from elmoe.trace.facts import RoutingFacts
from elmoe.trace.locality import FitShape, Locality, Statistic, measured, statistics_of
from elmoe.trace.replacement import policy_hit_rate
from elmoe.trace.synthesis import draw_noise, latent_scores, popularity_scores, synthesise

FIT_SEEDS, CHECK_SEED = (20260414, 20260415, 20260416), 20260417
"""A try is a mean over the first; a fit reports the numbers of synthetic facts it was not fitted on."""
MAX_VALUES = 1 << 22
"""Latent scores of a try and seed; more layers than these allow are left out of the fit."""
STARTS = ((0.3, 0.8, 1.5), (0.05, 0.3), (0.3, 0.8), (0.7, 2.3))
STEPS, SMALLEST = (0.4, 0.15, 0.2, 0.8), 0.02
LOW, HIGH = (0.0, 0.0, 0.0, 0.0), (4.0, 0.999, 1.0, 6.0)
CACHE_SHARES, CACHE_TOKENS = (0.25, 0.50), 4096
Point = Sequence[float] | NDArray[np.float64]


def fit_locality(facts: RoutingFacts) -> Locality:
    """The locality whose synthetic facts have the statistics of the decoded positions of ``facts``.

    Of one sequence, what is fixed in a sequence cannot be told from popularity: ``sequence`` is 0 then. What decays over
    many more tokens than the longest lag is hardly told from what is fixed.

    :raises TraceError: the facts are too short to show reuse, or all experts run for every token.
    """
    decoded = facts.decoding()
    if facts.top_k == facts.experts:
        raise TraceError("every token runs every expert: there is no locality to fit")
    target = measured(decoded)
    if "reuse at 1" not in target:
        raise TraceError("no sequence has two decoded positions", "record more tokens")
    trials = [_Trial(decoded, seed) for seed in FIT_SEEDS]
    single = len(decoded.lengths) == 1

    def misfit(point: Point) -> float:
        found = [trial.statistics(_locality(point, single)) for trial in trials]
        means = {name: sum(one[name] for one in found) / len(found) for name in target}
        return sum((means[name] / max(value, 1e-6) - 1) ** 2 for name, value in target.items())

    start = min(product(*STARTS), key=misfit)
    best = search(misfit, start, STEPS, (LOW, HIGH))
    draft = _locality(best, single, facts.source)
    sequences, positions, layers, _ = decoded.ranked.shape
    other = synthesise(draft, facts.experts, facts.top_k, layers, sequences, positions, CHECK_SEED, facts.top_k)
    other = RoutingFacts(other.ranked, decoded.prompts, decoded.lengths, facts.experts, facts.top_k, other.source)
    synthetic = measured(other)
    return Locality(
        popularity=draft.popularity, sequence=draft.sequence, token=draft.token, correlation=draft.correlation,
        source=facts.source, status="derived",
        shape=FitShape(
            sequences=sequences, positions=positions, layers=layers, experts=facts.experts, top_k=facts.top_k
        ),
        fit=tuple(Statistic.of(name, value, synthetic[name]) for name, value in target.items()),
        check=tuple(
            Statistic.of(f"LRU hits at {share:.0%}", lru_hit_rate(decoded, share), lru_hit_rate(other, share))
            for share in CACHE_SHARES
        ),
    )  # fmt: skip


def lru_hit_rate(facts: RoutingFacts, share: float) -> float:
    """Hit rate of an LRU cache of ``share`` of each layer's experts, one token at a time, sequence after sequence, over the
    first ``CACHE_TOKENS``."""
    slots = max(1, round(share * facts.experts))
    return policy_hit_rate(facts.chosen[facts.computed][:CACHE_TOKENS], facts.experts, slots, ResidencyParameters("lru"))


def _locality(point: Point, single: bool, source: str = "a try") -> Locality:
    """A point of the search: popularity, share of variance fixed in a sequence, share of the rest that decays, -log of one
    minus the correlation."""
    popularity, fixed, decaying, slowness = point
    fixed = 0.0 if single else fixed
    return Locality(
        popularity=round(popularity, 4), sequence=round(math.sqrt(fixed), 4), source=source,
        token=math.floor(1e4 * math.sqrt((1 - fixed) * decaying)) / 1e4, correlation=round(1 - math.exp(-slowness), 4),
    )  # fmt: skip


class _Trial:
    """Synthetic facts of the shape of others, for one locality after another from the same random numbers."""

    def __init__(self, facts: RoutingFacts, seed: int) -> None:
        sequences, positions, layers, _ = facts.ranked.shape
        self._computed, self._top_k = facts.computed, facts.top_k
        layers = max(1, min(layers, MAX_VALUES // (sequences * positions * facts.experts)))
        self._popularity = popularity_scores(layers, facts.experts, seed)
        self._noise = [draw_noise(layer, range(sequences), positions, facts.experts, seed) for layer in range(layers)]
        self._marks = np.empty((sequences, positions, layers, facts.experts), bool)

    def statistics(self, locality: Locality) -> dict[str, float]:
        """As ``measured`` of the synthetic facts."""
        for layer, (fixed, fresh) in enumerate(self._noise):
            spread = np.float32(locality.popularity) * self._popularity[layer]
            self._marks[:, :, layer] = _best(latent_scores(locality, spread, fixed, fresh), self._top_k)
        self._marks &= self._computed[:, :, None, None]
        return statistics_of(self._marks, self._computed, self._top_k)


def _best(scores: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Marks of the ``count`` highest of the last axis."""
    chosen = np.argpartition(scores, -count, axis=-1)[..., -count:]
    marks = np.zeros(scores.shape, bool)
    np.put_along_axis(marks, chosen, True, axis=-1)
    return marks


def search(
    misfit: Callable[[Point], float], start: Point, steps: Sequence[float], bounds: tuple[Sequence[float], Sequence[float]]
) -> tuple[float, ...]:
    """Hooke and Jeeves: one coordinate after another, a leap along what helped, and smaller steps where nothing does."""
    low, high = (np.array(bound) for bound in bounds)
    base, base_value, scale = np.array(start), misfit(start), 1.0

    def explore(point: NDArray, value: float) -> tuple[NDArray, float]:
        for axis, step in enumerate(steps):
            for sign in (1, -1):
                trial = point.copy()
                trial[axis] = np.clip(trial[axis] + sign * scale * step, low[axis], high[axis])
                tried = misfit(trial)
                if tried < value:
                    point, value = trial, tried
                    break
        return point, value

    while scale > SMALLEST:
        point, value = explore(base, base_value)
        if value >= base_value:
            scale /= 2
            continue
        leap = np.clip(2 * point - base, low, high)
        base, base_value = point, value
        point, value = explore(leap, misfit(leap))
        if value < base_value:
            base, base_value = point, value
    return tuple(base.tolist())
