"""A pass of a model as operations: matrix products with their weights' and KV's bytes, elementwise work, and repetitions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from msgspec.structs import replace as replaced

from elmoe.errors import ModelError
from elmoe.hw.cost import Array
from elmoe.hw.machine import Machine, Multiply
from elmoe.models.sizes import LayerSizes, ModelSizes, Precision
from elmoe.schema.hardware import PeArray
from elmoe.systems.passes import Passes

KV_PASSES = 4
"""Keys and values are fp16: four passes of 4 bits."""
ELEMENTWISE = 10
"""Elementwise operations per activation: a norm, a rotation, an activation function or a quantisation (counted by hand)."""


@dataclass(frozen=True)
class Operation:
    """``dense``: bytes of weights and KV that every token needs. ``msb``, ``lsb``: bytes of expert slices of active experts;
    ``msb_hit``, ``lsb_hit``: those of them that the fast memory held. ``repeat``: times per pass. ``sums``: bytes of
    partial sums where both memories' shares of a product meet. ``starts_layer``: it bears the layer's fixed seconds.
    ``decides``: it bears those of deciding about residents. ``cached``: bytes of ``dense`` that are keys and values, which
    the last of the products meets; None where there are none.
    Arrays are (passes,), for experts (passes, layers)."""

    name: str
    dense: Array
    msb: Array
    lsb: Array
    msb_hit: Array
    lsb_hit: Array
    multiplies: tuple[Multiply, ...]
    elementwise: Array
    sums: Array
    repeat: float = 1.0
    starts_layer: bool = False
    decides: bool = False
    cached: Array | None = None


def operations(
    model: ModelSizes, passes: Passes, machine: Machine, draft: bool = False, copy: Precision | None = None,
    embedding_rows: bool = False,
) -> list[Operation]:  # fmt: skip
    """The operations of passes over the whole model; layers of equal size are one operation, repeated.

    :param draft: expert weights are MSB slices alone.
    :param copy: what a copy of the model keeps at most of a weight, routers aside.
    :param embedding_rows: each token reads its row of the embedding table from the main memory; where the table is the
        head too, it is where the head is.
    """
    tokens, hidden = passes.tokens, model.spec.hidden
    blocks = np.ceil(tokens / machine.token_rows)
    ops = [
        replace(_attention(hidden, layer, passes, machine, blocks, layer.attention_precision.at_most(copy)), repeat=count)
        for layer, count in _alike(model, lambda layer: (
            layer.attention_parameters, layer.attention_width, layer.kv_bytes, layer.attention_precision, layer.window
        ))
    ]  # fmt: skip

    def plain(name: str, parameters: int, precision: Precision, repeat: int, router: LayerSizes | None = None) -> Operation:
        read = precision.bytes_of(parameters)
        if router is not None:
            read += router.router_parameters * router.router_bits / 8
            parameters += router.router_parameters
        work = Multiply(parameters / hidden, hidden, tokens, blocks, sum(precision.passes))
        elementwise = tokens * hidden * ELEMENTWISE
        return _operation(name, np.full_like(tokens, read), (work,), elementwise, tokens * hidden, repeat)

    for layer, count in _alike(model, lambda layer: (layer.dense_parameters, layer.dense_precision)):
        if layer.dense_parameters:
            ops.append(plain("feed-forward", layer.dense_parameters, layer.dense_precision.at_most(copy), count))
    for layer, count in _alike(model, lambda layer: (
        layer.experts, layer.shared_parameters, layer.router_parameters, layer.shared_precision
    )):  # fmt: skip
        if layer.experts:
            precision = layer.shared_precision.at_most(copy)
            ops.append(plain("router and shared", layer.shared_parameters, precision, count, router=layer))
    if model.moe_layers:
        ops.append(_experts(model, passes, draft, copy))
    if embedding_rows and not model.spec.tied_embeddings:
        ops.append(_embedding(model, tokens))
    ops.append(plain("head", model.embedding_parameters, model.head_precision.at_most(copy), 1))
    return ops


def _alike(model: ModelSizes, kind: Callable[[LayerSizes], object]) -> list[tuple[LayerSizes, int]]:
    """(layer, how many are like it) for each kind of layer, in the order of the model."""
    found: dict[object, tuple[LayerSizes, int]] = {}
    for layer, count in model.kinds.items():
        first, before = found.get(kind(layer), (layer, 0))
        found[kind(layer)] = first, before + count
    return list(found.values())


def dense_model(
    name: str, hidden: int, parameters: float, precision: Precision, tokens: Array, machine: Machine
) -> Operation:
    """A dense network of so many parameters, run once per token (draft heads, small draft models)."""
    blocks = np.ceil(tokens / machine.token_rows)
    work = Multiply(parameters / hidden, hidden, tokens, blocks, sum(precision.passes))
    read = np.full_like(tokens, precision.bytes_of(parameters))
    return _operation(name, read, (work,), tokens * hidden * ELEMENTWISE, tokens, 1)


def attention_of(model: ModelSizes, layer: LayerSizes, passes: Passes, machine: Machine) -> Operation:
    """The attention of one layer of a model."""
    blocks = np.ceil(passes.tokens / machine.token_rows)
    return _attention(model.spec.hidden, layer, passes, machine, blocks, layer.attention_precision)


def _attention(
    hidden: int, layer: LayerSizes, passes: Passes, machine: Machine, blocks: Array, precision: Precision
) -> Operation:
    parameters, width = layer.attention_parameters, layer.attention_width
    projections = Multiply(parameters / hidden, hidden, passes.tokens, blocks, sum(precision.passes))
    # Cached positions lie along the outputs of a PE, so 32 of them make a block of one token row.
    compute = machine.hardware.compute
    lanes = compute.outputs.value if isinstance(compute, PeArray) else 1
    attended, cached = passes.attended, passes.cached
    if layer.window is not None:
        # Exact where all tokens of a pass attend to equally many positions, as in lock-step, else the most it can be.
        attended = np.minimum(attended, passes.tokens * layer.window)
        cached = np.minimum(cached, passes.sequences * (layer.window - 1) + passes.tokens)
    scores = Multiply(1, width, attended, attended / lanes, KV_PASSES)
    read = precision.bytes_of(parameters) + cached * layer.kv_bytes
    elementwise = (passes.tokens * hidden * 2 + attended * width / 128) * ELEMENTWISE
    attention = _operation("attention", read, (projections, scores), elementwise, passes.tokens * hidden, 1)
    return replace(attention, starts_layer=True, cached=cached * layer.kv_bytes)


def _embedding(model: ModelSizes, tokens: Array) -> Operation:
    """A row of the table for every token, from the main memory: it counts as an expert that no fast memory holds."""
    zero = np.zeros_like(tokens)
    row = model.embedding_bytes / model.spec.vocabulary
    return Operation("embedding", zero, tokens * row, zero, zero, zero, (Multiply(0, 0, zero, zero),), zero, zero)


def _operation(
    name: str, read: Array, multiplies: tuple[Multiply, ...], elementwise: Array, outputs: Array, repeat: int
) -> Operation:
    zero = np.zeros_like(read)
    return Operation(name, read, zero, zero, zero, zero, multiplies, elementwise, 4 * outputs, repeat)


def _experts(model: ModelSizes, passes: Passes, draft: bool, copy: Precision | None) -> Operation:
    """All active experts of a layer: every one's weights are read once, whatever the number of its tokens."""
    sampled, hidden = passes.active.shape[1], model.spec.hidden
    layers = model.moe_layers
    if copy is not None:
        layers = tuple(replaced(layer, expert_precision=layer.expert_precision.at_most(copy)) for layer in layers)
    width = layers[0].expert_width
    if any(layer.expert_width != width for layer in layers):
        raise ModelError(f"model '{model.name}': layers differ in the width of their experts", "the simulator needs one")
    taken = [layer.expert_precision.passes for layer in layers]
    weight_passes = resample([each[0] if draft else sum(each) for each in taken], sampled)
    work = tuple(
        Multiply(outputs, inputs, passes.pairs, passes.blocks, weight_passes)
        for outputs, inputs in ((2 * width, hidden), (hidden, width))
    )
    msb = resample([layer.msb_bytes for layer in layers], sampled)
    lsb = resample([0.0 if draft else layer.lsb_bytes for layer in layers], sampled)
    return Operation(
        "experts", np.zeros_like(passes.active), passes.active * msb, passes.active * lsb, passes.msb_hits * msb,
        passes.lsb_hits * lsb, work, passes.pairs * (width + hidden) * ELEMENTWISE,
        4 * passes.tokens[:, None] * np.full((1, sampled), float(hidden)), len(layers) / sampled, decides=not draft,
    )  # fmt: skip


def resample(values: Sequence[float], count: int) -> Array:
    """(count,) values that stand for more: means of equally long stretches of them."""
    if len(set(values)) == 1:
        return np.full(count, float(values[0]))
    ends = np.interp(np.linspace(0, len(values), count + 1), np.arange(len(values) + 1), np.cumsum([0.0, *values]))
    return np.diff(ends) * (count / len(values))
