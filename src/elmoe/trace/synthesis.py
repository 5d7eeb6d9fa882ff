"""Synthetic routing facts of any size with a measured locality.

For sequence s, token t, layer l and expert e the latent score is::

    popularity * m[l, e] + sequence * u[s, l, e] + token * v[s, t, l, e] + noise * w[s, t, l, e]

with m, u, w standard normal and v[t] = correlation * v[t - 1] + sqrt(1 - correlation^2) * a standard normal; experts are
ranked by score. m is what all tokens share, u makes sequences differ from each other and agree with themselves, v makes
neighbours agree. With an agreement a, u, v's draws and w are sqrt(a) of a draw that all sequences have in common and
sqrt(1 - a) of their own. Where a popularity is given, the first term is calibrated until the experts are chosen as often as
it says.
Numbers depend on (seed, layer, sequence) only: the first sequences and layers of a larger result are those of a smaller one.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.trace.facts import MAX_EXPERTS, MAX_IDS, RoutingFacts
from elmoe.trace.locality import Locality

CALIBRATION_SAMPLES, CALIBRATION_ROUNDS = 512, 40
POPULARITY_STREAM, NOISE_STREAM, COMMON_STREAM = 1, 2, 3
BLOCK, MAX_SCORES = 1 << 22, 1 << 26
"""Scores computed together, by whole sequences, and those that one sequence may have in a layer."""


def synthesise(
    locality: Locality,
    experts: int,
    top_k: int,
    layers: int,
    sequences: int,
    positions: int,
    seed: int,
    ranks: int | None = None,
    popularity: NDArray[np.float64] | None = None,
    prompt: int = 1,
) -> RoutingFacts:
    """Facts of ``sequences`` sequences of ``positions`` computed positions each.

    :param ranks: experts ranked per token and layer; None is twice ``top_k``, or all.
    :param popularity: (layers, experts) relative frequencies, in place of the locality's own spread.
    :param prompt: positions of each sequence that count as its prompt.
    :raises TraceError: sizes that cannot be, or a popularity of another shape.
    """
    ranks = min(2 * top_k, experts) if ranks is None else ranks
    if not 1 <= top_k <= ranks <= experts <= MAX_EXPERTS:
        raise TraceError(
            f"top {top_k} of {ranks} ranks of {experts} experts cannot be", "ranks lie between top-k and experts"
        )
    if min(layers, sequences, positions) < 1 or not 1 <= prompt <= positions or seed < 0:
        raise TraceError(
            f"{sequences} sequences x {positions} positions x {layers} layers, prompt {prompt}, seed {seed} cannot be",
            "give at least 1 of each, a prompt no longer than the positions, and a seed of 0 or more",
        )
    if sequences * positions * layers * ranks > MAX_IDS or positions * experts > MAX_SCORES:
        raise TraceError("these are more expert ids than memory is meant to hold", "ask for fewer sequences or positions")
    spread = (
        locality.popularity * popularity_scores(layers, experts, seed)
        if popularity is None
        else calibrated_scores(popularity, layers, experts, top_k)
    )
    ranked = np.empty((sequences, positions, layers, ranks), np.uint16)
    together = max(1, BLOCK // (positions * experts))
    for layer in range(layers):
        common = draw_common(layer, positions, experts, seed) if locality.agreement else None
        for start in range(0, sequences, together):
            block = range(start, min(start + together, sequences))
            fixed, fresh = draw_noise(layer, block, positions, experts, seed)
            if common is not None:
                _agree(locality.agreement, fixed, fresh, *common)
            scores = latent_scores(locality, spread[layer], fixed, fresh)
            ranked[start : block.stop, :, layer] = np.argsort(-scores, axis=-1, kind="stable")[..., :ranks]
    shape = f"{sequences} x {positions} positions, {layers} layers, top {top_k} of {experts}, seed {seed}"
    return RoutingFacts(
        ranked, np.full(sequences, prompt, np.int32), np.full(sequences, positions, np.int32), experts, top_k,
        f"synthetic: {shape}; locality of {locality.source}" + ("" if popularity is None else "; given popularity"),
    )  # fmt: skip


def popularity_scores(layers: int, experts: int, seed: int) -> NDArray[np.float32]:
    """(layers, experts): the quantiles of a standard normal, in another random order in every layer."""
    normal = NormalDist()
    quantiles = np.array([normal.inv_cdf((index + 0.5) / experts) for index in range(experts)])
    quantiles /= max(quantiles.std(), 1e-9)
    order = [np.random.default_rng((seed, POPULARITY_STREAM, layer)).permutation(experts) for layer in range(layers)]
    return quantiles[np.array(order)].astype(np.float32)


def draw_noise(
    layer: int, sequences: range, positions: int, experts: int, seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Standard normals of a layer: (sequences, 1, experts) fixed ones and (2, sequences, positions, experts) fresh ones."""
    fixed = np.empty((len(sequences), 1, experts), np.float32)
    fresh = np.empty((2, len(sequences), positions, experts), np.float32)
    for row, sequence in enumerate(sequences):
        fixed[row, 0], fresh[:, row] = _draw((seed, NOISE_STREAM, layer, sequence), positions, experts)
    return fixed, fresh


def draw_common(layer: int, positions: int, experts: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What all sequences of a layer may have in common: (experts,) and (2, positions, experts) standard normals."""
    return _draw((seed, COMMON_STREAM, layer), positions, experts)


def _draw(key: tuple[int, ...], positions: int, experts: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(key)
    fixed = rng.standard_normal(experts, np.float32)
    return fixed, rng.standard_normal((positions, 2, experts), np.float32).transpose(1, 0, 2)


def _agree(
    agreement: float, fixed: NDArray[np.float32], fresh: NDArray[np.float32], same: NDArray[np.float32],
    steps: NDArray[np.float32],
) -> None:  # fmt: skip
    """Put a share of the variance in common, in place; all draws stay standard normals."""
    own, shared = np.float32(math.sqrt(1 - agreement)), np.float32(math.sqrt(agreement))
    fixed *= own
    fixed += shared * same
    fresh *= own
    fresh += shared * steps[:, None]


def latent_scores(
    locality: Locality, spread: NDArray[np.float32], fixed: NDArray[np.float32], fresh: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(sequences, positions, experts) scores from a layer's (experts,) popularity term and :func:`draw_noise`."""
    keep = np.float32(locality.correlation)
    renew = np.float32(locality.token * math.sqrt(1 - locality.correlation**2))
    scores = fresh[0] * renew
    scores[:, 0] = fresh[0][:, 0] * np.float32(locality.token)
    for position in range(1, scores.shape[1]):
        scores[:, position] += keep * scores[:, position - 1]
    scores += fresh[1] * np.float32(locality.noise)
    scores += fixed * np.float32(locality.sequence) + spread
    return scores


def calibrated_scores(popularity: NDArray[np.float64], layers: int, experts: int, top_k: int) -> NDArray[np.float32]:
    """(layers, experts) terms that, with noise of variance 1 around them, choose experts as often as ``popularity`` says.

    An expert is chosen where its noise lifts it above the ``top_k``-th best of the others: the chance of that is averaged
    over fixed samples of the others, and each term moves by Newton's rule until the chances are the wanted ones.
    """
    popularity = np.asarray(popularity, np.float64)
    if popularity.shape != (layers, experts):
        raise TraceError(
            f"the popularity is {popularity.shape}, not {layers} layers x {experts} experts", "take one of the same model"
        )
    if not np.isfinite(popularity).all() or popularity.min() < 0 or (popularity > 0).sum(axis=1).min() < top_k:
        raise TraceError(f"a layer's popularity is negative, not finite, or zero for all but {top_k - 1} experts")
    if top_k == experts:
        return np.zeros((layers, experts), np.float32)
    normal = NormalDist()
    samples = np.random.default_rng(0).standard_normal((CALIBRATION_SAMPLES, experts))
    terms = np.empty((layers, experts), np.float32)
    for layer in range(layers):
        wanted = _chances(popularity[layer], top_k)
        term = np.array([normal.inv_cdf(chance) for chance in wanted.tolist()])
        for _ in range(CALIBRATION_ROUNDS):
            scores = samples + term
            best = np.partition(scores, (experts - top_k - 1, experts - top_k), axis=1)
            last, first_out = best[:, experts - top_k, None], best[:, experts - top_k - 1, None]
            margin = term - np.where(scores >= last, first_out, last)
            chance, density = (
                _normal_cdf(margin).mean(axis=0),
                np.exp(-0.5 * margin**2).mean(axis=0) / math.sqrt(2 * math.pi),
            )
            term = term + np.clip((wanted - chance) / np.maximum(density, 1e-6), -0.5, 0.5)
        terms[layer] = term - term.mean()
    return terms


def _chances(popularity: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """(experts,) chances to be chosen that sum to ``top_k``; what exceeds certainty goes to the others."""
    weights = np.maximum(popularity, 1e-4 * popularity.mean())
    capped = np.zeros(len(weights), bool)
    for _ in range(top_k + 1):
        free = top_k - 0.999 * capped.sum()
        chances = np.where(capped, 0.999, weights * (free / weights[~capped].sum()))
        if (chances <= 0.999).all():
            break
        capped |= chances > 0.999
    return np.minimum(chances, 0.999)


def _normal_cdf(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Abramowitz and Stegun 7.1.26, within 1e-7."""
    a = np.abs(x) / math.sqrt(2)
    t = 1 / (1 + 0.3275911 * a)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * series * np.exp(-(a**2))
    return np.where(x >= 0, 1 - tail, tail)
