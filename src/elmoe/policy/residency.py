"""Which expert slices stay in the fast tier: hotness, refill from what was streamed, hysteresis and a swap cap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import SlotPlan

Policy = Literal["decayed", "lru", "lfu", "static", "random"]
"""``decayed``: exponentially decayed counts on two time scales (the default). Baselines: ``lru`` keeps what was used last,
``lfu`` counts without decay, ``static`` keeps what the first pass brought in, ``random`` any."""


@dataclass(frozen=True)
class ResidencyParameters:
    """``decay``: what a committed token leaves of the older counts. ``recent``: weight of a second count, of what was used
    last, of which a pass leaves ``recent_decay``. ``hysteresis``: how much hotter than a resident a newcomer must be.
    ``swap_cap``: newcomers per layer and step once the slots are full."""

    policy: Policy = "decayed"
    decay: float = 0.99
    recent: float = 20.0
    recent_decay: float = 0.9
    hysteresis: float = 0.1
    swap_cap: int = 8

    def __post_init__(self) -> None:
        if self.policy == "lru":  # an LRU cache admits whatever was used last
            object.__setattr__(self, "hysteresis", 0.0)
            object.__setattr__(self, "swap_cap", 1 << 30)
        elif self.policy == "static":
            object.__setattr__(self, "swap_cap", 0)


@dataclass(frozen=True)
class ResidentSet:
    """Resident slices as boolean (layers, experts) arrays; ``lsb`` implies ``msb``."""

    msb: NDArray[np.bool_]
    lsb: NDArray[np.bool_]

    @classmethod
    def empty(cls, layers: int, experts: int) -> ResidentSet:
        """Nothing resident."""
        return cls(np.zeros((layers, experts), bool), np.zeros((layers, experts), bool))


def updated_hotness(hotness: NDArray[np.float64], routed: NDArray[np.int32], decay: float) -> NDArray[np.float64]:
    """Exponentially decayed counts of verified routing.

    :param hotness: (layers, experts) counts so far.
    :param routed: (layers, tokens, k) expert ids of committed tokens, oldest first; all weigh the same within a step.
    """
    return _decayed(hotness, decay, routed.shape[1]) + _uses(hotness.shape, routed)


def _decayed(hotness: NDArray[np.float64], decay: float, tokens: int) -> NDArray[np.float64]:
    # decay ** tokens as repeated products: pow() differs between libraries
    factor = 1.0
    for _ in range(tokens):
        factor *= decay
    return hotness * factor


def _uses(shape: tuple[int, ...], routed: NDArray[np.int32]) -> NDArray[np.int64]:
    """How often each (layer, expert) of ``shape`` is routed to."""
    layers, experts = shape
    flat = routed.reshape(layers, -1)
    if layers > 1:
        flat = flat + np.arange(layers)[:, None] * experts
    return np.bincount(flat.ravel(), minlength=layers * experts).reshape(layers, experts)


class Residency:
    """What a policy remembers of verified routing, as one score per (layer, expert): hotter is higher."""

    def __init__(self, layers: int, experts: int, parameters: ResidencyParameters) -> None:
        self._counts = np.zeros((layers, experts))
        self._recent = np.zeros((layers, experts))
        self._parameters = parameters
        self._step = 0
        self._ahead: tuple[int, NDArray[np.float64], NDArray[np.float64]] | None = None

    @property
    def hotness(self) -> NDArray[np.float64]:
        """(layers, experts) scores up to the last step."""
        return self._combined(self._counts, self._recent)

    @property
    def popularity(self) -> NDArray[np.float64]:
        """(layers, experts) counts up to the last step, for policies that count: the slower ones, which vary least."""
        return self._counts

    def scores(self, sure: NDArray[np.int32]) -> NDArray[np.float64]:
        """Scores with the (layers, tokens, k) routing that is sure to be committed counted in."""
        return self._combined(*self._updated(sure, self._step + 1))

    def layer_scores(self, row: int, sure: NDArray[np.int32]) -> NDArray[np.float64]:
        """One row of :meth:`scores`, (experts,), from that layer's (tokens, k) routing."""
        if self._parameters.policy != "decayed":
            return self._combined(*self._updated(sure[None], self._step + 1, slice(row, row + 1)))[0]
        if self._ahead is None or self._ahead[0] != len(sure):  # the decay of all layers at once
            self._ahead = len(sure), *self._faded(len(sure))
        _, counts, recent = self._ahead
        uses = np.bincount(sure.ravel(), minlength=counts.shape[1])
        return self._combined(counts[row] + uses, recent[row] + uses)

    def learn(self, committed: NDArray[np.int32]) -> None:
        """Count the (layers, tokens, k) routing of a step's committed tokens."""
        self._step += 1
        self._ahead = None
        self._counts, self._recent = self._updated(committed, self._step)

    def end_step(
        self, resident: ResidentSet, sure: NDArray[np.int32], committed: NDArray[np.int32], streamed: NDArray[np.bool_],
        slots: SlotPlan,
    ) -> ResidentSet:  # fmt: skip
        """The resident set after a target pass, and learn from it.

        :param sure: (layers, tokens, k) routing that was sure to stay before acceptance was known: newcomers are judged by
            it. :param committed: that of the tokens that stayed. :param streamed: see :func:`refill`.
        """
        if (streamed & ~(resident.msb & resident.lsb)).any():
            resident = refill(resident, self.scores(sure), streamed, slots, self._parameters)
        self.learn(committed)
        return resident

    def _faded(self, tokens: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """What a pass of so many tokens leaves of both counts."""
        parameters = self._parameters
        return _decayed(self._counts, parameters.decay, tokens), self._recent * parameters.recent_decay

    def _combined(self, counts: NDArray[np.float64], recent: NDArray[np.float64]) -> NDArray[np.float64]:
        return counts + self._parameters.recent * recent if self._parameters.policy == "decayed" else counts

    def _updated(
        self, routed: NDArray[np.int32], step: int, rows: slice = slice(None)
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        counts, recent, parameters = self._counts[rows], self._recent[rows], self._parameters
        policy = parameters.policy
        if policy == "decayed":
            uses = _uses(counts.shape, routed)
            counts, recent = self._faded(routed.shape[1])
            return counts + uses, recent + uses
        if policy in ("lfu", "static"):
            return updated_hotness(counts, routed, 1.0), recent
        layers, experts = counts.shape
        if policy == "lru":
            return np.where(_uses(counts.shape, routed) > 0, float(step), counts), recent
        # random: a fixed value per expert and step, the same whenever it is asked for
        noise = np.random.Generator(np.random.PCG64([step])).random((len(self._counts), experts))[rows]
        return noise.reshape(layers, experts), recent


def trimmed(
    resident: ResidentSet, hotness: NDArray[np.float64], msb_slots: NDArray[np.int64], lsb_slots: NDArray[np.int64]
) -> ResidentSet:
    """The hottest residents that fit into fewer slots per layer."""
    msb = resident.msb & (_rank(np.where(resident.msb, hotness, -1.0)) < msb_slots[:, None])
    lsb = resident.lsb & msb
    return ResidentSet(msb, lsb & (_rank(np.where(lsb, hotness, -1.0)) < lsb_slots[:, None]))


def _rank(score: NDArray[np.float64]) -> NDArray[np.int64]:
    """Each expert's place in its layer by score, 0 the highest; ties by index."""
    return np.argsort(np.argsort(-score, axis=1, kind="stable"), axis=1)  # of a permutation: its inverse


def refill(
    resident: ResidentSet,
    hotness: NDArray[np.float64],
    streamed: NDArray[np.bool_],
    slots: SlotPlan,
    parameters: ResidencyParameters,
) -> ResidentSet:
    """The resident set after a step: swaps in only slices that the step streamed anyway.

    :param streamed: (layers, experts), experts whose missing slices the step read from the slow tier.
    """
    msb_slots, lsb_slots = np.array(slots.msb), np.array(slots.lsb)
    msb = _keep_hottest(resident.msb, hotness, streamed & ~resident.msb, msb_slots, parameters)
    kept_lsb = resident.lsb & msb
    lsb = _keep_hottest(kept_lsb, hotness, streamed & msb & ~kept_lsb, lsb_slots, parameters)
    return ResidentSet(msb, lsb)


def _keep_hottest(
    resident: NDArray[np.bool_],
    hotness: NDArray[np.float64],
    candidates: NDArray[np.bool_],
    slots: NDArray[np.int64],
    parameters: ResidencyParameters,
) -> NDArray[np.bool_]:
    """Per layer the hottest ``slots`` of residents (favoured by the hysteresis) and the best few candidates."""
    if not (candidates.any() and slots.any()):
        return resident
    both: NDArray[np.bool_] = resident | candidates
    if (both.sum(axis=1) <= slots).all():
        return both
    empty = slots - resident.sum(axis=1)
    newcomers = np.minimum(empty + parameters.swap_cap, slots)
    admitted = candidates & (_rank(np.where(candidates, hotness, -np.inf)) < newcomers[:, None])
    score = np.where(resident, hotness * (1 + parameters.hysteresis), np.where(admitted, hotness, -1.0))
    return (_rank(score) < slots[:, None]) & (resident | admitted)
