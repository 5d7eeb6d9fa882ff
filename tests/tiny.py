"""Small random models held in memory, for tests of the decoder and the engine."""

from __future__ import annotations

import numpy as np

from elmoe.bitslice import ExpertLayout, NestedMatrix
from elmoe.engine.kv_cache import CacheEntry, PagedCache
from elmoe.models.spec import Dense, GroupedAttention, LayerSpec, ModelSpec, Moe, Rope, Router
from elmoe.models.tensors import PROJECTIONS, feed_forward, feed_forwards, shared_feed_forward, tensors
from elmoe.store.layout import record_layout


def tiny_spec(
    *,
    vocabulary: int = 97,
    hidden: int = 48,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    expert_width: int = 32,
    dense_width: int = 64,
    dense_layers: tuple[int, ...] = (),
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    max_positions: int = 256,
    tied_embeddings: bool = True,
    normalize: bool = True,
    eos_tokens: tuple[int, ...] = (0,),
) -> ModelSpec:
    attention = GroupedAttention(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope=Rope(theta=10000.0, dimensions=head_dim),
        query_key_norm="head",
    )
    moe = Moe(router=Router(experts=experts, top_k=top_k, normalize=normalize), width=expert_width)
    dense = Dense(width=dense_width)
    return ModelSpec(
        family="qwen3_moe", vocabulary=vocabulary, hidden=hidden, norm_epsilon=1e-6, max_positions=max_positions,
        layers=tuple(
            LayerSpec(attention=attention, feed_forward=dense if i in dense_layers else moe) for i in range(layers)
        ),
        tied_embeddings=tied_embeddings, eos_tokens=eos_tokens,
    )  # fmt: skip


class TinyReader:
    """Random weights with the reader interface of a store."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.spec = spec
        rng = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> NestedMatrix:
            return NestedMatrix.from_weights((rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32))

        self._nested, self._arrays = {}, {}
        for tensor in tensors(spec):
            if tensor.kind == "matrix":
                self._nested[tensor.name] = matrix(*tensor.shape)
            elif len(tensor.shape) == 1:
                self._arrays[tensor.name] = (1 + 0.1 * rng.standard_normal(tensor.shape)).astype(np.float32)
            else:
                self._arrays[tensor.name] = rng.standard_normal(tensor.shape).astype(np.float32) * 0.3
        self._records, self._addresses = [], {}
        for part in feed_forwards(spec):
            addresses = np.zeros((part.count, 2), np.int64)
            for expert in range(part.count):
                records = record_layout(part).pack({name: matrix(*part.shape(name)) for name in PROJECTIONS})
                self._records.append(records)
                addresses[expert] = [record.ctypes.data for record in records]
            self._addresses[part.name] = addresses
        self.dense_bytes = sum(m.hi.nbytes * 2 + m.scales.nbytes for m in self._nested.values())

    def matrix(self, name: str) -> NestedMatrix:
        return self._nested[name]

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def expert_layout(self, layer: int, shared: bool = False) -> ExpertLayout:
        return record_layout((shared_feed_forward if shared else feed_forward)(self.spec, layer))

    def expert_addresses(self, layer: int, shared: bool = False) -> np.ndarray:
        return self._addresses[(shared_feed_forward if shared else feed_forward)(self.spec, layer).name]


def bound_cache(spec: ModelSpec, rows: int, positions: int, reserved: int | None = None) -> PagedCache:
    """A cache whose rows are bound to sequences with pages for ``reserved`` positions each (None: all)."""
    cache = PagedCache(spec, rows, positions)
    for _ in range(rows):
        entry = CacheEntry()
        cache.bind(entry)
        cache.reserve(entry, positions if reserved is None else reserved)
    return cache
