"""The forward pass shared by the families: embedding, attention and MoE blocks, vocabulary projection.

Runs on any backend with the signatures of ``elmoe.bitslice``. Knows nothing of budgets, sampling or sequences: it is told
where each token sits and asks an expert source for the bytes of the experts it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import AttentionWeights, ExpertLayout, KVCache, NestedMatrix, RouterWeights, Routing, rotary_tables
from elmoe.errors import ModelError
from elmoe.models.spec import GroupedAttention, ModelSpec, Rope


class WeightReader(Protocol):
    """What the decoder needs of a store."""

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        ...

    def nested(self, name: str) -> NestedMatrix:
        """A nested matrix by its store name."""
        ...

    def array(self, name: str) -> NDArray[np.float32]:
        """A float32 tensor by its store name."""
        ...

    def expert_layout(self, layer: int) -> ExpertLayout:
        """How an expert (or the dense FFN) of a layer lies in memory."""
        ...

    def expert_addresses(self, layer: int) -> NDArray[np.int64]:
        """(experts, 2) addresses of the MSB and LSB records of a layer."""
        ...


@dataclass(frozen=True)
class Stretch:
    """Experts that can be computed now: ``experts`` (tokens, k) with -1 for those of other stretches, the layer's (experts,
    2) address table, and whether this is all of the layer."""

    experts: NDArray[np.int32]
    addresses: NDArray[np.int64]
    whole: bool


class ExpertSource(Protocol):
    """Where the bytes of experts come from; called once per MoE layer and step.

    A source may have ``tables``, the MoE layers' (experts, 2) addresses: then a backend that has ``forward`` computes the
    layers in one call. ``feed(draft)`` is what such a call needs beside the tables where experts come and go, else None, and
    ``note(ranked, experts, draft)`` is told the layers' (layers, tokens, ...) routing afterwards if there was no feed.
    """

    def stretches(self, layer: int, routing: Routing, draft: bool) -> Iterable[Stretch]:
        """The layer's experts, ascending, in one or several stretches; each is computed before the next is asked for."""
        ...


@dataclass(frozen=True)
class Routings:
    """What the MoE layers' routers said of a pass: (tokens, ...) arrays by layer, as lists or as one array each; see
    ``Routing``."""

    ranked: Sequence[NDArray[np.int32]] | NDArray[np.int32]
    scores: Sequence[NDArray[np.float32]] | NDArray[np.float32]
    experts: Sequence[NDArray[np.int32]] | NDArray[np.int32]

    def of(self, rows: list[int]) -> NDArray[np.int32]:
        """(layers, rows, k) experts of chosen token rows."""
        if isinstance(self.experts, np.ndarray):
            return self.experts[:, rows]
        return (
            np.stack([experts[rows] for experts in self.experts]) if self.experts else np.zeros((0, len(rows), 0), np.int32)
        )


@dataclass(frozen=True)
class Draft:
    """How a draft step computes: ``allowed`` (layers, experts) uint8 marks the experts it may use; ``bits`` is 4, or 8 in
    the ablation that cuts the expert axis alone."""

    allowed: NDArray[np.uint8]
    top_k: int
    rescale: bool = True
    offset: float = 8.0
    bits: int = 4


@dataclass(frozen=True)
class Tokens:
    """One token per row: its id, the cache slot of its sequence and its absolute position, int32 each."""

    ids: NDArray[np.int32]
    slots: NDArray[np.int32]
    positions: NDArray[np.int32]


class Decoder:
    """A model on a backend. ``forward`` may be called from one thread at a time. ``ranks``: experts that its routings rank;
    None is ``2 * top_k``."""

    def __init__(self, reader: WeightReader, backend: ModuleType, ranks: int | None = None) -> None:
        self.spec = spec = reader.spec
        self._backend = backend
        self._embedding = reader.nested("embedding")
        self._head = self._embedding if spec.tied_embeddings else reader.nested("head")
        self._final_norm = reader.array("final_norm")
        self._attention = [self._attention_weights(reader, layer) for layer in range(len(spec.layers))]
        self._dense = {
            layer: (reader.array(f"layers.{layer}.ffn_norm"), reader.expert_addresses(layer)) for layer in spec.dense_layers
        }
        self._layouts = [reader.expert_layout(layer) for layer in range(len(spec.layers))]
        self._routers = {
            layer: RouterWeights(
                reader.array(f"layers.{layer}.ffn_norm"),
                reader.array(f"layers.{layer}.router"),
                spec.norm_epsilon,
                spec.top_k,
                spec.moe(layer).router.normalize,
                ranks,
            )
            for layer in spec.moe_layers
        }
        self._rotary = grouped_attention(spec).head_dim, rope_of(grouped_attention(spec)).theta
        self._cosine, self._sine = rotary_tables(0, *self._rotary)
        self._stack: Any = None

    def _attention_weights(self, reader: WeightReader, layer: int) -> AttentionWeights:
        spec = self.spec
        attention = grouped_attention(spec, layer)
        normed = attention.query_key_norm != "none"
        return AttentionWeights(
            norm=reader.array(f"layers.{layer}.attention_norm"),
            query_key_value=reader.nested(f"layers.{layer}.query_key_value"),
            query_norm=reader.array(f"layers.{layer}.query_norm") if normed else None,
            key_norm=reader.array(f"layers.{layer}.key_norm") if normed else None,
            output=reader.nested(f"layers.{layer}.attention_output"),
            heads=attention.heads,
            kv_heads=attention.kv_heads,
            head_dim=attention.head_dim,
            epsilon=spec.norm_epsilon,
        )

    def reserve_positions(self, positions: int) -> None:
        """Extend the rotary tables to ``positions``; a row depends on its position only, so no result changes."""
        if positions > self._cosine.shape[0]:
            self._cosine, self._sine = rotary_tables(positions, *self._rotary)

    def forward(
        self,
        tokens: Tokens,
        cache: KVCache,
        source: ExpertSource,
        draft: Draft | None = None,
        rows: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], Routings]:
        """Compute the tokens and store their keys and values.

        :param draft: None computes the target; otherwise MSB slices of allowed experts only.
        :param rows: the tokens whose logits are wanted; None is all.
        :returns: logits (rows, vocabulary) float32 and the routings of the MoE layers.
        :raises NumericsError: a non-finite value appeared, or an expert's slice was not readable.
        """
        backend, spec = self._backend, self.spec
        x = backend.embed(self._embedding, tokens.ids)
        layers: list[Routing] = []
        stack = self._stack_of(source, draft)
        for layer in range(len(spec.layers) if stack is None else stack.first):
            backend.attention_block(
                self._attention[layer], x, cache, layer, tokens.slots, tokens.positions, self._cosine, self._sine
            )
            if layer in self._dense:
                self._dense_ffn(layer, x)
                continue
            weights = self._routers[layer]
            if draft is None:
                routing = backend.route(weights, x)
                self._experts(layer, routing, source, x, None)
            else:
                routing = backend.route(weights, x, draft.allowed[len(layers)], draft.top_k, draft.rescale)
                self._experts(layer, routing, source, x, draft)
            layers.append(routing)
        if stack is None:
            routings = Routings(*([getattr(layer, name) for layer in layers] for name in ("ranked", "scores", "experts")))
        else:
            routings = self._forward(stack, x, tokens, cache, source, draft)
        if rows is not None:
            x = np.ascontiguousarray(x[rows])
        if x.shape[0] == 0:
            return np.empty((0, spec.vocabulary), np.float32), routings
        return backend.logits(self._final_norm, spec.norm_epsilon, self._head, x), routings

    def _stack_of(self, source: Any, draft: Draft | None) -> Any:
        """The MoE layers as one stack, where backend, source and draft allow to compute them in one call; else None."""
        if not hasattr(source, "tables") or not hasattr(self._backend, "forward"):
            return None
        spec, tables = self.spec, source.tables
        if not tables:
            return None
        if draft is not None and (
            draft.bits != 4 or np.count_nonzero(draft.allowed, axis=1).min() < min(draft.top_k, spec.top_k)
        ):
            return None
        if self._stack is None or self._stack.addresses is not tables:
            first = len(spec.layers) - len(tables)
            if spec.moe_layers != tuple(range(first, len(spec.layers))):
                return None
            self._stack = self._backend.LayerStack(
                first, tuple(self._attention[first:]), tuple(self._routers.values()), self._layouts[first], tables
            )
        return self._stack

    def _forward(
        self, stack: Any, x: NDArray[np.float32], tokens: Tokens, cache: KVCache, source: Any, draft: Draft | None
    ) -> Routings:
        """All MoE layers in one call."""
        choice = () if draft is None else (draft.allowed, draft.top_k, draft.rescale, True, draft.offset)
        feed = source.feed(draft is not None)
        ranked, scores, experts, _ = self._backend.forward(
            stack, x, cache, tokens.slots, tokens.positions, self._cosine, self._sine, *choice, feed=feed
        )
        if feed is None:
            source.note(ranked, experts, draft is not None)
        return Routings(ranked, scores, experts)

    def _experts(
        self, layer: int, routing: Routing, source: ExpertSource, x: NDArray[np.float32], draft: Draft | None
    ) -> None:
        """Run the routed experts, stretch by stretch; several are chained from zero in ascending order, as one call does."""
        coarse, offset = draft is not None and draft.bits == 4, 8.0 if draft is None else draft.offset
        total: NDArray[np.float32] | None = None
        for stretch in source.stretches(layer, routing, draft is not None):
            target = x
            if not stretch.whole:
                total = target = np.zeros_like(x) if total is None else total
            self._backend.expert_ffn(
                self._layouts[layer], stretch.addresses, routing.hidden, stretch.experts, routing.weights, target, coarse,
                offset, not stretch.whole,
            )  # fmt: skip
        if total is not None:
            x += total

    def _dense_ffn(self, layer: int, x: NDArray[np.float32]) -> None:
        """A dense FFN is one expert of weight 1, always at full precision."""
        norm, addresses = self._dense[layer]
        hidden = self._backend.rms_norm(x, norm, self.spec.norm_epsilon)
        tokens = x.shape[0]
        self._backend.expert_ffn(
            self._layouts[layer], addresses, hidden, np.zeros((tokens, 1), np.int32), np.ones((tokens, 1), np.float32), x
        )


def grouped_attention(spec: ModelSpec, layer: int = 0) -> GroupedAttention:
    """The attention of a layer; ModelError where it is of another kind."""
    attention = spec.layers[layer].attention
    if not isinstance(attention, GroupedAttention):
        raise ModelError(f"layer {layer}: attention of kind {type(attention).__name__} is not supported")
    return attention


def rope_of(attention: GroupedAttention) -> Rope:
    """Its rotary embedding; ModelError where it has none."""
    if attention.rope is None:
        raise ModelError("attention without rotary embedding is not supported")
    return attention.rope
