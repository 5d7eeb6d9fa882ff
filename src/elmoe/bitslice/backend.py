"""What the engine asks of a backend, and the layers of a pass in NumPy: the definition of the native ``forward``.

A pass runs layer after layer: attention, routing, experts. A dense feed-forward layer is one expert of weight 1, always at
full precision. Two things may take part in a pass: a feed, whose experts come and go, and a hook, which is told of every
routing and may change it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from elmoe.bitslice.attention import AttentionWeights, KVCache, Places, attention_block, rms_norm
from elmoe.bitslice.expert import ExpertLayout
from elmoe.bitslice.formats import Matrix
from elmoe.bitslice.latent import LatentWeights, latent_block
from elmoe.bitslice.moe import ExpertTerms, RouterWeights, Routing, expert_ffn, route, shared_weights
from elmoe.bitslice.sampling import Sample, SamplingParameters
from elmoe.errors import NumericsError

Report = Callable[[str, float, float], None]
"""Takes a span of computation: its name, begin and end in seconds on the steady clock."""


@dataclass(frozen=True, eq=False)
class DenseWeights:
    """The norm (hidden,) of a dense feed-forward's input; its one expert lies where the layer's experts lie."""

    norm: NDArray[np.float32]
    epsilon: float


@dataclass(frozen=True, eq=False)
class SharedWeights:
    """An expert that every token uses, at full precision, beside those of the router, with the router's norm. ``addresses``:
    (1, 2); ``gate``: (hidden,), its weight is the sigmoid of a product with it; None is 1."""

    layout: ExpertLayout
    addresses: NDArray[np.int64]
    gate: NDArray[np.float32] | None


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer. ``addresses``: (experts, 2) int64, where the MSB and LSB records of its experts lie, read anew in every
    pass; 0 where a record is not in memory."""

    attention: AttentionWeights | LatentWeights
    feed_forward: RouterWeights | DenseWeights
    layout: ExpertLayout
    addresses: NDArray[np.int64]
    terms: ExpertTerms | None = None
    shared: SharedWeights | None = None


@dataclass(frozen=True, eq=False)
class LayerStack:
    """All layers of a model, in order: the first one is layer 0 of the cache. Layers with a router are numbered by *rows*:
    row 0 is the first of them. All routers choose the same number of the same number of experts."""

    layers: tuple[LayerWeights, ...]

    @cached_property
    def routers(self) -> tuple[RouterWeights, ...]:
        """The routers, by row."""
        return tuple(one.feed_forward for one in self.layers if isinstance(one.feed_forward, RouterWeights))


@dataclass(frozen=True)
class Draft:
    """How a draft step computes: ``allowed`` (rows, experts) uint8 marks the experts it may use, ``top_k`` of them per token
    at most; ``rescale`` and the choice are those of ``route``; ``offset`` lies below the MSB slices. ``bits`` is 4, or 8 in
    the ablation that cuts the expert axis alone."""

    allowed: NDArray[np.uint8]
    top_k: int
    rescale: bool = True
    offset: float = 8.0
    bits: int = 4

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise NumericsError(f"a draft keeps 4 or 8 bits, not {self.bits}")


@dataclass(frozen=True)
class Routings:
    """What the routers of a pass said: (rows, tokens, ...) arrays, see ``Routing``. Where a draft may use fewer experts than
    it wants, the rest of a token's ``experts`` is -1 and of its ``weights`` 0."""

    ranked: NDArray[np.int32]
    scores: NDArray[np.float32]
    experts: NDArray[np.int32]
    weights: NDArray[np.float32]

    @classmethod
    def empty(cls, stack: LayerStack, tokens: int, draft: Draft | None = None, dtype: DTypeLike = np.float32) -> Routings:
        """Arrays for a pass of ``tokens`` tokens, not yet set."""
        routers = stack.routers
        ranks, size = (routers[0].ranks, routers[0].top_k) if routers else (0, 0)
        if draft is not None:
            size = min(draft.top_k, size)
        shape = (len(routers), tokens)
        return cls(
            np.empty((*shape, ranks), np.int32), np.empty((*shape, ranks), dtype),
            np.empty((*shape, size), np.int32), np.empty((*shape, size), dtype),
        )  # fmt: skip

    def of(self, rows: list[int]) -> NDArray[np.int32]:
        """(rows, chosen tokens, k) experts of chosen tokens."""
        return self.experts[:, rows]


Routed = Callable[[int, Routings], None]
"""Told that a row is routed; may overwrite that row of the pass's routings in place before its experts run."""


class ExpertFeed(Protocol):
    """Experts that come and go: where a layer's experts are not all in memory at once."""

    def begin(self, row: int, experts: NDArray[np.int32]) -> None:
        """A row is routed to these (tokens, k) experts."""
        ...

    def next(self) -> list[int]:
        """The next experts of the row that can be computed, ascending over all calls: their addresses are set, those of the
        experts before them may not be any more. Empty at the row's end."""
        ...


class Backend(Protocol):
    """What the engine asks of the code that computes. Modules satisfy it: ``elmoe.bitslice``, which defines the bits, and
    ``elmoe.kernels``."""

    def embed(self, matrix: Matrix, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
        """Rows of the embedding: (tokens, hidden)."""
        ...

    def forward(
        self, stack: LayerStack, x: NDArray[np.float32], cache: KVCache, places: Places, cosine: NDArray[np.float32],
        sine: NDArray[np.float32], *, draft: Draft | None = None, feed: ExpertFeed | None = None,
        routed: Routed | None = None, report: Report | None = None,
    ) -> Routings:  # fmt: skip
        """Run all layers in place on ``x``; see ``bitslice.forward``."""
        ...

    def logits(self, norm: NDArray[np.float32], epsilon: float, head: Matrix, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """Final norm and vocabulary projection: (tokens, vocabulary)."""
        ...

    def sample(
        self, logits: NDArray[np.float32], parameters: SamplingParameters, position: int,
        adjusted: NDArray[np.float32] | None = None,
    ) -> Sample:  # fmt: skip
        """Sample one token for an absolute position; see ``bitslice.sample``."""
        ...


class Operations(NamedTuple):
    """The operations of a layer, with the signatures of this package."""

    attention_block: Callable[..., None]
    rms_norm: Callable[..., NDArray]
    route: Callable[..., Routing]
    expert_ffn: Callable[..., None]
    shared_weights: Callable[..., NDArray]
    latent_block: Callable[..., None]


DEFINITION = Operations(attention_block, rms_norm, route, expert_ffn, shared_weights, latent_block)


def forward(
    stack: LayerStack,
    x: NDArray[np.float32],
    cache: KVCache,
    places: Places,
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
    *,
    draft: Draft | None = None,
    feed: ExpertFeed | None = None,
    routed: Routed | None = None,
    report: Report | None = None,
    operations: Operations = DEFINITION,
) -> Routings:
    """Run all layers in place on the residual stream ``x`` (tokens, hidden) and write the cache.

    :param places: where the tokens are.
    :param cosine: (positions, head_dim / 2) rotary table, as ``sine``.
    :param draft: None computes the target.
    :param feed: where experts come from that are not all in memory; None: all addresses stay as they are.
    :param routed: see ``Routed``; called before the feed is told of a row.
    :param report: takes the spans "attention n", "routing n", "experts n" of layer n.
    :raises NumericsError: a value is not finite, a slice that is needed is not resident, a draft has no expert to use.
    """
    routings = Routings.empty(stack, len(x), draft, x.dtype)
    row = 0
    for index, layer in enumerate(stack.layers):
        times = [perf_counter()]
        latent = isinstance(layer.attention, LatentWeights)
        attend = operations.latent_block if latent else operations.attention_block
        attend(layer.attention, x, cache, index, places, cosine, sine)
        times.append(perf_counter())
        weights = layer.feed_forward
        if isinstance(weights, DenseWeights):
            hidden = operations.rms_norm(x, weights.norm, weights.epsilon)
            times += [perf_counter()] * 2
            one = np.zeros((len(x), 1), np.int32), np.ones((len(x), 1), x.dtype)
            operations.expert_ffn(layer.layout, layer.addresses, hidden, *one, x, terms=layer.terms)
        else:
            choice = () if draft is None else (draft.allowed[row], draft.top_k, draft.rescale)
            routing = operations.route(weights, x, *choice)
            _note(routings, row, routing)
            times.append(perf_counter())
            if routed is not None:
                routed(row, routings)
            _experts(operations, layer, routing.hidden, row, routings, x, draft, feed, times)
            row += 1
        if report is not None:
            times.append(perf_counter())
            report(f"attention {index}", times[0], times[1])
            report(f"routing {index}", times[1], times[2])
            report(f"experts {index}", times[3], times[4])
    return routings


def _note(routings: Routings, row: int, routing: Routing) -> None:
    """Write a row of a pass's routings, filled up where a draft found fewer experts than it wants."""
    found = routing.experts.shape[1]
    routings.ranked[row], routings.scores[row] = routing.ranked, routing.scores
    routings.experts[row, :, :found], routings.experts[row, :, found:] = routing.experts, -1
    routings.weights[row, :, :found], routings.weights[row, :, found:] = routing.weights, 0


def _experts(
    operations: Operations, layer: LayerWeights, hidden: NDArray[np.float32], row: int, routings: Routings,
    x: NDArray[np.float32], draft: Draft | None, feed: ExpertFeed | None, times: list[float],
) -> None:  # fmt: skip
    """Run a row's experts, the shared one first; those of a feed stretch by stretch, chained from zero in ascending order,
    as one call does."""
    experts, weights = routings.experts[row], routings.weights[row]
    coarse, offset = draft is not None and draft.bits == 4, 8.0 if draft is None else draft.offset
    if feed is not None:
        feed.begin(row, experts)
    times.append(perf_counter())
    if layer.shared is not None:
        shared = layer.shared
        one = np.zeros((len(x), 1), np.int32), operations.shared_weights(shared.gate, hidden)
        operations.expert_ffn(shared.layout, shared.addresses, hidden, *one, x)
    if feed is None:
        operations.expert_ffn(
            layer.layout, layer.addresses, hidden, experts, weights, x, coarse, offset, terms=layer.terms
        )  # fmt: skip
        return
    total = np.zeros_like(x)
    while ready := feed.next():
        part = np.where(np.isin(experts, ready), experts, np.int32(-1))
        operations.expert_ffn(layer.layout, layer.addresses, hidden, part, weights, total, coarse, offset, True, layer.terms)
    x += total
