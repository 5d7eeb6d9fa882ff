"""A pass of a model as operations: matrix products with their weights' and KV's bytes, elementwise work, and repetitions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from elmoe.hw.cost import Array
from elmoe.hw.machine import Machine, Multiply
from elmoe.schema.architecture import Architecture
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
    model: Architecture, passes: Passes, machine: Machine, draft: bool = False, bits: float = 8.5
) -> list[Operation]:
    """The operations of passes over the whole model.

    :param draft: expert weights are MSB slices alone. :param bits: of a dense weight with its scales.
    """
    tokens, rows = passes.tokens, machine.token_rows
    blocks = np.ceil(tokens / rows)
    dense_passes = 2 if bits > 4.5 else 1
    ops = [_attention(model, passes, machine, blocks, bits, dense_passes)]
    if model.dense_layers:
        size = model.dense_ffn_parameters
        ops.append(_plain("feed-forward", model, size, size * bits / 8, tokens, blocks, bits, model.dense_layers))
    if model.moe_layers:
        size = model.shared_parameters + model.router_parameters
        read = (model.shared_parameters * bits + model.router_parameters * model.router_bits) / 8
        ops.append(_plain("router and shared", model, size, read, tokens, blocks, bits, model.moe_layers))
        ops.append(_experts(model, passes, draft, decides=not draft))
    size = model.embedding_parameters
    ops.append(_plain("head", model, size, size * bits / 8, tokens, blocks, bits, 1))
    return ops


def dense_model(name: str, hidden: int, parameters: float, tokens: Array, machine: Machine, bits: float = 8.5) -> Operation:
    """A dense network of so many parameters, run once per token (draft heads, small draft models)."""
    blocks = np.ceil(tokens / machine.token_rows)
    work = Multiply(parameters / hidden, hidden, tokens, blocks)
    return _operation(name, np.full_like(tokens, parameters * bits / 8), (work,), tokens * hidden * ELEMENTWISE, tokens, 1)


def _attention(
    model: Architecture, passes: Passes, machine: Machine, blocks: Array, bits: float, dense_passes: int
) -> Operation:
    parameters = model.attention_parameters
    projections = Multiply(parameters / model.hidden, model.hidden, passes.tokens, blocks, dense_passes)
    # Cached positions lie along the outputs of a PE, so 32 of them make a block of one token row.
    compute = machine.hardware.compute
    lanes = compute.outputs.value if isinstance(compute, PeArray) else 1
    scores = Multiply(1, model.attention_width, passes.attended, passes.attended / lanes, KV_PASSES)
    read = parameters * bits / 8 + passes.cached * model.kv_bytes_per_position
    elementwise = (passes.tokens * model.hidden * 2 + passes.attended * model.attention_width / 128) * ELEMENTWISE
    attention = _operation("attention", read, (projections, scores), elementwise, passes.tokens * model.hidden, model.layers)
    return replace(attention, starts_layer=True)


def _plain(
    name: str, model: Architecture, parameters: float, read: float, tokens: Array, blocks: Array, bits: float, repeat: int
) -> Operation:
    work = Multiply(parameters / model.hidden, model.hidden, tokens, blocks, 2 if bits > 4.5 else 1)
    return _operation(
        name, np.full_like(tokens, read), (work,), tokens * model.hidden * ELEMENTWISE, tokens * model.hidden, repeat
    )


def _operation(
    name: str, read: Array, multiplies: tuple[Multiply, ...], elementwise: Array, outputs: Array, repeat: int
) -> Operation:
    zero = np.zeros_like(read)
    return Operation(name, read, zero, zero, zero, zero, multiplies, elementwise, 4 * outputs, repeat)


def _experts(model: Architecture, passes: Passes, draft: bool, decides: bool) -> Operation:
    """All active experts of a layer: every one's weights are read once, whatever the number of its tokens."""
    sampled = passes.active.shape[1]
    weight_passes = 1 if draft and model.lsb_bytes else 2
    work = tuple(
        Multiply(outputs, inputs, passes.pairs, passes.blocks, weight_passes)
        for outputs, inputs in ((2 * model.expert_width, model.hidden), (model.hidden, model.expert_width))
    )
    lsb = 0.0 if draft else float(model.lsb_bytes)
    return Operation(
        "experts", np.zeros_like(passes.active), passes.active * model.msb_bytes, passes.active * lsb,
        passes.msb_hits * model.msb_bytes, passes.lsb_hits * lsb, work,
        passes.pairs * (model.expert_width + model.hidden) * ELEMENTWISE,
        4 * passes.tokens[:, None] * np.full((1, sampled), float(model.hidden)), model.moe_layers / sampled, decides=decides,
    )  # fmt: skip
