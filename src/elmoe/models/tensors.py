"""The one list of a spec's tensors: what a store calls them, their shapes, and the checkpoint's tensors they are made of.

Reader, writer, synthetic stores, sizes, conversion, export and tests iterate this list; a family only maps roles to names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Literal

from elmoe.errors import ModelError
from elmoe.models.formats import BLOCK_ROWS, JOIN, Format, split_formats
from elmoe.models.spec import Dense, GroupedAttention, LatentAttention, LayerSpec, ModelSpec, Moe

PROJECTIONS = ("gate", "up", "down")
"""Matrices of a feed-forward, in the order of a record."""
FLOATS, DEFAULT = "float32", "nested8"
"""Format of what is not quantised, and of a matrix where nothing else is said."""
Formats = Mapping[str, str]
"""Store name of a tensor or of a feed-forward -> name of its format, where it is not the default one of its kind; formats of
parts, or of gate, up and down projection, are joined by ``+`` where they differ."""


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint. ``role``: key of a family's names; ``shape``: outermost dimension first. ``heads``: where
    rows are those of heads, and GGUF has an axis of heads before them; else 0."""

    role: str
    shape: tuple[int, ...]
    heads: int = 0


@dataclass(frozen=True)
class Tensor:
    """A tensor of the store, all but feed-forwards. ``kind``: a ``matrix`` has a quantised format, ``floats`` stay float32.
    ``parts`` lie one below the other; ``layer`` is None outside the layers."""

    name: str
    kind: Literal["matrix", "floats"]
    parts: tuple[Part, ...]
    layer: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows of all parts, then the columns."""
        return sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:]

    def format(self, formats: Formats) -> str:
        """The format in which a store with these ``formats`` holds the tensor; ModelError for one that it cannot have."""
        found = formats.get(self.name, DEFAULT if self.kind == "matrix" else FLOATS)
        if self.kind == "matrix":
            self.pieces(found)
        elif found != FLOATS:
            raise ModelError(f"tensor '{self.name}' cannot have the format '{found[:80]}'", f"supported: {FLOATS}")
        return found

    def pieces(self, format: str) -> dict[str, tuple[Tensor, Format]]:
        """What of a matrix has one format: the whole, or each part. The keys go before the names of sections: empty, or the
        part's role and a dot. ModelError for a format that it cannot have."""
        try:
            found = split_formats(format, len(self.parts))
        except ModelError as error:
            raise ModelError(f"tensor '{self.name}': {error}", error.hint) from None
        if JOIN not in format:
            return {"": (self, found[0])}
        if any(part.shape[0] % BLOCK_ROWS for part in self.parts[:-1]):
            raise ModelError(
                f"tensor '{self.name}' has parts of several formats, and their rows do not fill blocks of {BLOCK_ROWS}"
            )
        return {f"{part.role}.": (replace(self, parts=(part,)), one) for part, one in zip(self.parts, found, strict=True)}


@dataclass(frozen=True)
class FeedForward:
    """Gate, up and down projection of ``count`` experts, or of one dense feed-forward or shared expert, from ``hidden`` to
    ``width`` inner units and back. Each of them is one record, or one record a slice, in the store."""

    name: str
    kind: Literal["expert", "dense", "shared"]
    layer: int
    count: int
    hidden: int
    width: int

    def shape(self, projection: str) -> tuple[int, int]:
        """(rows, columns) of a projection."""
        return (self.hidden, self.width) if projection == "down" else (self.width, self.hidden)

    def format(self, formats: Formats) -> str:
        """The format of its records in a store with these ``formats``; ModelError for one that it cannot have."""
        found = formats.get(self.name, DEFAULT)
        try:
            split_formats(found, len(PROJECTIONS))
        except ModelError as error:
            raise ModelError(f"'{self.name}': {error}", error.hint) from None
        return found

    def part(self, projection: str) -> Part:
        """The checkpoint's tensor of a projection, of one expert."""
        return Part(f"{self.kind}_{projection}", self.shape(projection))


def tensors(spec: ModelSpec) -> Iterator[Tensor]:
    """All tensors but feed-forwards, in the order of the store."""
    embedding = (spec.vocabulary, spec.hidden)
    yield Tensor("embedding", "matrix", (Part("embedding", embedding),))
    if not spec.tied_embeddings:
        yield Tensor("head", "matrix", (Part("head", embedding),))
    yield Tensor("final_norm", "floats", (Part("final_norm", (spec.hidden,)),))
    for index, layer in enumerate(spec.layers):
        yield from _layer_tensors(spec, index, layer)


def _floats(layer: int, name: str, *shape: int) -> Tensor:
    return Tensor(f"layers.{layer}.{name}", "floats", (Part(name, shape),), layer)


def _matrix(layer: int, name: str, *parts: Part) -> Tensor:
    return Tensor(f"layers.{layer}.{name}", "matrix", parts, layer)


def _layer_tensors(spec: ModelSpec, index: int, layer: LayerSpec) -> Iterator[Tensor]:
    hidden, attention, moe, floats = spec.hidden, layer.attention, layer.feed_forward, partial(_floats, index)
    yield floats("attention_norm", hidden)
    if isinstance(attention, GroupedAttention):
        yield from _grouped_tensors(attention, hidden, index)
    else:
        yield from _latent_tensors(attention, hidden, index)
    yield floats("ffn_norm", hidden)
    if isinstance(moe, Moe):
        experts = moe.router.experts
        yield floats("router", experts, hidden)
        if moe.router.logit_bias:
            yield floats("router_bias", experts)
        if moe.router.selection_bias:
            yield floats("selection_bias", experts)
        if moe.bias:
            yield floats("expert_gate_bias", experts, moe.width)
            yield floats("expert_up_bias", experts, moe.width)
            yield floats("expert_down_bias", experts, hidden)
        if moe.shared_gate:
            yield floats("shared_expert_gate", 1, hidden)


def _grouped_tensors(attention: GroupedAttention, hidden: int, index: int) -> Iterator[Tensor]:
    query, kv, floats, matrix = attention.query_width, attention.kv_width, partial(_floats, index), partial(_matrix, index)
    yield matrix("query_key_value", Part("query", (query, hidden)), Part("key", (kv, hidden)), Part("value", (kv, hidden)))
    if attention.query_key_value_bias:
        biases = Part("query_bias", (query,)), Part("key_bias", (kv,)), Part("value_bias", (kv,))
        yield Tensor(f"layers.{index}.query_key_value_bias", "floats", biases, index)
    if attention.query_key_norm != "none":
        per_head = attention.query_key_norm == "head"
        yield floats("query_norm", attention.head_dim if per_head else query)
        yield floats("key_norm", attention.head_dim if per_head else kv)
    yield matrix("attention_output", Part("attention_output", (hidden, query)))
    if attention.output_bias:
        yield floats("attention_output_bias", hidden)
    if attention.sinks:
        yield floats("sinks", attention.heads)


def _latent_tensors(attention: LatentAttention, hidden: int, index: int) -> Iterator[Tensor]:
    """``key_up`` holds the transposed key projection of each head, so that a query is multiplied with it."""
    heads, rank, query = attention.heads, attention.latent_rank, attention.query_width
    latent, floats, matrix = (
        Part("latent", (attention.cache_values, hidden)),
        partial(_floats, index),
        partial(_matrix, index),
    )
    if attention.query_rank is None:
        yield matrix("query_latent", Part("query", (query, hidden)), latent)
    else:
        yield matrix("query_latent", Part("query_down", (attention.query_rank, hidden)), latent)
        yield floats("query_norm", attention.query_rank)
        yield matrix("query_up", Part("query_up", (query, attention.query_rank)))
    yield floats("latent_norm", rank)
    yield matrix("key_up", Part("key_up", (heads * rank, attention.plain_dim), heads))
    yield matrix("value_up", Part("value_up", (heads * attention.value_dim, rank), heads))
    yield matrix("attention_output", Part("attention_output", (hidden, heads * attention.value_dim)))


def feed_forward(spec: ModelSpec, layer: int) -> FeedForward:
    """The feed-forward of a layer: its routed experts, or the one dense network."""
    found = spec.layers[layer].feed_forward
    if isinstance(found, Dense):
        return FeedForward(f"layers.{layer}.dense_ffn", "dense", layer, 1, spec.hidden, found.width)
    return FeedForward(f"layers.{layer}.experts", "expert", layer, found.router.experts, spec.hidden, found.width)


def shared_feed_forward(spec: ModelSpec, layer: int) -> FeedForward | None:
    """The expert of a layer that every token uses, if it has one."""
    found = spec.layers[layer].feed_forward
    if not isinstance(found, Moe) or not found.shared_width:
        return None
    return FeedForward(f"layers.{layer}.shared_ffn", "shared", layer, 1, spec.hidden, found.shared_width)


def feed_forwards(spec: ModelSpec) -> list[FeedForward]:
    """The feed-forwards of all layers, in order, a shared expert behind the routed ones."""
    layers = range(len(spec.layers))
    found = [part for layer in layers for part in (feed_forward(spec, layer), shared_feed_forward(spec, layer))]
    return [part for part in found if part is not None]


def macs_per_token(spec: ModelSpec) -> float:
    """Multiply-accumulates of weights per token: all matrices but the embedding, a router, top-k experts."""
    dense = sum(prod(tensor.shape) for tensor in tensors(spec) if len(tensor.shape) == 2 and tensor.name != "embedding")
    head = spec.hidden * spec.vocabulary if spec.tied_embeddings else 0
    parts = feed_forwards(spec)
    used = [(spec.top_k if part.kind == "expert" else 1) * 3 * part.hidden * part.width for part in parts]
    return float(dense + head + sum(used))


def check_formats(spec: ModelSpec, formats: Formats) -> None:
    """ModelError where a map of formats names what the spec does not have, or a format that cannot be."""
    known: dict[str, Tensor | FeedForward] = {tensor.name: tensor for tensor in tensors(spec)}
    known |= {part.name: part for part in feed_forwards(spec)}
    for name in formats:
        if name not in known:
            raise ModelError(f"a format is given for '{name}', which the model does not have")
        known[name].format(formats)
