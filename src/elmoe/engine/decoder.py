"""The forward pass of a model: embedding, layers, vocabulary projection, on any backend.

Knows nothing of budgets, sampling or sequences: it is told where each token sits and asks an expert source for the bytes of
the experts it needs.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import (
    AttentionWeights,
    Backend,
    DenseWeights,
    Draft,
    ExpertFeed,
    ExpertLayout,
    ExpertTerms,
    KVCache,
    LatentWeights,
    LayerStack,
    LayerWeights,
    Matrix,
    Places,
    Report,
    RouterWeights,
    Routings,
    SharedWeights,
)
from elmoe.bitslice.formats import QuantizedMatrix, StackedMatrix
from elmoe.bitslice.rotary import tables_of
from elmoe.engine.rotary import frequencies_of
from elmoe.errors import ModelError
from elmoe.models.spec import GroupedAttention, LatentAttention, ModelSpec, Moe, Multipliers, Rope, YarnScaling

__all__ = ["AllExperts", "Decoder", "Draft", "ExpertSource", "Places", "Routings", "WeightReader"]

AddressTables = tuple[NDArray[np.int64], ...]
"""The (experts, 2) addresses of the MSB and LSB records of each MoE layer."""


class WeightReader(Protocol):
    """What the decoder needs of a store."""

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        ...

    def matrix(self, name: str) -> Matrix:
        """A matrix by its store name."""
        ...

    def array(self, name: str) -> NDArray[np.float32]:
        """A float32 tensor by its store name."""
        ...

    def expert_layout(self, layer: int, shared: bool = False) -> ExpertLayout:
        """How an expert (or the dense FFN, or the shared expert) of a layer lies in memory."""
        ...

    def expert_addresses(self, layer: int, shared: bool = False) -> NDArray[np.int64]:
        """(experts, 2) addresses of the MSB and LSB records of a layer; (1, 2) of its shared expert."""
        ...


class ExpertSource(Protocol):
    """Where the bytes of routed experts come from."""

    @property
    def tables(self) -> AddressTables:
        """Where the experts lie; always the same arrays."""
        ...

    def feed(self, draft: bool) -> ExpertFeed | None:
        """The feed of a pass; None where the experts that it may use stay where they are."""
        ...

    def note(self, routings: Routings, draft: bool) -> None:
        """Told the routings of a pass that had no feed, after it."""
        ...


class AllExperts:
    """The source of a model that is wholly in memory."""

    def __init__(self, reader: WeightReader) -> None:
        self.tables: AddressTables = tuple(reader.expert_addresses(layer) for layer in reader.spec.moe_layers)

    def feed(self, draft: bool) -> None:
        """See ``ExpertSource``."""

    def note(self, routings: Routings, draft: bool) -> None:
        """See ``ExpertSource``."""


class Decoder:
    """A model on a backend. ``forward`` may be called from one thread at a time. ``ranks``: experts that its routings rank;
    None is ``2 * top_k``.

    No backend knows of multipliers. The residual stream is kept divided by the multiplier of what layers add to it, so that
    they add it as it is: an RMS norm of it is the same with an epsilon that is divided by the square. The final norm's
    weight is divided by what divides the logits.
    """

    def __init__(self, reader: WeightReader, backend: Backend, ranks: int | None = None) -> None:
        self.spec = spec = reader.spec
        self._backend = backend
        self._embedding = reader.matrix("embedding")
        self._head = self._embedding if spec.tied_embeddings else reader.matrix("head")
        self._multipliers, self._epsilon = spec.multipliers, spec.norm_epsilon / spec.multipliers.residual**2
        self._final_norm = reader.array("final_norm") / np.float32(spec.multipliers.logits)
        self._layers = [self._layer_weights(reader, layer, ranks) for layer in range(len(spec.layers))]
        self._rotary = frequencies_of(rope_of(spec.layers[0].attention))
        self._cosine, self._sine = tables_of(0, *self._rotary)
        self._stack: tuple[AddressTables, LayerStack] | None = None

    def _layer_weights(self, reader: WeightReader, layer: int, ranks: int | None) -> LayerWeights:
        """A layer's weights; its experts' addresses are the source's."""
        spec, name = self.spec, f"layers.{layer}."
        norm, found = reader.array(f"{name}ffn_norm"), spec.layers[layer].attention
        attention: AttentionWeights | LatentWeights
        if isinstance(found, GroupedAttention):
            attention = _grouped_weights(reader, name, found, self._epsilon)
        else:
            attention = _latent_weights(reader, name, found, self._epsilon)
        if layer in spec.dense_layers:
            addresses = reader.expert_addresses(layer)
            return LayerWeights(attention, DenseWeights(norm, self._epsilon), reader.expert_layout(layer), addresses)
        moe, none = spec.moe(layer), np.zeros((spec.experts, 2), np.int64)
        router = RouterWeights(
            norm, reader.array(f"{name}router"), self._epsilon, spec.top_k,
            moe.router.normalize or moe.router.score == "chosen_softmax", ranks,
            reader.array(f"{name}router_bias") if moe.router.logit_bias else None, moe.router.score == "sigmoid",
            reader.array(f"{name}selection_bias") if moe.router.selection_bias else None, moe.router.scaling,
            moe.router.groups, moe.router.kept_groups, moe.router.group_score == "best_two",
        )  # fmt: skip
        shared, terms = _shared_weights(reader, layer, moe), _terms(reader, layer, moe)
        return LayerWeights(attention, router, reader.expert_layout(layer), none, terms, shared)

    @property
    def routers(self) -> tuple[RouterWeights, ...]:
        """The routers of the MoE layers."""
        return LayerStack(tuple(self._layers)).routers

    def stack(self, tables: AddressTables) -> LayerStack:
        """All layers, the experts of MoE layers at the addresses ``tables``; made once for a source."""
        if self._stack is None or self._stack[0] is not tables:
            rows = iter(tables)
            layers = [
                one if isinstance(one.feed_forward, DenseWeights)
                else replace(one, addresses=next(rows))
                for one in self._layers
            ]  # fmt: skip
            self._stack = tables, LayerStack(tuple(layers))
        return self._stack[1]

    def reserve_positions(self, positions: int) -> None:
        """Extend the rotary tables to ``positions``; a row depends on its position only, so no result changes."""
        if positions > self._cosine.shape[0]:
            self._cosine, self._sine = tables_of(positions, *self._rotary)

    def forward(
        self,
        ids: NDArray[np.int32],
        places: Places,
        cache: KVCache,
        source: ExpertSource,
        draft: Draft | None = None,
        rows: NDArray[np.int64] | None = None,
        report: Report | None = None,
    ) -> tuple[NDArray[np.float32], Routings]:
        """Compute the tokens and store their keys and values.

        :param ids: (tokens,) of which ``places`` tells where they are.
        :param draft: None computes the target.
        :param rows: the tokens whose logits are wanted; None is all.
        :param report: takes the spans of the layers and of "logits".
        :returns: logits (rows, vocabulary) float32 and the routings of the MoE layers.
        :raises NumericsError: a non-finite value appeared, or an expert's slice was not readable.
        """
        backend, spec = self._backend, self.spec
        x = backend.embed(self._embedding, ids)
        if self._multipliers != Multipliers():
            x *= self._multipliers.embedding / self._multipliers.residual
        feed = source.feed(draft is not None)
        routings = backend.forward(
            self.stack(source.tables), x, cache, places, self._cosine, self._sine, draft=draft, feed=feed, report=report

        )  # fmt: skip
        if feed is None and spec.moe_layers:
            source.note(routings, draft is not None)
        if rows is not None:
            x = np.ascontiguousarray(x[rows])
        if x.shape[0] == 0:
            return np.empty((0, spec.vocabulary), np.float32), routings
        began = perf_counter()
        logits = backend.logits(self._final_norm, self._epsilon, self._head, x)
        if report is not None:
            report("logits", began, perf_counter())
        return logits, routings


def _grouped_weights(reader: WeightReader, name: str, grouped: GroupedAttention, epsilon: float) -> AttentionWeights:
    normed = grouped.query_key_norm != "none"
    return AttentionWeights(
        norm=reader.array(f"{name}attention_norm"),
        query_key_value=reader.matrix(f"{name}query_key_value"),
        query_norm=reader.array(f"{name}query_norm") if normed else None,
        key_norm=reader.array(f"{name}key_norm") if normed else None,
        output=reader.matrix(f"{name}attention_output"),
        heads=grouped.heads,
        kv_heads=grouped.kv_heads,
        head_dim=grouped.head_dim,
        epsilon=epsilon,
        projection_bias=reader.array(f"{name}query_key_value_bias") if grouped.query_key_value_bias else None,
        output_bias=reader.array(f"{name}attention_output_bias") if grouped.output_bias else None,
        sinks=reader.array(f"{name}sinks") if grouped.sinks else None,
        window=grouped.window,
        scale=grouped.score_scale,
    )


def _latent_weights(reader: WeightReader, name: str, latent: LatentAttention, epsilon: float) -> LatentWeights:
    scaling, scale = latent.rope.scaling, latent.score_scale
    if scale is None:
        scale = (scaling.score_factor if isinstance(scaling, YarnScaling) else 1.0) / sqrt(latent.query_dim)
    two = latent.query_rank is not None
    return LatentWeights(
        norm=reader.array(f"{name}attention_norm"),
        query_latent=reader.matrix(f"{name}query_latent"),
        query_norm=reader.array(f"{name}query_norm") if two else None,
        query_up=reader.matrix(f"{name}query_up") if two else None,
        latent_norm=reader.array(f"{name}latent_norm"),
        key_up=_of_one_format(reader, f"{name}key_up"),
        value_up=_of_one_format(reader, f"{name}value_up"),
        output=reader.matrix(f"{name}attention_output"),
        heads=latent.heads,
        plain_dim=latent.plain_dim,
        rotary_dim=latent.rope.dimensions,
        epsilon=epsilon,
        latent_epsilon=latent.norm_epsilon,
        scale=scale,
        interleaved=latent.rope.interleaved,
    )


def _of_one_format(reader: WeightReader, name: str) -> QuantizedMatrix:
    """A matrix that is one tensor of the checkpoint."""
    matrix = reader.matrix(name)
    assert not isinstance(matrix, StackedMatrix)
    return matrix


def _shared_weights(reader: WeightReader, layer: int, moe: Moe) -> SharedWeights | None:
    """The expert of a layer that every token uses, if it has one."""
    if not moe.shared_width:
        return None
    gate = reader.array(f"layers.{layer}.shared_expert_gate").reshape(-1) if moe.shared_gate else None
    return SharedWeights(reader.expert_layout(layer, shared=True), reader.expert_addresses(layer, shared=True), gate)


def _terms(reader: WeightReader, layer: int, moe: Moe) -> ExpertTerms | None:
    """What a layer's experts compute beside their matrices; None where that is nothing."""
    if not moe.bias or moe.activation.limit is None:
        return None
    gate, up, down = (reader.array(f"layers.{layer}.expert_{name}_bias") for name in ("gate", "up", "down"))
    return ExpertTerms(gate, up, down, moe.activation.alpha, moe.activation.limit)


def rope_of(attention: GroupedAttention | LatentAttention) -> Rope:
    """Its rotary embedding; ModelError where it has none."""
    if attention.rope is None:
        raise ModelError("attention without rotary embedding is not supported")
    return attention.rope
