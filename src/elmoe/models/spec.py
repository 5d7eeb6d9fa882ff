"""What a model is: layers, each an attention and a feed-forward. Types and their checks, never how anything is computed.

A spec says more than today's kernels compute; :func:`elmoe.models.support.check_supported` refuses the rest by name. Sizes
follow in :mod:`elmoe.models.sizes`, tensors in :mod:`elmoe.models.tensors`.
"""

from __future__ import annotations

from functools import cached_property
from typing import Literal

import msgspec

from elmoe.errors import ModelError

MOST = {
    "layers": 1024, "vocabulary": 1 << 24, "hidden": 1 << 20, "heads": 1 << 12, "kv_heads": 1 << 12, "head_dim": 1024,
    "experts": 1 << 14, "width": 1 << 22, "max_positions": 1 << 26, "rank": 1 << 16,
}  # fmt: skip
"""Largest value of each size: far above any published model, so small that no product of sizes overflows 64 bits."""

LEAST_NUMBER, MOST_NUMBER = 1e-6, 1e12
"""Bounds of every positive number: no power, quotient or product of two overflows."""
LEAST_MULTIPLIER, MOST_MULTIPLIER = 1e-3, 1e3
"""Bounds of multipliers: squares of a residual stream that is divided by one stay far from overflow in float32."""


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Base of all parts of a spec."""


def _check_sizes(part: msgspec.Struct, name: str, *fields: str, **kinds: str) -> None:
    """ModelError for sizes of a part that are not in 1..most; ``kinds`` names the bound of fields that have another's."""
    for field, kind in ({one: one for one in fields} | kinds).items():
        value = getattr(part, field)
        if not 1 <= value <= MOST[kind]:
            raise ModelError(f"{name}.{field} is {value}, allowed is 1..{MOST[kind]}")


def _check_numbers(part: msgspec.Struct, name: str, *fields: str) -> None:
    """ModelError for numbers of a part that are not positive, or out of bounds."""
    for field in fields:
        value = getattr(part, field)
        if not LEAST_NUMBER <= value <= MOST_NUMBER:
            raise ModelError(f"{name}.{field} is {value}, allowed is {LEAST_NUMBER:g}..{MOST_NUMBER:g}")


class LinearScaling(_Part, frozen=True, tag="linear"):
    """Positions divided by ``factor``."""

    factor: float

    def __post_init__(self) -> None:
        _check_numbers(self, "rope.scaling", "factor")


class Llama3Scaling(_Part, frozen=True, tag="llama3"):
    """Llama 3.1's scaling by wavelength (``transformers`` ``rope_type: llama3``)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        _check_numbers(self, "rope.scaling", "factor", "low_frequency_factor", "high_frequency_factor")
        _check_sizes(self, "rope.scaling", original_positions="max_positions")


class YarnScaling(_Part, frozen=True, tag="yarn"):
    """YaRN (arXiv 2309.00071). ``attention_factor`` scales cosine and sine; ``score_factor`` multiplies the softmax scale
    (DeepSeek: the square of its ``mscale``). ``truncate``: whether the ramp's ends are rounded to whole dimensions."""

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    score_factor: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_numbers(self, "rope.scaling", "factor", "beta_fast", "beta_slow", "attention_factor", "score_factor")
        _check_sizes(self, "rope.scaling", original_positions="max_positions")


class LongRopeScaling(_Part, frozen=True, tag="longrope"):
    """LongRoPE (arXiv 2402.13753): a factor for each pair of dimensions, short or long by the length of the context."""

    short_factors: tuple[float, ...]
    long_factors: tuple[float, ...]
    original_positions: int
    attention_factor: float = 1.0


class Rope(_Part, frozen=True):
    """Rotary embedding (arXiv 2104.09864) of the last ``dimensions`` of a latent head, or the first of a grouped one.

    ``interleaved``: pairs are neighbours (2i, 2i + 1), otherwise halves (i, i + dimensions / 2).
    """

    theta: float
    dimensions: int
    interleaved: bool = False
    scaling: LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, "rope", "theta")
        if self.dimensions < 2 or self.dimensions % 2:
            raise ModelError(f"rope.dimensions is {self.dimensions}, not a positive even number")


class GroupedAttention(_Part, frozen=True, tag="grouped"):
    """Multi-head and grouped-query attention (arXiv 2305.13245).

    ``query_key_norm``: RMS norm of queries and keys by head, or over the full width, or none. ``window``: positions a token
    sees, itself included; None is all. ``sinks``: a learned logit per head that takes part in the softmax only.
    ``score_scale``: factor of the scores, None is ``head_dim ** -0.5``. ``gate``: output gated by a sigmoid of the input.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    query_key_norm: Literal["none", "head", "full"] = "none"
    query_key_value_bias: bool = False
    output_bias: bool = False
    window: int | None = None
    sinks: bool = False
    score_scale: float | None = None
    gate: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "attention", "heads", "kv_heads", "head_dim")
        if self.heads % self.kv_heads:
            raise ModelError(f"attention.heads {self.heads} is no multiple of attention.kv_heads {self.kv_heads}")
        if self.rope is not None and self.rope.dimensions > self.head_dim:
            raise ModelError(f"rope.dimensions {self.rope.dimensions} exceed attention.head_dim {self.head_dim}")
        if self.score_scale is not None:
            _check_numbers(self, "attention", "score_scale")
        if self.window is not None and not 1 <= self.window <= MOST["max_positions"]:
            raise ModelError(f"attention.window is {self.window}, allowed is 1..{MOST['max_positions']} positions")

    @property
    def query_width(self) -> int:
        """Columns of all queries."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Columns of all keys, or of all values."""
        return self.kv_heads * self.head_dim

    @property
    def cache_values(self) -> int:
        """fp16 values cached for one position."""
        return 2 * self.kv_width


class LatentAttention(_Part, frozen=True, tag="latent"):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values come from a latent of ``latent_rank``.

    A head's query and key are ``plain_dim`` values without and ``rope.dimensions`` with rotary embedding; the rotary part of
    the key is shared by all heads. ``query_rank``: rank of the query projection, None where it is one matrix.
    ``score_scale``: factor of the scores, None is ``query_dim ** -0.5`` times the score factor of the rope's scaling.
    ``norm_epsilon`` of the norms of the latent and of the projected query, which is not the model's.
    """

    heads: int
    latent_rank: int
    plain_dim: int
    value_dim: int
    rope: Rope
    query_rank: int | None = None
    score_scale: float | None = None
    norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        _check_sizes(self, "attention", "heads", latent_rank="rank", plain_dim="head_dim", value_dim="head_dim")
        if self.query_rank is not None:
            _check_sizes(self, "attention", query_rank="rank")

    @property
    def query_dim(self) -> int:
        """Values of a head's query, plain and rotary."""
        return self.plain_dim + self.rope.dimensions

    @property
    def query_width(self) -> int:
        """Columns of all queries."""
        return self.heads * self.query_dim

    @property
    def cache_values(self) -> int:
        """fp16 values cached for one position."""
        return self.latent_rank + self.rope.dimensions


class Activation(_Part, frozen=True):
    """Between gate, up and down projection. ``swiglu``: silu(gate) * up. ``clamped_swiglu`` (GPT-OSS): with gate at most
    ``limit`` and up in ``-limit..limit``, ``gate * sigmoid(alpha * gate) * (up + 1)``."""

    kind: Literal["swiglu", "clamped_swiglu"] = "swiglu"
    alpha: float = 1.0
    limit: float | None = None

    def __post_init__(self) -> None:
        _check_numbers(self, "activation", "alpha", *(["limit"] if self.limit is not None else []))


class Router(_Part, frozen=True):
    """Chooses ``top_k`` of ``experts`` for each token.

    ``score``: softmax over all experts, softmax over the chosen ones, or sigmoid. ``logit_bias`` is part of the logits,
    ``selection_bias`` is added to the scores for the choice only. ``groups``: experts are chosen from the best
    ``kept_groups`` of them, a group being worth its best (or best two) scores. ``normalize``: weights of the chosen experts
    are divided by their sum; then they are multiplied by ``scaling``.
    """

    experts: int
    top_k: int
    score: Literal["softmax", "chosen_softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    logit_bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"
    scaling: float = 1.0

    def __post_init__(self) -> None:
        _check_sizes(self, "router", "experts")
        _check_numbers(self, "router", "scaling")
        if not 1 <= self.top_k <= self.experts:
            raise ModelError(f"router.top_k is {self.top_k}, allowed is 1..{self.experts}, the number of experts")
        if self.groups < 1 or self.experts % self.groups or not 1 <= self.kept_groups <= self.groups:
            raise ModelError(f"router keeps {self.kept_groups} of {self.groups} groups of {self.experts} experts")
        size = self.experts // self.groups
        if self.groups > 1 and (size * self.kept_groups < self.top_k or (self.group_score == "best_two" and size < 2)):
            raise ModelError(
                f"router chooses {self.top_k} experts of {self.kept_groups} groups of {size}, which have too few"
            )


class Moe(_Part, frozen=True, tag="moe"):
    """Routed experts of ``width`` inner units, and perhaps a shared one of ``shared_width`` that every token uses."""

    router: Router
    width: int
    activation: Activation = Activation()
    bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "experts", "width")
        if self.shared_width:
            _check_sizes(self, "experts", shared_width="width")
        elif self.shared_gate:
            raise ModelError("experts.shared_gate without a shared expert (experts.shared_width is 0)")


class Dense(_Part, frozen=True, tag="dense"):
    """One feed-forward of ``width`` inner units."""

    width: int
    activation: Activation = Activation()
    bias: bool = False

    def __post_init__(self) -> None:
        _check_sizes(self, "feed_forward", "width")


class LayerSpec(_Part, frozen=True):
    """One layer. ``post_norms``: the outputs of attention and feed-forward are normed before they are added."""

    attention: GroupedAttention | LatentAttention
    feed_forward: Moe | Dense
    post_norms: bool = False


class Multipliers(_Part, frozen=True):
    """Granite's constants: factors of the embedding and of what a layer adds to the residual stream; the logits are divided
    by ``logits``."""

    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not LEAST_MULTIPLIER <= getattr(self, name) <= MOST_MULTIPLIER:
                raise ModelError(
                    f"multipliers.{name} is {getattr(self, name)}, allowed is {LEAST_MULTIPLIER:g}..{MOST_MULTIPLIER:g}"
                )


class ModelSpec(_Part, frozen=True, dict=True):
    """A decoder-only transformer. ``family`` names the file that reads its checkpoints; ``eos_tokens`` end a generation.

    All layers with experts have equally many of them and choose equally many: routing is one array over layers.

    :raises ModelError: the parts contradict each other, or a size is out of bounds.
    """

    family: str
    vocabulary: int
    hidden: int
    layers: tuple[LayerSpec, ...]
    norm_epsilon: float
    max_positions: int
    tied_embeddings: bool
    multipliers: Multipliers = Multipliers()
    eos_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_sizes(self, "model", "vocabulary", "hidden", "max_positions")
        if not 1 <= len(self.layers) <= MOST["layers"]:
            raise ModelError(f"the model has {len(self.layers)} layers, allowed is 1..{MOST['layers']}")
        if not 0 < self.norm_epsilon < 1:
            raise ModelError(f"norm_epsilon is {self.norm_epsilon}, not in 0..1")
        choices = {(moe.router.experts, moe.router.top_k) for moe in self._moes()}
        if len(choices) > 1:
            found = ", ".join(f"top {top_k} of {experts}" for experts, top_k in sorted(choices))
            raise ModelError(f"layers differ in their experts: {found}", "all layers with experts must choose alike")
        if any(not 0 <= token < self.vocabulary for token in self.eos_tokens):
            raise ModelError(f"eos_tokens {list(self.eos_tokens)} lie outside the vocabulary of {self.vocabulary}")

    def _moes(self) -> list[Moe]:
        return [layer.feed_forward for layer in self.layers if isinstance(layer.feed_forward, Moe)]

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, Moe))

    @cached_property
    def dense_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have none."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer.feed_forward, Dense))

    @cached_property
    def experts(self) -> int:
        """Routed experts of a layer that has them; 0 where none does."""
        return self._moes()[0].router.experts if self.moe_layers else 0

    @cached_property
    def top_k(self) -> int:
        """Routed experts that a token uses in a layer; 0 where no layer has any."""
        return self._moes()[0].router.top_k if self.moe_layers else 0

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes of one position's cache over all layers, fp16."""
        return 2 * sum(layer.attention.cache_values for layer in self.layers)

    def moe(self, layer: int) -> Moe:
        """The experts of a layer; ModelError where it has none."""
        found = self.layers[layer].feed_forward
        if not isinstance(found, Moe):
            raise ModelError(f"layer {layer} has no experts")
        return found
