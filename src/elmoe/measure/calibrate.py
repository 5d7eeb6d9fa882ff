"""This machine as the simulator describes hardware: both tiers' bandwidths and what passes cost, measured on a store."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from statistics import median
from time import perf_counter

import numpy as np

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import READ_THREADS, Engine, EngineOptions
from elmoe.engine.request import Request
from elmoe.kernels.reads import ReadPool
from elmoe.measure.probe import memory_bandwidth
from elmoe.schema.model import ModelSchema
from elmoe.store import DirectReader, private_memory

BATCHES = (1, 2, 4, 8, 16)
TOKENS, REPEATS, DRAFT_LENGTH = 32, 3, 4
BURST, BURSTS = 4, 40
"""Experts read at once, as a layer of a small batch misses them, and how often."""


@dataclass(frozen=True)
class Calibration:
    """``fast``, ``slow``: bytes/s. ``fixed``: seconds per layer and pass, ``decisions``: beyond them in target passes.
    ``throughput``: operations/s, two a
    multiply-accumulate. ``error``: mean relative error of the fit over the batch sizes."""

    fast: float
    slow: float
    fixed: float
    decisions: float
    throughput: float
    error: float


def calibrate(reader: DirectReader, slow_bandwidth: float | None = None) -> Calibration:
    """Measure decoding of random prompts with every expert cached, at several batch sizes, and both tiers; takes some
    seconds. The cost of passes includes what deciding about residents costs.

    :param slow_bandwidth: a throttle on the slow tier, bytes per second.
    """
    schema = reader.schema
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, schema.vocabulary, 16).tolist()) for _ in range(max(BATCHES))]
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
    return Calibration(
        memory_bandwidth(footprint, kernels.threads()), _slow_bandwidth(reader, slow_bandwidth), fixed / schema.layers,
        (target_fixed - fixed) / max(1, len(schema.moe_layers)), 2 * _macs(schema) / per_token, error,
    )  # fmt: skip


def _slow_bandwidth(reader: DirectReader, throttle: float | None) -> float:
    """Bytes per second of reading experts in bursts, as a layer misses them, through the engine's own pool."""
    pool = ReadPool(READ_THREADS)
    pool.set_bandwidth(throttle or 0.0)
    layer = reader.schema.moe_layers[0]
    layout = reader.expert_layout(layer)
    size = layout.msb_bytes + layout.lsb_bytes
    memory = private_memory(size * BURST)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    rng, rates = np.random.default_rng(0), []
    for _ in range(BURSTS):
        began, tickets = perf_counter(), []
        for place, expert in enumerate(rng.integers(0, reader.schema.experts, BURST).tolist()):
            handle, offset = reader.extent(layer, expert)
            at = address + place * size
            tickets += pool.submit(
                [handle, handle], [offset, offset + layout.msb_bytes], [layout.msb_bytes, layout.lsb_bytes],
                [at, at + layout.msb_bytes], 0,
            )  # fmt: skip
        pool.wait(tickets)
        rates.append(size * BURST / (perf_counter() - began))
    return median(rates)


def hardware_yaml(calibration: Calibration, fast_bytes: int, slow_bytes: int, name: str = "this_machine") -> str:
    """The calibration as a hardware description for `elmoe simulate --hardware`; energies are not measured."""
    how = f"measured by elmoe doctor {version('elmoe')}"
    unknown = "not measured by elmoe doctor: energies of this machine mean nothing"

    def measured(value: str) -> str:
        return f'{{value: {value}, source: "{how}", status: measured}}'

    def assumed(value: str) -> str:
        return f'{{value: {value}, source: "{unknown}", status: assumed}}'

    return f"""name: {name}
description: This machine, memory over a slow tier, on the shapes of one store.
main:
  kind: slow tier
  capacity: {measured(f"{slow_bytes} B")}
  bandwidth: {measured(f"{calibration.slow / 1e9:.6f} GB/s")}
  energy: {assumed("1 pJ/bit")}
fast:
  kind: memory
  capacity: {measured(f"{fast_bytes} B")}
  bandwidth: {measured(f"{calibration.fast / 1e9:.6f} GB/s")}
  energy: {assumed("1 pJ/bit")}
compute:
  kind: processor
  throughput: {measured(f"{calibration.throughput / 1e9:.6f} GOPS")}
  mac_energy: {assumed("1 pJ")}
sram:
  energy: {assumed("1 pJ/B")}
vector:
  throughput: {{value: 1000 TOPS, source: "inside the measured cost of passes", status: derived}}
  energy: {assumed("1 pJ")}
static_share: {assumed("20 %")}
layer_overhead: {measured(f"{max(calibration.fixed, 1e-9) * 1e6:.6f} us")}
decision_overhead: {measured(f"{max(calibration.decisions, 1e-9) * 1e6:.6f} us")}
features: {{fast_dense: true, expert_cache: true, bit_slices: true, parallel_tiers: true, refill: true,
  lsb_augmentation: true}}
"""


def _macs(schema: ModelSchema) -> float:
    """Multiply-accumulates of weights per token."""
    attention = schema.hidden * schema.head_dim * 2 * (schema.heads + schema.kv_heads)
    experts = schema.top_k * 3 * schema.hidden * schema.expert_width + schema.hidden * schema.experts
    moe, dense = len(schema.moe_layers), len(schema.dense_layers)
    feed_forward = moe * experts + dense * 3 * schema.hidden * schema.dense_width
    return float(schema.layers * attention + feed_forward + schema.hidden * schema.vocabulary)


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Intercept (at least 0) and slope of least relative squares."""
    weights = 1 / y
    design = np.stack([weights, x * weights], axis=1)
    (intercept, slope), *_ = np.linalg.lstsq(design, np.ones_like(y), rcond=None)
    if intercept < 0:
        return 0.0, float((x / y) @ np.ones_like(y) / ((x / y) @ (x / y)))
    return float(intercept), float(slope)
