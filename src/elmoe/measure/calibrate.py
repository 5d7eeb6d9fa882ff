"""This machine as the simulator describes hardware: both tiers' bandwidths and what passes cost, measured on a store."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from time import perf_counter
from typing import TypeVar

import numpy as np

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.fitting import READ_THREADS
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.kernels.reads import ReadPool
from elmoe.measure.probe import memory_bandwidth
from elmoe.models.tensors import macs_per_token
from elmoe.schema.constants import (
    Bandwidth,
    Capacity,
    Constant,
    EnergyPerBit,
    EnergyPerByte,
    EnergyPerOperation,
    Ratio,
    Seconds,
    Throughput,
)
from elmoe.schema.hardware import Features, Hardware, Memory, Processor, Sram, VectorUnit
from elmoe.store import DirectReader, private_memory

BATCHES = (1, 2, 4, 8, 16)
TOKENS, REPEATS, DRAFT_LENGTH = 32, 3, 4
BURST, BURSTS = 4, 40
"""Experts read at once, as a layer of a small batch misses them, and how often."""
DIGITS, LEAST = 6, 1e-15
"""Significant digits of measured speeds and times, and the least value: a description holds positive ones only."""
Measured = TypeVar("Measured", bound=Constant)


@dataclass(frozen=True)
class MeasuredMachine:
    """``fast``, ``slow``: bytes/s. ``fixed``: seconds per layer and pass, ``decisions``: beyond them in target passes.
    ``throughput``: operations/s, two a multiply-accumulate. ``error``: mean relative error of the fit over the batch
    sizes."""

    fast: float
    slow: float
    fixed: float
    decisions: float
    throughput: float
    error: float


def calibrate(reader: DirectReader, slow_bandwidth: float | None = None) -> MeasuredMachine:
    """Measure decoding of random prompts with every expert cached, at several batch sizes, and both tiers; takes some
    seconds. The cost of passes includes what deciding about residents costs.

    :param slow_bandwidth: a throttle on the slow tier, bytes per second.
    """
    spec = reader.spec
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, spec.vocabulary, 16).tolist()) for _ in range(max(BATCHES))]
    points: dict[str, list[tuple[float, float]]] = {"verify": [], "draft": []}
    for batch in BATCHES:
        options = EngineOptions("elastic", batch=batch, fast_memory=1.0, split="whole_experts", draft_length=DRAFT_LENGTH)
        engine = Engine(reader, kernels, options)
        requests = [
            Request(prompt, TOKENS, SamplingParameters(0.8, seed=seed), ignore_eos=True)
            for seed, prompt in enumerate(prompts[:batch])
        ]
        engine.generate(requests)
        runs = [engine.generate(requests)[1].phases for _ in range(REPEATS)]
        for phase, found in points.items():
            counters = [run[phase] for run in runs]
            seconds = median((c.seconds - c.waited_seconds) / c.steps for c in counters)
            found.append((counters[0].tokens / counters[0].steps, seconds))
    target_fixed, per_token = _line(*np.array(points["verify"]).T)
    draft_fixed, _ = _line(*np.array(points["draft"]).T)
    fixed = min(draft_fixed, target_fixed)
    tokens, seconds = np.array(points["verify"]).T
    error = float(np.abs((target_fixed + per_token * tokens) / seconds - 1).mean())
    footprint = min(512 << 20, sum(file.bytes for file in reader.manifest.files))
    return MeasuredMachine(
        memory_bandwidth(footprint, kernels.threads()), _slow_bandwidth(reader, slow_bandwidth), fixed / len(spec.layers),
        (target_fixed - fixed) / max(1, len(spec.moe_layers)), 2 * macs_per_token(spec) / per_token, error,
    )  # fmt: skip


def _slow_bandwidth(reader: DirectReader, throttle: float | None) -> float:
    """Bytes per second of reading experts in bursts, as a layer misses them, through the engine's own pool."""
    pool = ReadPool(READ_THREADS)
    pool.set_bandwidth(throttle or 0.0)
    layer = reader.spec.moe_layers[0]
    layout = reader.expert_layout(layer)
    size = layout.msb_bytes + layout.lsb_bytes
    memory = private_memory(size * BURST)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    rng, rates = np.random.default_rng(0), []
    for _ in range(BURSTS):
        began, tickets = perf_counter(), []
        for place, expert in enumerate(rng.integers(0, reader.spec.experts, BURST).tolist()):
            handle, offset = reader.extent(layer, expert)
            at = address + place * size
            tickets += pool.submit(
                [handle, handle], [offset, offset + layout.msb_bytes], [layout.msb_bytes, layout.lsb_bytes],
                [at, at + layout.msb_bytes], 0,
            )  # fmt: skip
        pool.wait(tickets)
        rates.append(size * BURST / (perf_counter() - began))
    return median(rates)


def hardware_of(machine: MeasuredMachine, fast_bytes: int, slow_bytes: int, name: str = "this_machine") -> Hardware:
    """A measured machine as hardware of the simulator, for `elmoe simulate --hardware`; energies are not measured."""
    how = f"measured by elmoe doctor {version('elmoe')}"
    unknown = "not measured by elmoe doctor: energies of this machine mean nothing"

    def measured(kind: type[Measured], value: float) -> Measured:
        return kind(max(value, LEAST), how, "measured")

    def rounded(value: float) -> float:
        return float(f"{value:.{DIGITS}g}")

    def bits() -> EnergyPerBit:
        return EnergyPerBit(1e-12, unknown, "assumed")

    return Hardware(
        name=name,
        description="This machine, memory over a slow tier, on the shapes of one store.",
        main=Memory(
            kind="slow tier", capacity=measured(Capacity, slow_bytes), bandwidth=measured(Bandwidth, rounded(machine.slow)),
            energy=bits(),
        ),
        fast=Memory(
            kind="memory", capacity=measured(Capacity, fast_bytes), bandwidth=measured(Bandwidth, rounded(machine.fast)),
            energy=bits(),
        ),
        compute=Processor(
            throughput=measured(Throughput, rounded(machine.throughput)),
            mac_energy=EnergyPerOperation(1e-12, unknown, "assumed"),
        ),
        sram=Sram(energy=EnergyPerByte(1e-12, unknown, "assumed")),
        vector=VectorUnit(
            throughput=Throughput(1e15, "inside the measured cost of passes", "derived"),
            energy=EnergyPerOperation(1e-12, unknown, "assumed"),
        ),
        static_share=Ratio(0.2, unknown, "assumed"),
        layer_overhead=measured(Seconds, rounded(machine.fixed)),
        decision_overhead=measured(Seconds, rounded(machine.decisions)),
        features=Features(
            fast_dense=True, expert_cache=True, bit_slices=True, parallel_tiers=True, refill=True
        ),
    )  # fmt: skip


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Intercept (at least 0) and slope of least relative squares."""
    weights = 1 / y
    design = np.stack([weights, x * weights], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    if intercept < 0:
        return 0.0, float((x / y) @ np.ones_like(y) / ((x / y) @ (x / y)))
    return float(intercept), float(slope)
