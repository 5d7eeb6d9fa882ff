"""A processor over two memories: ELMoE-3D, and with fewer features an expert cache in fast memory (HB-xPU)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from elmoe.hw.cost import Array, Cost
from elmoe.hw.machine import Machine
from elmoe.systems.operations import Operation
from elmoe.systems.passes import Passes
from elmoe.systems.xpu import compute

FORESIGHT = 0.9
"""Share of the slices that a draft routes to, and that are missing, which verification then uses. Measured on the demo
model with drafts of 4 tokens: 0.87 to 0.98, the less the fewer experts are resident (docs/log.md, 2026-11-30)."""


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


def read_ahead(machine: Machine, missing: Array, seconds: Array, room: Array | float) -> tuple[Cost, Array]:
    """What is read while a draft goes on, and the share of the foreseen slices that is then in the fast memory.

    A draft uses the fast memory alone, so the main one is free for the slices that verification will need. The first draft
    pass has to end before any is known. Of what is read, ``FORESIGHT`` is used.

    :param missing: bytes of the foreseen slices, which the draft's own routing is taken to name as many of. :param seconds:
        of the draft passes behind the first. :param room: bytes of fast memory beside the residents.
    """
    read = np.minimum(missing, np.minimum(seconds * machine.main_bandwidth, room))
    share = FORESIGHT * np.divide(read, missing, out=np.zeros_like(missing), where=missing > 0)
    return machine.read_main(read).then(machine.write_fast(read)), share


def with_ahead(passes: Passes, share: Array) -> Passes:
    """Passes in which this share (passes,) of the foreseen slices is in the fast memory."""
    return replace(
        passes, msb_hits=passes.msb_hits + share[:, None] * passes.msb_foreseen,
        lsb_hits=passes.lsb_hits + share[:, None] * passes.lsb_foreseen,
    )  # fmt: skip


def streamed(target: Cost, foreseen: Cost) -> Cost:
    """A target pass whose foreseen slices are read whenever the main memory is free, not only in their own layer's turn.

    :param target: its cost with reads in turn. :param foreseen: its cost if the foreseen slices were there.
    """
    latency = np.minimum(target.latency, np.maximum(foreseen.latency, target.busy.get("main", 0.0)))
    return replace(target, latency=latency)
