"""The cost model against measurements of others: a fused MoE kernel, and boxes that decode one sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from elmoe.hw.machine import Machine
from elmoe.models.load import load_model
from elmoe.models.sizes import BITS, DEFAULTS, ModelSizes
from elmoe.schema.constants import Ratio, Seconds
from elmoe.schema.hardware import Hardware, load_hardware
from elmoe.schema.validation import Decoding, FusedKernel, load_validation
from elmoe.systems.forms import cost_of, lower
from elmoe.systems.operations import operations
from elmoe.systems.passes import Passes

MEMORY_BOUND = 64
"""Tokens up to which the fused kernel only waits for weights."""
FITTED_COLUMNS = (16, 128)


@dataclass(frozen=True)
class Check:
    """One measured and predicted value; ``fitted``: it helped to choose constants, so it proves nothing."""

    name: str
    measured: float
    predicted: float
    fitted: bool

    @property
    def error(self) -> float:
        """Relative."""
        return self.predicted / self.measured - 1


def passes_of_experts(model: ModelSizes, tokens: float, active: float, context: float = 0.0, rows: int = 1) -> Passes:
    """One pass with so many distinct experts in every layer, tokens spread evenly over them."""
    pairs = tokens * model.spec.top_k
    one, layer = np.ones(1), np.ones((1, 1))
    blocks = active * np.ceil(pairs / max(active, 1) / rows)
    return Passes(
        one * tokens, one * tokens * context, one * context, layer * active, layer * pairs, layer * blocks, layer * 0,
        layer * 0, one * 0, one, layer * 0, layer * 0,
    )  # fmt: skip


def fused_moe_checks() -> list[Check]:
    """The fused MoE layer in microseconds: overhead and bandwidth efficiency fitted on the 16- and 128-expert columns of the
    memory-bound rows, tested on the others; rows above 64 tokens are predicted too, with the preset's peak throughput."""
    data = load_validation("fused_moe")
    assert isinstance(data, FusedKernel)
    format = next(name for name, bits in BITS.items() if bits == (data.bits_per_weight,))
    model = msgspec.structs.replace(load_model(data.model), formats=dict.fromkeys(DEFAULTS, format))
    bare = load_hardware(data.hardware)
    known = [row for row in data.rows if row.experts in FITTED_COLUMNS and row.tokens <= MEMORY_BOUND]
    expert_seconds = model.expert.expert_bytes / bare.main.bandwidth.value
    slope, fixed = np.polyfit([row.experts for row in known], [row.microseconds * 1e-6 for row in known], 1)
    hardware = _with(bare, expert_seconds / slope, fixed)
    machine = Machine(hardware)
    checks = []
    for row in data.rows:
        passes = passes_of_experts(model, row.tokens, row.experts)
        experts = next(op for op in operations(model, passes, machine) if op.name == "experts")
        predicted = float(lower(machine, replace(experts, starts_layer=True)).latency.sum()) * 1e6
        checks.append(Check(f"{row.tokens} tokens, {row.experts} experts", row.microseconds, predicted, row in known))
    return checks


def box_checks() -> list[Check]:
    """Tokens per second of one sequence on the DGX Spark: one efficiency for all its models (and no overhead), the one that
    makes the geometric mean of the ratios 1."""
    data = load_validation("dgx_spark")
    assert isinstance(data, Decoding)
    ideal = _with(load_hardware(data.hardware), 1.0, 0.0)
    rates = [1 / _seconds_per_token(load_model(row.model), Machine(ideal)) for row in data.rows]
    measured = [row.tokens_per_second for row in data.rows]
    efficiency = float(np.exp(np.mean(np.log(np.array(measured) / np.array(rates)))))
    machine = Machine(_with(ideal, efficiency, 0.0))
    return [
        Check(row.measured, row.tokens_per_second, 1 / _seconds_per_token(load_model(row.model), machine), True)
        for row in data.rows
    ]


def preset_box_checks() -> list[Check]:
    """The same with the preset's efficiency and overhead per layer, fitted to two of the rows."""
    data = load_validation("dgx_spark")
    assert isinstance(data, Decoding)
    machine = Machine(load_hardware(data.hardware))
    return [
        Check(row.measured, row.tokens_per_second, 1 / _seconds_per_token(load_model(row.model), machine), row.fitted)
        for row in data.rows
    ]


def _seconds_per_token(model: ModelSizes, machine: Machine, context: float = 512.0) -> float:
    passes = passes_of_experts(model, 1, model.spec.top_k, context)
    return float(cost_of(machine, operations(model, passes, machine)).latency.sum())


def _with(hardware: Hardware, efficiency: float, overhead: float) -> Hardware:
    def fitted(kind: type, value: float) -> Any:
        return kind(value, "fitted to the validation data", "derived")

    main = msgspec.structs.replace(hardware.main, efficiency=fitted(Ratio, efficiency), refresh=None)
    return msgspec.structs.replace(hardware, main=main, layer_overhead=fitted(Seconds, overhead))
