"""Costs of elementary operations on a described machine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elmoe.hw.cost import Array, Cost
from elmoe.hw.efficiency import streaming_bandwidth
from elmoe.schema.hardware import Hardware, Memory, PeArray

BITS = 8
"""Bits of a byte."""


@dataclass(frozen=True)
class Multiply:
    """Matrix products of one operation: weights of ``rows`` outputs x ``columns`` inputs meeting tokens.

    ``tokens``: token-matrix pairs, each of rows x columns multiply-accumulates. ``blocks``: sum over matrices of
    ceil(tokens of the matrix / token rows of a PE), what a PE array takes time for. ``weight_passes``: of 4 bits, 2 for
    8-bit weights and 1 for 4-bit ones, or a mean over matrices.
    """

    rows: float
    columns: float
    tokens: Array
    blocks: Array
    weight_passes: float | Array = 2.0


class Machine:
    """A described machine's elementary costs. Every method takes arrays of one shape and gives a :class:`Cost` of it."""

    def __init__(self, hardware: Hardware) -> None:
        self.hardware = hardware
        self.main_bandwidth = streaming_bandwidth(hardware.main)
        self.fast_bandwidth = 0.0 if hardware.fast is None else streaming_bandwidth(hardware.fast)
        compute = hardware.compute
        self.token_rows = int(compute.tokens.value) if isinstance(compute, PeArray) else 1

    def read_main(self, count: Array) -> Cost:
        """Stream ``count`` bytes from the main memory."""
        return self._transfer("main", self.hardware.main, self.main_bandwidth, count)

    def read_fast(self, count: Array) -> Cost:
        """Stream ``count`` bytes from the fast memory."""
        assert self.hardware.fast is not None
        return self._transfer("fast", self.hardware.fast, self.fast_bandwidth, count)

    def write_fast(self, count: Array) -> Cost:
        """Store bytes that were streamed from the main memory anyway: energy and traffic, hidden behind that stream."""
        assert self.hardware.fast is not None
        joules = count * BITS * self.hardware.fast.energy.value
        return Cost(np.zeros_like(count), {"fast memory": joules}, {}, {"fast written": count})

    def multiply(self, work: Multiply) -> Cost:
        """Matrix products on the main processor, weights and activations through its SRAM."""
        compute = self.hardware.compute
        macs = work.tokens * (work.rows * work.columns)
        if isinstance(compute, PeArray):
            tiles = np.ceil(work.rows / compute.outputs.value) * np.ceil(work.columns / compute.inputs.value)
            clocks = work.blocks * tiles * work.weight_passes / compute.elements.value
            seconds = clocks / compute.clock.value
            joules = macs * compute.mac_energy.value * (work.weight_passes / 2)
        else:
            seconds = 2 * macs / compute.throughput.value
            joules = macs * compute.mac_energy.value
        weight_bytes = work.blocks * (work.rows * work.columns * work.weight_passes / 2)
        activation_bytes = work.tokens * (work.columns + 4 * work.rows)
        sram = (weight_bytes + activation_bytes) * self.hardware.sram.energy.value
        return Cost(seconds, {"multiply": joules, "sram": sram}, {"compute": seconds}, {})

    def elementwise(self, operations: Array) -> Cost:
        """Norms, softmax, activation functions, routing."""
        vector = self.hardware.vector
        seconds = operations / vector.throughput.value
        return Cost(seconds, {"vector": operations * vector.energy.value}, {"vector": seconds}, {})

    def exchange(self, count: Array) -> Cost:
        """Partial sums of ``count`` bytes between processing elements."""
        links = self.hardware.links
        if links is None:
            return Cost(np.zeros_like(count))
        seconds = count / links.aggregation.value
        return Cost(seconds, {"links": count * BITS * links.energy.value}, {"links": seconds}, {})

    def near(self, count: Array, work: Multiply) -> Cost:
        """Matrix products beside the memory that holds their ``count`` bytes: the slower of reading and computing.

        The units work as they read, so what delays reads (``efficiency``) delays both.
        """
        near = self.hardware.near
        assert near is not None
        macs = work.tokens * (work.rows * work.columns)
        rated = macs if near.narrow == "same" else macs * (np.minimum(work.weight_passes, 2) / 2)
        bandwidth = near.bandwidth.value * (1.0 if near.efficiency is None else near.efficiency.value)
        seconds = np.maximum(count / bandwidth, 2 * rated / (bandwidth * near.intensity.value))
        memory = {"main": "main memory", "fast": "fast memory"}[near.placement]
        mac = self.hardware.compute.mac_energy if near.mac_energy is None else near.mac_energy
        energy = {memory: count * BITS * near.energy.value, "multiply": rated * mac.value}
        return Cost(seconds, energy, {"near": seconds}, {near.placement: count})

    def hand_over(self, work: Multiply) -> Cost:
        """Inputs of products beside a memory on their way to its units, and their results on the way back.

        One byte for an input and four for a sum, each once, as the processor's own SRAM takes them.
        """
        near = self.hardware.near
        assert near is not None
        count = work.tokens * (work.columns + 4 * work.rows)
        if near.interface is None:
            return Cost(np.zeros_like(count))
        memory = self.hardware.main if near.placement == "main" else self.hardware.fast
        assert memory is not None
        seconds = count / near.interface.value
        return Cost(seconds, {"hand-over": count * BITS * memory.energy.value}, {"hand-over": seconds}, {"hand-over": count})

    def overhead(self, like: Array, starts_layer: bool, decides: bool) -> Cost:
        """Fixed seconds of a pass: of a layer, borne by what starts it, and of deciding about residents."""
        hardware = self.hardware
        parts = ((hardware.layer_overhead, starts_layer), (hardware.decision_overhead, decides))
        seconds = sum(fixed.value for fixed, borne in parts if fixed is not None and borne)
        return Cost(np.full_like(like, seconds, np.float64))

    def _transfer(self, name: str, memory: Memory, bandwidth: float, count: Array) -> Cost:
        seconds = count / bandwidth
        return Cost(seconds, {f"{name} memory": count * BITS * memory.energy.value}, {name: seconds}, {name: count})
