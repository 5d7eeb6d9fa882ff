"""Measuring synthetic routing as others measured the real one: the same lengths, caches and rules of counting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import TraceError
from elmoe.trace.locality import Locality
from elmoe.trace.published import Point
from elmoe.trace.replacement import belady_misses
from elmoe.trace.synthesis import draw_noise, latent_scores, popularity_scores

TEXTS, CORPUS_TEXTS, CORPUS_TOKENS = 9, 48, 24
"""Sequences of a draw; a point whose sequences are counted together takes many short ones, as a corpus has many texts."""
BELADY_TEXTS = 2
"""Sequences that Belady's optimum is found for: it is slow, and differs little between them."""
Draw = tuple[int, int]
"""Sequences and tokens."""


def draw_of(point: Point) -> Draw:
    """The shape of synthetic routing that a point is measured on."""
    return (CORPUS_TEXTS, CORPUS_TOKENS) if point.together else (TEXTS, point.tokens)


class Synthetic:
    """Synthetic routing for one locality after another from the same random numbers.

    Draws shorter than another share its first tokens. ``values`` bounds the scores of a layer and sequence block: layers are
    left out down to one, then tokens are not.
    """

    def __init__(self, experts: int, points: Sequence[Point], seed: int, values: int) -> None:
        self.experts, self.seed = experts, seed
        longest: dict[int, int] = {}
        for sequences, tokens in map(draw_of, points):
            longest[sequences] = max(tokens, longest.get(sequences, 0))
        self._noise: dict[int, list[tuple[NDArray[np.float32], NDArray[np.float32]]]] = {}
        self._popularity: dict[int, NDArray[np.float32]] = {}
        for sequences, tokens in longest.items():
            layers = max(1, min(8, values // (sequences * tokens * experts)))
            self._popularity[sequences] = popularity_scores(layers, experts, seed)
            self._noise[sequences] = [draw_noise(layer, range(sequences), tokens, experts, seed) for layer in range(layers)]

    def measure(self, locality: Locality, top_k: int, points: Sequence[Point]) -> list[float]:
        """Each point's quantity, on routing of this locality; ``top_k``: the model's."""
        scores: dict[int, NDArray[np.float32]] = {}
        routed: dict[tuple[int, int], Routed] = {}
        found = []
        for point in points:
            sequences, tokens = draw_of(point)
            if sequences not in scores:
                scores[sequences] = self._scores(locality, sequences)
            key = sequences, point.top_k or top_k
            if key not in routed:
                routed[key] = Routed.of(scores[sequences], key[1])
            found.append(float(routed[key].measure(point, tokens)))
        return found

    def _scores(self, locality: Locality, sequences: int) -> NDArray[np.float32]:
        """(sequences, layers, tokens, experts)."""
        spread = np.float32(locality.popularity) * self._popularity[sequences]
        return np.stack(
            [latent_scores(locality, spread[i], *noise) for i, noise in enumerate(self._noise[sequences])], axis=1
        )


@dataclass(frozen=True, eq=False)
class Routed:
    """Routing of texts: ``chosen`` (sequences, layers, tokens, k) ids, ``marks`` (sequences, layers, tokens, experts)."""

    chosen: NDArray[np.int64]
    marks: NDArray[np.bool_]

    @classmethod
    def of(cls, scores: NDArray[np.float32], top_k: int) -> Routed:
        """The ``top_k`` best of (sequences, layers, tokens, experts) scores, best first."""
        best = np.argpartition(scores, -top_k, axis=-1)[..., -top_k:]
        order = np.argsort(-np.take_along_axis(scores, best, axis=-1), axis=-1, kind="stable")
        chosen = np.take_along_axis(best, order, axis=-1)
        marks = np.zeros(scores.shape, bool)
        np.put_along_axis(marks, chosen, True, axis=-1)
        return cls(chosen, marks)

    @property
    def experts(self) -> int:
        """Of a layer."""
        return self.marks.shape[-1]

    def measure(self, point: Point, tokens: int) -> float:
        """A point's quantity over the first ``tokens`` tokens of each sequence."""
        marks = self.marks[:, :, :tokens]
        if point.quantity in ("lru", "belady"):
            assert point.slots is not None
            if point.quantity == "lru":
                return self._lru(point, tokens)
            return _belady(self.marks[:BELADY_TEXTS, :, :tokens], point.slots, point.first_use_hits)
        if point.quantity == "hottest":
            assert point.share is not None
            return _hottest(marks, point.share, point.together, point.all_layers)
        if point.quantity == "touched":
            return float(marks.any(axis=2).mean())
        assert point.lag is not None
        if point.quantity == "reuse":
            again = np.count_nonzero(marks[:, :, point.lag :] & marks[:, :, : -point.lag])
            return again / np.count_nonzero(marks[:, :, point.lag :])
        if point.quantity == "window":
            return _window(marks, point.lag)
        if point.quantity == "distinct":
            return _distinct(marks, point.lag)
        assert point.quantity == "static" and point.slots is not None
        return _static(marks, point.lag, round(point.slots))

    def _lru(self, point: Point, tokens: int) -> float:
        """Hits of an LRU cache; between whole numbers of slots by linear interpolation."""
        distance, first, pushed = (one[:, :, point.skip : tokens] for one in self._recency)
        if point.in_turn:
            distance = distance + pushed
        if not point.first_use_hits:
            distance = np.where(first, self.experts, distance)
        assert point.slots is not None
        below = int(point.slots)
        rates = [float((distance < slots).mean()) for slots in (below, below + 1)]
        return rates[0] + (point.slots - below) * (rates[1] - rates[0])

    @cached_property
    def _recency(self) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.int32]]:
        """For every use: how many experts of the layer were used since this one was (of one token, those ranked behind it),
        or for a first use how many were used before it; whether it is a first use; and how many experts of its own token
        come before it in the ranking and were not among those used since."""
        sequences, layers, tokens, top_k = self.chosen.shape
        last = np.full((sequences, layers, self.experts), -1, np.int64)
        distance, pushed = (np.empty(self.chosen.shape, np.int32) for _ in range(2))
        first = np.empty(self.chosen.shape, bool)
        rank = np.arange(top_k)
        before = rank[:, None] > rank
        for token in range(tokens):
            used = self.chosen[:, :, token]
            mine = np.take_along_axis(last, used, axis=-1)
            first[:, :, token] = mine < 0
            distance[:, :, token] = (last[:, :, None, :] > mine[..., None]).sum(axis=-1)
            distance[:, :, token] += np.where(mine < 0, np.cumsum(mine < 0, axis=-1) - 1, 0)
            pushed[:, :, token] = (before & (mine[..., None, :] < mine[..., None])).sum(axis=-1)
            # A use later in the token's ranking is the more recent one.
            np.put_along_axis(last, used, np.broadcast_to(token * top_k + rank, used.shape), axis=-1)
        return distance, first, pushed


def _hottest(marks: NDArray[np.bool_], share: float, together: bool, all_layers: bool) -> float:
    """Share of the routing of the most used experts, a mean over layers, and over sequences unless they are together."""
    use = marks.sum(axis=2).astype(np.float64)
    use = use.sum(axis=0, keepdims=True) if together else use
    use = use.reshape(len(use), 1, -1) if all_layers else use
    ordered = np.sort(use, axis=-1)[..., ::-1]
    covered = np.cumsum(ordered, axis=-1) / ordered.sum(axis=-1, keepdims=True)
    curve = np.concatenate([[0.0], covered.reshape(-1, covered.shape[-1]).mean(axis=0)])
    return float(np.interp(share * (len(curve) - 1), np.arange(len(curve)), curve))


def _window(marks: NDArray[np.bool_], lag: int) -> float:
    """Share of uses whose expert was used in the last ``lag`` tokens, over tokens that have as many before them."""
    seen = np.zeros_like(marks[:, :, lag:])
    for back in range(1, lag + 1):
        seen |= marks[:, :, lag - back : marks.shape[2] - back]
    uses = marks[:, :, lag:]
    return np.count_nonzero(uses & seen) / np.count_nonzero(uses)


def _distinct(marks: NDArray[np.bool_], batch: int) -> float:
    """Experts of a batch over the most it could use, a mean over steps and layers."""
    if len(marks) < batch:
        raise TraceError(f"a batch of {batch} of {len(marks)} sequences cannot be")
    union = marks[:batch].any(axis=0)
    return np.count_nonzero(union) / np.count_nonzero(marks[:batch])


def _static(marks: NDArray[np.bool_], others: int, slots: int) -> float:
    """What the most used experts of some sequences hold of another, a mean over all sequences and layers."""
    use = marks.sum(axis=2).astype(np.float64)
    use /= use.sum(axis=-1, keepdims=True)
    sequences, found = len(use), []
    for index in range(sequences):
        pooled = use[[(index + 1 + other) % sequences for other in range(min(others, sequences - 1))]].mean(axis=0)
        best = np.argsort(-pooled, axis=-1, kind="stable")[:, :slots]
        found.append(np.take_along_axis(use[index], best, axis=-1).sum(axis=-1).mean())
    return float(np.mean(found))


def _belady(marks: NDArray[np.bool_], slots: float, first_use_hits: bool) -> float:
    """Hits of the best cache that there can be."""
    count, misses = round(slots), 0
    for sequence in marks:
        for layer in sequence:
            misses += belady_misses(layer, count)
            if first_use_hits:
                misses -= min(count, int(layer.any(axis=0).sum()))
    return 1 - misses / np.count_nonzero(marks)
