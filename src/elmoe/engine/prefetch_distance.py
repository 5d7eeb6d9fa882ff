"""How far ahead the kernels ask for weights, measured on a large store's own weights when it is opened."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import numpy as np

from elmoe import kernels
from elmoe.engine.decoder import WeightReader

DISTANCES = (1024, 2048, 4096, 8192)
ROUNDS = 6
LEAST_BYTES = 512 << 20
"""Of all experts: smaller ones stay in caches, where the distance matters little."""
LEAST_RATE = 4e9
"""Bytes per second: a slower measurement read from disk, or ran beside others, and says nothing."""
GAIN = 1.02
"""Another distance than the current one must be this much faster: runs of a few milliseconds are noisy."""


def choose_prefetch_distance(reader: WeightReader) -> dict[int, float]:
    """Choose the distance for a store that lies in memory; seconds by distance, nothing where it was not measured.

    Each measurement runs other experts, so that their weights come from memory; a hidden state of zeros costs what any does.
    """
    spec = reader.spec
    layouts = {layer: reader.expert_layout(layer) for layer in spec.moe_layers}
    expert_bytes = {layer: layout.msb_bytes + layout.lsb_bytes for layer, layout in layouts.items()}
    if kernels.PREFETCH_PINNED or spec.experts * sum(expert_bytes.values()) < LEAST_BYTES:
        return {}
    groups = [
        (layer, np.arange(first, first + spec.top_k, dtype=np.int32)[None])
        for first in range(0, spec.experts - spec.top_k + 1, spec.top_k)
        for layer in spec.moe_layers
    ]
    x, weights = np.zeros((1, spec.hidden), np.float32), np.ones((1, spec.top_k), np.float32)
    default = kernels.prefetch()
    seconds: dict[int, list[float]] = {distance: [] for distance in DISTANCES}
    for turn, (layer, experts) in enumerate(groups[: ROUNDS * len(DISTANCES)]):
        distance = DISTANCES[(turn + turn // len(DISTANCES)) % len(DISTANCES)]
        kernels.set_prefetch(distance)
        began = perf_counter()
        kernels.expert_ffn(layouts[layer], reader.expert_addresses(layer), x, experts, weights, x.copy())
        seconds[distance].append(perf_counter() - began)
        if spec.top_k * expert_bytes[layer] < LEAST_RATE * seconds[distance][-1]:
            kernels.set_prefetch(default)
            return {}
    medians = {distance: median(values) for distance, values in seconds.items() if values}
    best = min(medians, key=lambda distance: medians[distance])
    kernels.set_prefetch(best if medians[best] * GAIN < medians.get(default, float("inf")) else default)
    return medians
