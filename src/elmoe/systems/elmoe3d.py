"""A processor over two memories: ELMoE-3D, and with fewer features an expert cache in fast memory (HB-xPU)."""

from __future__ import annotations

import numpy as np

from elmoe.hw.cost import Cost
from elmoe.hw.machine import Machine
from elmoe.systems.operations import Operation
from elmoe.systems.xpu import compute


def lower(machine: Machine, operation: Operation) -> Cost:
    """Seconds and joules of one execution: hits and dense parts from the fast memory, the rest from the main one.

    Where an operation draws on both, their partial sums meet over the aggregation links. Slices captured for the fast
    memory are charged by :func:`refill`.
    """
    features = machine.hardware.features
    dense_fast = operation.dense if features.fast_dense else np.zeros_like(operation.dense)
    hit = operation.msb_hit + operation.lsb_hit if features.expert_cache else np.zeros_like(operation.msb)
    fast = dense_fast + hit
    main = (operation.dense - dense_fast) + operation.msb + operation.lsb - hit
    read = machine.read_main(main)
    if machine.hardware.fast is not None:
        other = machine.read_fast(fast)
        read = read.beside(other) if features.parallel_tiers else read.then(other)
    work = compute(machine, operation)
    if features.parallel_tiers:
        work = work.then(machine.exchange(np.where((fast > 0) & (main > 0), operation.sums, 0.0)))
    return read.beside(work).then(machine.overhead(operation.dense, operation.starts_layer, operation.decides))


def refill(machine: Machine, captured: np.ndarray) -> Cost:
    """Slices written into the fast memory while they stream by: energy, no time."""
    return machine.write_fast(captured)
