"""Processors with compute inside or under a memory (bank PIM, logic-die PIM, hybrid-bonded NMP).

Each operation runs where it is faster: beside the memory, or on the processor over the external interface. That is kinder to
these systems than any published scheduler, which must decide before it knows. A description may keep dense layers on the
processor (``near.dense``) and let both places work on the experts of a layer at once (``near.experts``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from elmoe.hw.cost import Cost, in_order
from elmoe.hw.machine import Machine, Multiply
from elmoe.systems import elmoe3d, xpu
from elmoe.systems.operations import Operation


def lower(machine: Machine, operation: Operation) -> Cost:
    """Seconds and joules of one execution."""
    near = machine.hardware.near
    assert near is not None
    if near.dense == "faster":
        return _faster(machine, operation)
    return in_order(
        _on_processor(machine, part) if part.cached is None and part.dense.any() else _faster(machine, part)
        for part in _parts(operation)
    )


def _parts(operation: Operation) -> Iterator[Operation]:
    """Projections of an attention layer, then its scores over keys and values; anything else is one part."""
    cached = operation.cached
    if cached is None:
        yield operation
        return
    *projections, scores = operation.multiplies
    yield replace(operation, dense=operation.dense - cached, multiplies=tuple(projections), cached=None)
    yield replace(
        operation, dense=cached, multiplies=(scores,), elementwise=np.zeros_like(cached), starts_layer=False,
    )  # fmt: skip


def _on_processor(machine: Machine, operation: Operation) -> Cost:
    near = machine.hardware.near
    assert near is not None
    return (xpu if near.placement == "main" else elmoe3d).lower(machine, operation)


def _faster(machine: Machine, operation: Operation) -> Cost:
    near = machine.hardware.near
    assert near is not None
    if near.placement == "fast":
        return _on_processor(machine, operation).or_faster(_beside_fast(machine, operation))
    if near.experts == "both" and not operation.dense.any():
        return _together(machine, operation)
    return _on_processor(machine, operation).or_faster(_beside_main(machine, operation))


def _together(machine: Machine, operation: Operation) -> Cost:
    """Experts on both places at once, each with the share that lets them end together: whole experts allow no more."""
    bytes_ = operation.msb + operation.lsb
    close = _near(machine, operation, bytes_, 1.0)
    far = machine.read_main(bytes_).beside(xpu.compute(machine, operation))
    both = close.latency + far.latency
    share = np.divide(far.latency, both, out=np.zeros_like(both), where=both > 0)
    return (
        close.times(share)
        .beside(far.times(1 - share))
        .then(machine.overhead(operation.dense, operation.starts_layer, operation.decides))
    )


def _beside_main(machine: Machine, operation: Operation) -> Cost:
    """All products inside the main memory."""
    bytes_ = operation.dense + operation.msb + operation.lsb
    return _near(machine, operation, bytes_, 1.0).then(
        machine.overhead(operation.dense, operation.starts_layer, operation.decides)
    )


def _beside_fast(machine: Machine, operation: Operation) -> Cost:
    """Resident shares beside the fast memory while the processor computes the rest from the main memory."""
    features = machine.hardware.features
    dense = operation.dense if features.fast_dense else np.zeros_like(operation.dense)
    fast = dense + operation.msb_hit + operation.lsb_hit
    total = operation.dense + operation.msb + operation.lsb
    share = np.divide(fast, total, out=np.zeros_like(total), where=total > 0)
    near = _near(machine, operation, fast, share)
    rest = in_order(machine.multiply(_scaled(work, 1 - share)) for work in operation.multiplies)
    other = machine.read_main(total - fast).beside(rest)
    return near.beside(other).then(machine.overhead(operation.dense, operation.starts_layer, operation.decides))


def _near(machine: Machine, operation: Operation, bytes_: np.ndarray, share: float | np.ndarray) -> Cost:
    """The operation's products in the memory: its bytes are read once for all of them."""
    parts = len(operation.multiplies)
    products = in_order(machine.near(bytes_ / parts, _scaled(work, share)) for work in operation.multiplies)
    near = machine.hardware.near
    if near is not None and near.interface is not None:
        weights = operation.multiplies if operation.cached is None else operation.multiplies[:-1]
        for work in weights:  # what meets keys and values was handed over as the projections' results
            products = products.then(machine.hand_over(_scaled(work, share)))
    return products.then(machine.elementwise(operation.elementwise))


def _scaled(work: Multiply, share: float | np.ndarray) -> Multiply:
    return Multiply(work.rows, work.columns, work.tokens * share, work.blocks * share, work.weight_passes)
