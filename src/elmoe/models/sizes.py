"""How large a model is: weights, bytes in their formats, bytes of its cache, and work of its attention.

Sums over the layers of a spec, which may differ. Norms, biases and attention sinks (below 0.1 % of the weights) and modules
that predict further tokens are not counted. Windows are not counted either: every layer is taken to attend to all positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cached_property

import msgspec

from elmoe.errors import ModelError
from elmoe.models.formats import bits_of
from elmoe.models.spec import Dense, GroupedAttention, LatentAttention, LayerSpec, ModelSpec, Moe

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

    ``kv_bytes``: its cache of one position, fp16 (latent attention: the latent and the rotary key). ``attention_width``: see
    :func:`attention_width`. ``shared_parameters``: weights of its shared experts, with their gate. ``expert_parameters``:
    of one routed expert: gate, up and down projection. The bits are per weight with scales; ``expert_bits`` by slices.
    """

    attention_parameters: int
    attention_width: int
    kv_bytes: int
    dense_parameters: int = 0
    router_parameters: int = 0
    shared_parameters: int = 0
    experts: int = 0
    top_k: int = 0
    expert_width: int = 0
    expert_parameters: int = 0
    expert_bits: tuple[float, ...] = (0.0,)
    matrix_bits: float
    dense_bits: float
    router_bits: float

    @property
    def parameters(self) -> int:
        """Weights that every token uses: attention, router and shared experts, or the dense feed-forward."""
        return self.attention_parameters + self.router_parameters + self.shared_parameters + self.dense_parameters

    @property
    def bytes(self) -> float:
        """Bytes of ``parameters``."""
        matrices = (self.attention_parameters + self.shared_parameters) * self.matrix_bits
        return (matrices + self.router_parameters * self.router_bits + self.dense_parameters * self.dense_bits) / 8

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

    ``formats``: kind of weights (see :data:`DEFAULTS`), or store name of a layer's feed-forward (``layers.3.experts``,
    ``layers.0.dense_ffn``), to a format of :data:`BITS` or of a store.

    :raises ModelError: a format is not known, or given for what the model does not have.
    """

    spec: ModelSpec
    name: str
    source: str
    formats: dict[str, str] = {}

    def __post_init__(self) -> None:
        names = {_ffn_name(index, layer) for index, layer in enumerate(self.spec.layers)}
        for key, format in self.formats.items():
            if key not in DEFAULTS and key not in names:
                raise ModelError(f"model '{self.name}': a format is given for '{key}', which it does not have")
            if format not in BITS:
                try:
                    bits_of(format)
                except ModelError:
                    raise ModelError(
                        f"model '{self.name}': '{key}' has the unknown format '{format}'", f"known: {', '.join(BITS)}"
                    ) from None

    def _bits(self, kind: str, name: str = "") -> tuple[float, ...]:
        format = self.formats.get(name) or self.formats.get(kind) or DEFAULTS[kind]
        return BITS.get(format) or bits_of(format)

    @cached_property
    def layers(self) -> tuple[LayerSizes, ...]:
        """Every layer, in order."""
        return tuple(self._layer(index, layer) for index, layer in enumerate(self.spec.layers))

    def _layer(self, index: int, layer: LayerSpec) -> LayerSizes:
        hidden, found, attention = self.spec.hidden, layer.feed_forward, layer.attention
        name, matrix = _ffn_name(index, layer), sum(self._bits("matrices"))
        common = LayerSizes(
            attention_parameters=attention_parameters(attention, hidden), attention_width=attention_width(attention),
            kv_bytes=2 * attention.cache_values, matrix_bits=matrix, dense_bits=matrix,
            router_bits=sum(self._bits("routers")),
        )  # fmt: skip
        if isinstance(found, Dense):
            bits = sum(self._bits("matrices", name))
            return msgspec.structs.replace(common, dense_parameters=3 * hidden * found.width, dense_bits=bits)
        return msgspec.structs.replace(
            common, experts=found.router.experts, top_k=found.router.top_k, router_parameters=hidden * found.router.experts,
            shared_parameters=3 * hidden * found.shared_width + (hidden if found.shared_gate else 0),
            expert_width=found.width, expert_parameters=3 * hidden * found.width, expert_bits=self._bits("experts", name),
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
        if len({(layer.expert_width, layer.expert_bits) for layer in self.moe_layers}) > 1:
            raise ModelError(
                f"model '{self.name}': layers differ in the size of their experts", "the simulator needs one size"
            )
        return self.moe_layers[0]

    @property
    def dense_bits(self) -> float:
        """Bits per weight of everything dense but routers."""
        return sum(self._bits("matrices"))

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding table, and of the output head, each."""
        return self.spec.vocabulary * self.spec.hidden

    @property
    def head_bytes(self) -> float:
        """Bytes of the output head, which every token reads; the embedding table has as many (tied: it is the same)."""
        return self.embedding_parameters * self.dense_bits / 8

    @property
    def tables(self) -> int:
        """Matrices of the vocabulary: embedding table and head, or the one that is both."""
        return 1 if self.spec.tied_embeddings else 2

    @property
    def dense_bytes(self) -> float:
        """Bytes of all that is not an expert: layers, head, embedding table."""
        return self._sum(lambda layer: layer.bytes) + self.tables * self.head_bytes

    @property
    def total_bytes(self) -> float:
        """Bytes of the whole model."""
        return self.dense_bytes + self._sum(lambda layer: layer.experts * layer.expert_bytes)

    @property
    def active_bytes(self) -> float:
        """Bytes of weights that decoding one token reads: one row of the embedding table, everything else dense, the head
        and the top-k experts of each layer."""
        row = self.spec.hidden * self.dense_bits / 8
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


def _ffn_name(index: int, layer: LayerSpec) -> str:
    return f"layers.{index}.{'experts' if isinstance(layer.feed_forward, Moe) else 'dense_ffn'}"
