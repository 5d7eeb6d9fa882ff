"""Processors with compute inside or under a memory (bank PIM, logic-die PIM, hybrid-bonded NMP).

Each operation runs where it is faster: beside the memory, or on the processor over the external interface. That is kinder to
these systems than any published scheduler, which must decide before it knows.
"""

from __future__ import annotations

import numpy as np

from elmoe.hw.cost import Cost, in_order
from elmoe.hw.machine import Machine, Multiply
from elmoe.systems import elmoe3d, xpu
from elmoe.systems.operations import Operation


def lower(machine: Machine, operation: Operation) -> Cost:
    """Seconds and joules of one execution."""
    near = machine.hardware.near
    assert near is not None
    if near.placement == "main":
        return xpu.lower(machine, operation).or_faster(_beside_main(machine, operation))
    return elmoe3d.lower(machine, operation).or_faster(_beside_fast(machine, operation))


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
    return products.then(machine.elementwise(operation.elementwise))


def _scaled(work: Multiply, share: float | np.ndarray) -> Multiply:
    return Multiply(work.rows, work.columns, work.tokens * share, work.blocks * share, work.weight_passes)
