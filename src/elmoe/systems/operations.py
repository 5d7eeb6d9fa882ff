"""A pass of a model as operations: matrix products with their weights' and KV's bytes, elementwise work, and repetitions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from elmoe.hw.cost import Array
from elmoe.hw.machine import Machine, Multiply
from elmoe.models.sizes import LayerSizes, ModelSizes
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
    ``decides``: it bears those of deciding about residents.
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


def operations(
    model: ModelSizes, passes: Passes, machine: Machine, draft: bool = False, bits: float = 8.5
) -> list[Operation]:
    """The operations of passes over the whole model; layers of equal size are one operation, repeated.

    :param draft: expert weights are MSB slices alone. :param bits: of a dense weight with its scales.
    """
    tokens, hidden = passes.tokens, model.spec.hidden
    blocks = np.ceil(tokens / machine.token_rows)
    weight_passes = 2 if bits > 4.5 else 1
    ops = [
        replace(_attention(hidden, layer, passes, machine, blocks, bits, weight_passes), repeat=count)
        for layer, count in _alike(model, lambda layer: (layer.attention_parameters, layer.attention_width, layer.kv_bytes))
    ]

    def plain(name: str, parameters: int, read: float, repeat: int) -> Operation:
        work = Multiply(parameters / hidden, hidden, tokens, blocks, weight_passes)
        elementwise = tokens * hidden * ELEMENTWISE
        return _operation(name, np.full_like(tokens, read), (work,), elementwise, tokens * hidden, repeat)

    for layer, count in _alike(model, lambda layer: layer.dense_parameters):
        if layer.dense_parameters:
            ops.append(plain("feed-forward", layer.dense_parameters, layer.dense_parameters * bits / 8, count))
    for layer, count in _alike(model, lambda layer: (layer.experts, layer.shared_parameters, layer.router_parameters)):
        if layer.experts:
            size = layer.shared_parameters + layer.router_parameters
            read = (layer.shared_parameters * bits + layer.router_parameters * layer.router_bits) / 8
            ops.append(plain("router and shared", size, read, count))
    if model.moe_layers:
        ops.append(_experts(model, passes, draft, decides=not draft))
    size = model.embedding_parameters
    ops.append(plain("head", size, size * bits / 8, 1))
    return ops


def _alike(model: ModelSizes, kind: Callable[[LayerSizes], object]) -> list[tuple[LayerSizes, int]]:
    """(layer, how many are like it) for each kind of layer, in the order of the model."""
    found: dict[object, tuple[LayerSizes, int]] = {}
    for layer, count in model.kinds.items():
        first, before = found.get(kind(layer), (layer, 0))
        found[kind(layer)] = first, before + count
    return list(found.values())


def dense_model(name: str, hidden: int, parameters: float, tokens: Array, machine: Machine, bits: float = 8.5) -> Operation:
    """A dense network of so many parameters, run once per token (draft heads, small draft models)."""
    blocks = np.ceil(tokens / machine.token_rows)
    work = Multiply(parameters / hidden, hidden, tokens, blocks)
    return _operation(name, np.full_like(tokens, parameters * bits / 8), (work,), tokens * hidden * ELEMENTWISE, tokens, 1)


def _attention(
    hidden: int, layer: LayerSizes, passes: Passes, machine: Machine, blocks: Array, bits: float, weight_passes: int
) -> Operation:
    parameters, width = layer.attention_parameters, layer.attention_width
    projections = Multiply(parameters / hidden, hidden, passes.tokens, blocks, weight_passes)
    # Cached positions lie along the outputs of a PE, so 32 of them make a block of one token row.
    compute = machine.hardware.compute
    lanes = compute.outputs.value if isinstance(compute, PeArray) else 1
    scores = Multiply(1, width, passes.attended, passes.attended / lanes, KV_PASSES)
    read = parameters * bits / 8 + passes.cached * layer.kv_bytes
    elementwise = (passes.tokens * hidden * 2 + passes.attended * width / 128) * ELEMENTWISE
    attention = _operation("attention", read, (projections, scores), elementwise, passes.tokens * hidden, 1)
    return replace(attention, starts_layer=True)


def _operation(
    name: str, read: Array, multiplies: tuple[Multiply, ...], elementwise: Array, outputs: Array, repeat: int
) -> Operation:
    zero = np.zeros_like(read)
    return Operation(name, read, zero, zero, zero, zero, multiplies, elementwise, 4 * outputs, repeat)


def _experts(model: ModelSizes, passes: Passes, draft: bool, decides: bool) -> Operation:
    """All active experts of a layer: every one's weights are read once, whatever the number of its tokens."""
    sampled, hidden, expert = passes.active.shape[1], model.spec.hidden, model.expert
    weight_passes = 1 if draft and expert.lsb_bytes else 2
    work = tuple(
        Multiply(outputs, inputs, passes.pairs, passes.blocks, weight_passes)
        for outputs, inputs in ((2 * expert.expert_width, hidden), (hidden, expert.expert_width))
    )
    lsb = 0.0 if draft else float(expert.lsb_bytes)
    return Operation(
        "experts", np.zeros_like(passes.active), passes.active * expert.msb_bytes, passes.active * lsb,
        passes.msb_hits * expert.msb_bytes, passes.lsb_hits * lsb, work,
        passes.pairs * (expert.expert_width + hidden) * ELEMENTWISE,
        4 * passes.tokens[:, None] * np.full((1, sampled), float(hidden)), len(model.moe_layers) / sampled, decides=decides,
    )  # fmt: skip
