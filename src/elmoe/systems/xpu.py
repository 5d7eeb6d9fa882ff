"""The bare processor: everything is streamed from the main memory, reads overlap with compute within an operation."""

from __future__ import annotations

from elmoe.hw.cost import Cost, in_order
from elmoe.hw.machine import Machine
from elmoe.systems.operations import Operation


def lower(machine: Machine, operation: Operation) -> Cost:
    """Seconds and joules of one execution."""
    read = machine.read_main(operation.dense + operation.msb + operation.lsb)
    return read.beside(compute(machine, operation)).then(
        machine.overhead(operation.dense, operation.starts_layer, operation.decides)
    )


def compute(machine: Machine, operation: Operation) -> Cost:
    """The processor's side of an operation: products, then elementwise work."""
    products = in_order(machine.multiply(work) for work in operation.multiplies)
    return products.then(machine.elementwise(operation.elementwise))
