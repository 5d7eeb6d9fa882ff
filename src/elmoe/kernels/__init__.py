"""The one door to native code: the signatures of ``elmoe.bitslice``, the same bits, the speed of the machine.

Native objects made of weights are kept on the weights themselves, so a call on the decode path passes few arrays.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import (
    AttentionWeights,
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
    NestedMatrix,
    Places,
    QuantizedMatrix,
    Report,
    Routed,
    RouterWeights,
    Routing,
    Routings,
    Sample,
    SamplingParameters,
    SharedWeights,
    StackedMatrix,
    format_of,
    sections_of,
)
from elmoe.bitslice.expert import PROJECTIONS
from elmoe.errors import KernelError, NumericsError

try:
    from elmoe import _native  # noqa: TID251 - this module is the door
    from elmoe.kernels.slices import SlicesFeed, read_failed
except ImportError as error:
    raise KernelError(
        f"the native kernels are missing ({error})",
        "install elmoe again, with a C++20 compiler: pip install ., or make demo",
    ) from error

__all__ = [
    "attention_block",
    "embed",
    "expert_ffn",
    "forward",
    "latent_block",
    "logits",
    "matmul",
    "nested_matmul",
    "prefetch",
    "rms_norm",
    "route",
    "sample",
    "set_prefetch",
    "set_threads",
    "set_variant",
    "stream_read",
    "threads",
    "variant",
    "variants",
]

_HANDLE = "_native_handle"
_WORD = 1 << 64


def variants() -> list[str]:
    """Instruction-set variants this processor can run, best first."""
    return list(_native.variants())


def variant() -> str:
    """The variant in use."""
    return str(_native.variant())


def set_variant(name: str | None) -> None:
    """Use a variant (None: the best); KernelError if this processor cannot run it."""
    if not _native.set_variant(name or ""):
        raise KernelError(f"this processor cannot run the kernel variant '{name}'", f"it can run {', '.join(variants())}")


def threads() -> int:
    """Threads the kernels use."""
    return int(_native.threads())


def set_threads(count: int) -> None:
    """Use ``count`` threads, 1..64; results do not depend on it."""
    if not 1 <= count <= 64:
        raise KernelError(f"{count} kernel threads", "use 1 to 64")
    _native.set_threads(count)


def prefetch() -> int:
    """How many bytes ahead the kernels ask for weights."""
    return int(_native.prefetch())


def set_prefetch(distance: int) -> None:
    """Ask for weights ``distance`` bytes ahead, 0..65536; results do not depend on it."""
    if not 0 <= distance <= 1 << 16:
        raise KernelError(f"a prefetch distance of {distance} bytes", "use 0 to 65536")
    _native.set_prefetch(distance)


set_variant(os.environ.get("ELMOE_VARIANT"))
PREFETCH_PINNED = "ELMOE_PREFETCH" in os.environ
"""Whether the environment says how far ahead to ask, so that nothing is measured."""
if PREFETCH_PINNED:
    pinned = os.environ["ELMOE_PREFETCH"]
    if not pinned.isdigit():
        raise KernelError(f"ELMOE_PREFETCH is '{pinned}'", "give a number of bytes, 0 to 65536")
    set_prefetch(int(pinned))


def _handle(owner: Any, make: Any) -> Any:
    """The native object of a frozen dataclass, made at first use and kept on it."""
    try:
        return owner.__dict__[_HANDLE]
    except KeyError:
        handle = make(owner)
        object.__setattr__(owner, _HANDLE, handle)
        return handle


def _check_offset(offset: float) -> None:
    if offset not in range(17):
        raise KernelError(
            f"native kernels draft with an integral offset within 0..16, not {offset}", "use --backend reference"
        )


def _check_chain(places: Places) -> None:
    """Native attention reads cells 0..position; a tree needs the cells that each token sees."""
    if places.cells is not None and not places.chain:
        raise KernelError("native kernels compute chains of tokens, not trees", "use --backend reference")


def _matrix(matrix: QuantizedMatrix) -> Any:
    if isinstance(matrix, NestedMatrix):
        return _native.Matrix(matrix.rows, matrix.columns, matrix.hi, matrix.lo, matrix.scales.view(np.uint16))
    found = matrix.sections
    scales, minima = (found[name].view(np.uint16) if name in found else None for name in ("scales", "minima"))
    steps = found["steps"].view(np.uint8) if "steps" in found else None
    name = matrix.format.name
    return _native.Matrix(matrix.rows, matrix.columns, name, found["hi"], found.get("lo"), scales, minima, steps)


def _one_matrix(matrix: Matrix) -> Any:
    """The native object of a matrix of one format."""
    if isinstance(matrix, StackedMatrix):
        raise NumericsError("a matrix of several formats can only project queries, keys and values")
    return _handle(matrix, _matrix)


def _projection(matrix: Matrix) -> Any:
    """The native object of a matrix, or the list of those of its parts."""
    if isinstance(matrix, StackedMatrix):
        return [_handle(part, _matrix) for part in matrix.parts]
    return _handle(matrix, _matrix)


def _attention(weights: AttentionWeights) -> Any:
    projection, output = _projection(weights.query_key_value), _one_matrix(weights.output)
    return _native.Attention(
        weights.norm, projection, weights.query_norm, weights.key_norm, output, weights.heads, weights.kv_heads,
        weights.head_dim, weights.epsilon, weights.projection_bias, weights.output_bias, weights.sinks, weights.window or 0,
        weights.scale,
    )  # fmt: skip


def _latent(weights: LatentWeights) -> Any:
    up = None if weights.query_up is None else _one_matrix(weights.query_up)
    key_up, value_up, output = (_one_matrix(one) for one in (weights.key_up, weights.value_up, weights.output))
    return _native.Latent(
        weights.norm, _projection(weights.query_latent), weights.query_norm, up, weights.latent_norm, key_up, value_up,
        output, weights.heads, weights.plain_dim, weights.rotary_dim, weights.epsilon, weights.latent_epsilon, weights.scale,
        weights.interleaved,
    )  # fmt: skip


def _router(weights: RouterWeights) -> Any:
    return _native.Router(
        weights.norm, weights.router, weights.top_k, weights.epsilon, weights.normalize, weights.bias,
        weights.sigmoid, weights.selection_bias, weights.scaling, weights.groups, weights.kept_groups, weights.best_two,
    )  # fmt: skip


def _cache(cache: KVCache) -> Any:
    return _native.Cache(cache.keys.view(np.uint16), cache.values.view(np.uint16), cache.table, cache.places)


def _expert(layout: ExpertLayout) -> Any:
    offsets = layout.msb[0] | layout.lsb[0]
    names = ("hi", "lo", "scales", "minima", "steps")
    places = [[offsets.get(f"{projection}_{name}", 0) for name in names] for projection in PROJECTIONS]
    formats = [format.name for format in layout.formats]
    return _native.Expert(layout.hidden, layout.width, formats, places, layout.msb_bytes, layout.lsb_bytes)


def _norm(weights: DenseWeights) -> Any:
    return _native.Norm(weights.norm, weights.epsilon)


def _terms(terms: ExpertTerms) -> Any:
    return _native.Terms(terms.gate, terms.up, terms.down, terms.alpha, terms.limit)


def _shared(shared: SharedWeights) -> Any:
    return _native.Shared(_handle(shared.layout, _expert), shared.addresses, shared.gate)


def _layer(layer: LayerWeights) -> Any:
    weights = layer.feed_forward
    router = None if isinstance(weights, DenseWeights) else _handle(weights, _router)
    norm = _handle(weights, _norm) if isinstance(weights, DenseWeights) else None
    make = _latent if isinstance(layer.attention, LatentWeights) else _attention
    return _native.Layer(
        _handle(layer.attention, make), router, norm, _handle(layer.layout, _expert), layer.addresses,
        None if layer.terms is None else _handle(layer.terms, _terms),
        None if layer.shared is None else _handle(layer.shared, _shared),
    )  # fmt: skip


def _stack(stack: LayerStack) -> Any:
    return _native.Stack([_layer(layer) for layer in stack.layers])


def matmul(
    matrix: QuantizedMatrix, x: NDArray[np.float32], draft: bool = False, offset: float = 8.0, bits: int = 4
) -> NDArray[np.float32]:
    """(tokens, columns) float32 times the matrix transposed: (tokens, rows) float32. Drafts of the upper 4 bits only."""
    if bits != 4:
        raise NumericsError(f"native kernels draft with 4 bits, not {bits}", "use --backend reference")
    _check_offset(offset)
    y = np.empty((x.shape[0], matrix.rows), np.float32)
    if not draft and "lo" not in sections_of(matrix) and format_of(matrix).slices == 2:
        raise NumericsError("the LSB slice is not at hand")
    try:
        _native.nested_matmul(_handle(matrix, _matrix), x, y, draft, offset)
    except _native.NumericsFailure as error:
        raise NumericsError(str(error), "check the checkpoint's weights") from None
    return y


nested_matmul = matmul


def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], epsilon: float) -> NDArray[np.float32]:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis of (tokens, size)."""
    y = np.empty_like(x)
    _native.rms_norm(x, weight, y, epsilon)
    return y


def attention_block(
    weights: AttentionWeights,
    x: NDArray[np.float32],
    cache: KVCache,
    layer: int,
    places: Places,
    cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None:
    """Add attention to ``x`` in place and write the cache; see ``bitslice.attention_block``. Chains only."""
    _attend(_native.attention_block, _handle(weights, _attention), x, cache, layer, places, cosine, sine)


def latent_block(
    weights: LatentWeights, x: NDArray[np.float32], cache: KVCache, layer: int, places: Places, cosine: NDArray[np.float32],
    sine: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add latent attention to ``x`` in place and write the cache; see ``bitslice.latent_block``. Chains only."""
    _attend(_native.latent_block, _handle(weights, _latent), x, cache, layer, places, cosine, sine)


def _attend(block: Any, native: Any, x: NDArray, cache: KVCache, layer: int, places: Places, *tables: NDArray) -> None:
    _check_chain(places)
    try:
        block(native, x, _handle(cache, _cache), layer, places.slots, places.positions, *tables)
    except _native.NumericsFailure as error:
        raise NumericsError(str(error), "check the checkpoint's weights") from None


def route(
    weights: RouterWeights,
    x: NDArray[np.float32],
    allowed: NDArray[np.uint8] | None = None,
    draft_top_k: int | None = None,
    rescale: bool = True,
) -> Routing:
    """Norm, route and choose experts; see ``bitslice.route``."""
    tokens, top_k = x.shape[0], weights.top_k
    ranks, size = weights.ranks, top_k
    if allowed is not None:
        size = min(draft_top_k or top_k, top_k, int(np.count_nonzero(allowed)))
        if size == 0:
            raise NumericsError("a draft has no expert it may use")
    routing = Routing(
        np.empty_like(x),
        np.empty((tokens, ranks), np.int32),
        np.empty((tokens, ranks), np.float32),
        np.empty((tokens, size), np.int32),
        np.empty((tokens, size), np.float32),
    )
    try:
        _native.route(
            _handle(weights, _router), x, allowed, rescale, routing.hidden, routing.ranked, routing.scores, routing.experts,
            routing.weights,
        )  # fmt: skip
    except _native.NumericsFailure as error:
        raise NumericsError(str(error), "check the checkpoint's weights") from None
    return routing


def expert_ffn(
    layout: ExpertLayout,
    addresses: NDArray[np.int64],
    hidden: NDArray[np.float32],
    experts: NDArray[np.int32],
    weights: NDArray[np.float32],
    x: NDArray[np.float32],
    draft: bool = False,
    offset: float = 8.0,
    chain: bool = False,
    terms: ExpertTerms | None = None,
) -> None:
    """Run experts and add their weighted sum to ``x`` in place; see ``bitslice.expert_ffn``."""
    _check_offset(offset)
    try:
        _native.expert_ffn(
            _handle(layout, _expert), addresses, hidden, experts, weights, x, draft, offset, chain,
            None if terms is None else _handle(terms, _terms),
        )  # fmt: skip
    except _native.NumericsFailure as error:
        raise NumericsError(str(error), "check the checkpoint's weights") from None


TIMES = 5
"""Moments that native code notes for each layer: attention begins, routing begins, routing ends, experts begin, they end."""


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
) -> Routings:
    """Run all layers in place on ``x`` in one call; see ``bitslice.forward``. Python is called once per row where there is a
    hook or a feed, else never; a feed of ``SlicesFeed`` hands out its stretches in native code. Chains only."""
    _check_chain(places)
    offset, coarse, allowed, rescale = 8.0, False, None, False
    if draft is not None:
        offset, coarse, allowed, rescale = draft.offset, draft.bits == 4, draft.allowed, draft.rescale
        _check_offset(offset)
    native = _handle(stack, _stack)  # which checks the sizes
    routings = Routings.empty(stack, len(x), draft)
    times = None if report is None else np.empty((len(stack.layers), TIMES))

    def decide(row: int) -> None:
        if routed is not None:
            routed(row, routings)
        if feed is not None:
            feed.begin(row, routings.experts[row])

    slices = feed.slices if isinstance(feed, SlicesFeed) else None
    ready = None if feed is None or slices is not None else feed.next
    try:
        _native.forward(
            native, x, _handle(cache, _cache), places.slots, places.positions, cosine, sine, allowed, rescale, coarse,
            offset, routings.ranked, routings.scores, routings.experts, routings.weights, slices, ready,
            None if feed is None and routed is None else decide, times,
        )  # fmt: skip
    except _native.SliceReadFailure as error:
        raise read_failed(error) from None
    except _native.NumericsFailure as error:
        raise NumericsError(str(error), "check the checkpoint's weights") from None
    if report is not None and times is not None and len(x):
        for layer, (attention, routing, chosen, experts, end) in enumerate(times.tolist()):
            report(f"attention {layer}", attention, routing)
            report(f"routing {layer}", routing, chosen)
            report(f"experts {layer}", experts, end)
    return routings


def embed(matrix: Matrix, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Rows of the embedding, dequantised: (tokens, hidden) float32."""
    out = np.empty((len(tokens), matrix.columns), np.float32)
    try:
        _native.embed(_one_matrix(matrix), tokens, out)
    except _native.NumericsFailure as error:
        raise NumericsError(str(error)) from None
    return out


def logits(norm: NDArray[np.float32], epsilon: float, head: Matrix, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Final norm and vocabulary projection: (tokens, hidden) -> (tokens, vocabulary) float32, checked finite."""
    out = np.empty((x.shape[0], head.rows), np.float32)
    try:
        _native.logits(norm, epsilon, _one_matrix(head), x, out)
    except _native.NumericsFailure as error:
        raise NumericsError(str(error), "check the checkpoint's weights") from None
    return out


def sample(
    logits: NDArray[np.float32], parameters: SamplingParameters, position: int, adjusted: NDArray[np.float32] | None = None
) -> Sample:
    """Sample one token for the given absolute position; see ``bitslice.sample``."""
    p = parameters
    return Sample(*_native.sample(
        logits, p.temperature, p.top_k, p.top_p, p.min_p, p.seed % _WORD, p.choice % _WORD, position, adjusted
    ))  # fmt: skip


def stream_read(data: NDArray[np.uint8]) -> int:
    """Read every byte of a flat array with all threads and return a checksum: a probe of memory bandwidth."""
    return int(_native.stream_read(data))
