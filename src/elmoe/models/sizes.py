"""How large a model is: weights, bytes in their formats, bytes of its cache, and work of its attention.

Sums over the layers of a spec, which may differ. Norms, biases and attention sinks (below 0.1 % of the weights) and modules
that predict further tokens are not counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property

import msgspec

from elmoe.errors import ModelError
from elmoe.models.formats import format_named, split_formats
from elmoe.models.spec import Dense, GroupedAttention, LatentAttention, LayerSpec, ModelSpec
from elmoe.models.tensors import PROJECTIONS, Tensor, feed_forwards, tensors

BITS: dict[str, tuple[float, ...]] = {
    "nested8": (4.5, 4.0), "affine4": (4.625,), "table4": (4.25,), "planes6": (4.5625, 2.0), "bfloat16": (16.0,),
    "float32": (32.0,),
}  # fmt: skip
"""Bits per weight with scales, by slices: MSB, then LSB where a format has one, of formats that a study may give a model. A
store's formats (``models.formats``), one or one for each projection, are known beside them.

``nested8``: INT8 with an fp16 scale for 32 weights, which lies with the MSB slice. ``affine4``: as Q4_K. ``table4``: MXFP4.
Both have no bit axis. ``planes6``: as Q6_K.
"""
DEFAULTS = {"experts": "nested8", "matrices": "nested8", "routers": "float32"}
"""Format of each kind of weights: routed experts, everything else dense, routers (fp32, as the engine keeps them)."""


class Precision(msgspec.Struct, frozen=True):
    """How weights are kept, by slices, MSB first. ``bits``: per weight, with scales. ``passes``: of 4 bits that an array of
    4-bit multipliers takes for one weight. Both are means where formats are mixed."""

    bits: tuple[float, ...] = (0.0,)
    passes: tuple[float, ...] = (0.0,)

    @classmethod
    def of(cls, weights: Iterable[tuple[str, int]]) -> Precision:
        """Of (name of a format, how many weights have it)."""
        found = [(BITS.get(name) or format_named(name).bits, count) for name, count in weights]
        slices, total = max(len(bits) for bits, _ in found), sum(count for _, count in found)

        def mean(value: Callable[[float], float]) -> tuple[float, ...]:
            return tuple(
                sum(count * value(bits[index]) for bits, count in found if index < len(bits)) / total
                for index in range(slices)
            )

        return cls(mean(lambda bits: bits), mean(lambda bits: max(1.0, round(bits / 4))))

    def at_most(self, other: Precision | None) -> Precision:
        """Itself, or another that has fewer bits."""
        return self if other is None or sum(self.bits) <= sum(other.bits) else other

    def bytes_of(self, weights: float) -> float:
        """Bytes of so many weights."""
        return weights * sum(self.bits) / 8


def attention_parameters(attention: GroupedAttention | LatentAttention, hidden: int) -> int:
    """Weights of one layer's attention: query, key, value and output projections; latent attention through its ranks."""
    if isinstance(attention, GroupedAttention):
        gate = hidden * attention.query_width if attention.gate else 0
        return 2 * hidden * (attention.query_width + attention.kv_width) + gate
    query, rank, latent = attention.heads * attention.query_dim, attention.query_rank, attention.latent_rank
    queries = hidden * query if rank is None else rank * (hidden + query)
    down = hidden * (latent + attention.rope.dimensions)
    up = latent * attention.heads * (attention.plain_dim + attention.value_dim)
    return queries + down + up + attention.heads * attention.value_dim * hidden


def attention_width(attention: GroupedAttention | LatentAttention) -> int:
    """Multiply-accumulates of one layer per token and cached position: heads x (width of a score + width of a value).

    Latent attention in its absorbed form, both over the latent, as decoding from the compressed cache needs it.
    """
    if isinstance(attention, GroupedAttention):
        return 2 * attention.query_width
    return attention.heads * (attention.cache_values + attention.latent_rank)


class LayerSizes(msgspec.Struct, frozen=True, kw_only=True):
    """One layer. Parts that it does not have count 0.

    ``kv_bytes``: its cache of one position, fp16 (latent attention: the latent and the rotary key). ``window``: positions
    that a token attends to, None for all. ``attention_width``: see :func:`attention_width`. ``shared_parameters``: weights
    of its shared experts, with their gate. ``expert_parameters``: of one routed expert: gate, up and down projection.
    """

    attention_parameters: int
    attention_width: int
    kv_bytes: int
    window: int | None = None
    dense_parameters: int = 0
    router_parameters: int = 0
    shared_parameters: int = 0
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    expert_parameters: int = 0
    expert_precision: Precision = Precision()
    attention_precision: Precision
    shared_precision: Precision = Precision()
    dense_precision: Precision = Precision()
    router_bits: float

    @property
    def parameters(self) -> int:
        """Weights that every token uses: attention, router and shared experts, or the dense feed-forward."""
        return self.attention_parameters + self.router_parameters + self.shared_parameters + self.dense_parameters

    @property
    def bytes(self) -> float:
        """Bytes of ``parameters``."""
        matrices = self.attention_precision.bytes_of(self.attention_parameters)
        matrices += self.shared_precision.bytes_of(self.shared_parameters)
        return (
            matrices + self.dense_precision.bytes_of(self.dense_parameters) + self.router_parameters * self.router_bits / 8
        )

    def cached_positions(self, context: int, computed: int = 1) -> int:
        """Positions in its cache of a sequence of ``context`` positions, that a pass over the last ``computed`` needs."""
        return context if self.window is None else min(context, self.window - 1 + computed)

    @property
    def expert_bits(self) -> tuple[float, ...]:
        """Bits per weight of an expert, by slices."""
        return self.expert_precision.bits

    @property
    def msb_bytes(self) -> float:
        """Bytes of one expert's first slice, with its scales."""
        return self.expert_parameters * self.expert_bits[0] / 8

    @property
    def lsb_bytes(self) -> float:
        """Bytes of one expert's other slice; 0 without a bit axis."""
        return self.expert_parameters * sum(self.expert_bits[1:]) / 8

    @property
    def expert_bytes(self) -> float:
        """Bytes of one expert, all its bits."""
        return self.expert_parameters * sum(self.expert_bits) / 8


class ModelSizes(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A spec with the formats of its weights. ``name`` and ``source`` say what it is and where it was read.

    ``formats``: kind of weights (see :data:`DEFAULTS`), or store name of a matrix or a feed-forward (``head``,
    ``layers.3.experts``), to a format of :data:`BITS` or of a store, or to the joined ones of its parts.

    :raises ModelError: a format is not known, or given for what the model does not have.
    """

    spec: ModelSpec
    name: str
    source: str
    formats: dict[str, str] = {}

    def __post_init__(self) -> None:
        for key, format in self.formats.items():
            try:
                if key in DEFAULTS:
                    _ = BITS.get(format) or format_named(format)
                elif key in self._weights:
                    self._precision("", key)
                else:
                    raise ModelError("a format is given for what the model does not have")
            except ModelError as error:
                raise ModelError(
                    f"model '{self.name}': '{key}': {error}", error.hint or f"known: {', '.join(BITS)}"
                ) from None

    @cached_property
    def _weights(self) -> dict[str, tuple[int, ...]]:
        """Store name of a matrix or feed-forward -> weights of its parts, one of each expert."""
        found = {part.name: (part.hidden * part.width,) * len(PROJECTIONS) for part in feed_forwards(self.spec)}
        return found | {one.name: _part_sizes(one) for one in self._matrices}

    @cached_property
    def _matrices(self) -> list[Tensor]:
        return [one for one in tensors(self.spec) if one.kind == "matrix"]

    def _precision(self, kind: str, *names: str) -> Precision:
        """Of what has these names in a store, each in its own format or that of its kind."""
        default = self.formats.get(kind) or DEFAULTS.get(kind, "")
        if not any(name in self.formats for name in names):
            return Precision.of([(default, 1)])
        weights: list[tuple[str, int]] = []
        for name in names:
            format, sizes = self.formats.get(name, default), self._weights[name]
            parts = [format] * len(sizes) if format in BITS else [one.name for one in split_formats(format, len(sizes))]
            weights += zip(parts, sizes, strict=True)
        return Precision.of(weights)

    def _attention(self, index: int) -> Precision:
        """Of the matrices of a layer's attention."""
        if all(key in DEFAULTS for key in self.formats):
            return self._precision("matrices")
        return self._precision("matrices", *(one.name for one in self._matrices if one.layer == index))

    @cached_property
    def layers(self) -> tuple[LayerSizes, ...]:
        """Every layer, in order."""
        return tuple(self._layer(index, layer) for index, layer in enumerate(self.spec.layers))

    def _layer(self, index: int, layer: LayerSpec) -> LayerSizes:
        hidden, found, attention = self.spec.hidden, layer.feed_forward, layer.attention
        common = LayerSizes(
            attention_parameters=attention_parameters(attention, hidden), attention_width=attention_width(attention),
            kv_bytes=2 * attention.cache_values,
            window=attention.window if isinstance(attention, GroupedAttention) else None,
            attention_precision=self._attention(index),
            router_bits=sum(self._precision("routers").bits),
        )  # fmt: skip
        if isinstance(found, Dense):
            precision = self._precision("matrices", f"layers.{index}.dense_ffn")
            return msgspec.structs.replace(common, dense_parameters=3 * hidden * found.width, dense_precision=precision)
        return msgspec.structs.replace(
            common, experts=found.router.experts, top_k=found.router.top_k, router_parameters=hidden * found.router.experts,
            shared_parameters=3 * hidden * found.shared_width + (hidden if found.shared_gate else 0),
            expert_width=found.width, expert_parameters=3 * hidden * found.width,
            expert_precision=self._precision("experts", f"layers.{index}.experts"),
            shared_precision=self._precision("matrices", f"layers.{index}.shared_ffn"),
        )  # fmt: skip

    def _sum(self, count: Callable[[LayerSizes], float]) -> float:
        return sum(count(layer) for layer in self.layers)

    @cached_property
    def kinds(self) -> dict[LayerSizes, int]:
        """How many layers there are of each size, in the order of the model."""
        return dict(Counter(self.layers))

    @cached_property
    def moe_layers(self) -> tuple[LayerSizes, ...]:
        """The layers with experts, in order."""
        return tuple(layer for layer in self.layers if layer.experts)

    @cached_property
    def expert(self) -> LayerSizes:
        """A layer with experts, if all have experts of one size; ModelError where they differ or there is none."""
        if not self.moe_layers:
            raise ModelError(f"model '{self.name}' has no layer with experts")
        if len({(layer.expert_width, layer.expert_precision) for layer in self.moe_layers}) > 1:
            raise ModelError(f"model '{self.name}': layers differ in the size of their experts")
        return self.moe_layers[0]

    @cached_property
    def head_precision(self) -> Precision:
        """Of the output head."""
        return self._precision("matrices", "embedding" if self.spec.tied_embeddings else "head")

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding table, and of the output head, each."""
        return self.spec.vocabulary * self.spec.hidden

    @property
    def head_bytes(self) -> float:
        """Bytes of the output head, which every token reads."""
        return self.head_precision.bytes_of(self.embedding_parameters)

    @property
    def embedding_bytes(self) -> float:
        """Bytes of the embedding table, of which a token reads a row; tied, it is the head."""
        return self._precision("matrices", "embedding").bytes_of(self.embedding_parameters)

    def cache_bytes(self, context: int, computed: int = 1) -> int:
        """Bytes of the cache of a sequence: see :meth:`LayerSizes.cached_positions`."""
        return sum(layer.kv_bytes * layer.cached_positions(context, computed) for layer in self.layers)

    @property
    def tables(self) -> int:
        """Matrices of the vocabulary: embedding table and head, or the one that is both."""
        return 1 if self.spec.tied_embeddings else 2

    @property
    def dense_bytes(self) -> float:
        """Bytes of all that is not an expert: layers, head, embedding table."""
        return self._sum(lambda layer: layer.bytes) + self.head_bytes + (self.tables - 1) * self.embedding_bytes

    @property
    def total_bytes(self) -> float:
        """Bytes of the whole model."""
        return self.dense_bytes + self._sum(lambda layer: layer.experts * layer.expert_bytes)

    @property
    def active_bytes(self) -> float:
        """Bytes of weights that decoding one token reads: one row of the embedding table, everything else dense, the head
        and the top-k experts of each layer."""
        row = self.embedding_bytes / self.spec.vocabulary
        return self._sum(lambda layer: layer.bytes + layer.top_k * layer.expert_bytes) + self.head_bytes + row

    @property
    def parameters(self) -> int:
        """Weights of the whole model, both embeddings counted unless tied."""
        layers = sum(layer.parameters + layer.experts * layer.expert_parameters for layer in self.layers)
        return layers + self.tables * self.embedding_parameters

    @property
    def active_parameters(self) -> int:
        """Weights one token multiplies with, the head included, the embedding table not (publishers differ on it)."""
        layers = sum(layer.parameters + layer.top_k * layer.expert_parameters for layer in self.layers)
        return layers + self.embedding_parameters


def _part_sizes(tensor: Tensor) -> tuple[int, ...]:
    return tuple(part.shape[0] * part.shape[1] for part in tensor.parts)
