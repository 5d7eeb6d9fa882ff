"""A small machine and model whose costs can be computed by hand."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from elmoe.models.sizes import ModelSizes
from elmoe.models.spec import GroupedAttention, LayerSpec, ModelSpec, Moe, Rope, Router
from elmoe.schema.constants import (
    Bandwidth,
    Capacity,
    EnergyPerBit,
    EnergyPerByte,
    EnergyPerOperation,
    Frequency,
    Ratio,
    Throughput,
)
from elmoe.schema.hardware import Features, Hardware, Links, Memory, PeArray, Sram, VectorUnit
from elmoe.trace.facts import RoutingFacts


def known(kind: type, value: float) -> Any:
    return kind(value, "made up for a test", "assumed")


def memory(bandwidth: float, capacity: float, energy: float) -> Memory:
    return Memory(
        kind="test", capacity=known(Capacity, capacity), bandwidth=known(Bandwidth, bandwidth),
        energy=known(EnergyPerBit, energy), efficiency=known(Ratio, 1.0),
    )  # fmt: skip


EVERYTHING = Features(fast_dense=True, expert_cache=True, bit_slices=True, parallel_tiers=True, refill=True)
NOTHING = Features()


def hardware(features: Features = NOTHING, fast: bool = False, **changes: Any) -> Hardware:
    base = Hardware(
        name="test", description="test", main=memory(100e9, 64e9, 4e-12),
        fast=memory(1600e9, 1e9, 0.4e-12) if fast else None,
        compute=PeArray(
            elements=known(Ratio, 32), tokens=known(Ratio, 16), outputs=known(Ratio, 32), inputs=known(Ratio, 32),
            clock=known(Frequency, 1e9), mac_energy=known(EnergyPerOperation, 0.1e-12),
        ),
        sram=Sram(energy=known(EnergyPerByte, 0.5e-12)),
        links=Links(
            aggregation=known(Bandwidth, 32e9), energy=known(EnergyPerBit, 0.1e-12)
        ),
        vector=VectorUnit(throughput=known(Throughput, 1e12), energy=known(EnergyPerOperation, 1e-12)),
        static_share=Ratio(0.2, "made up for a test", "assumed", 0.05, 0.5), features=features,
    )  # fmt: skip
    return msgspec.structs.replace(base, **changes)


MODEL = ModelSizes(
    spec=ModelSpec(
        family="test", vocabulary=1024, hidden=512, norm_epsilon=1e-6, max_positions=4096, tied_embeddings=False,
        layers=(
            LayerSpec(
                attention=GroupedAttention(heads=8, kv_heads=8, head_dim=64, rope=Rope(theta=1e4, dimensions=64)),
                feed_forward=Moe(router=Router(experts=32, top_k=4), width=256),
            ),
        ) * 4,
    ),
    name="tiny", source="made up for a test",
)  # fmt: skip


def facts(sequences: int = 16, positions: int = 200, layers: int = 4, seed: int = 0) -> RoutingFacts:
    """Random rankings with some experts preferred."""
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(sequences, positions, layers, 32)) + 1.5 * rng.standard_normal((1, 1, layers, 32))
    ranked = np.argsort(-scores, axis=-1)[..., :8].astype(np.uint16)
    return RoutingFacts(
        ranked, np.full(sequences, 16, np.int32), np.full(sequences, positions, np.int32), 32, 4, "synthetic: test"
    )
