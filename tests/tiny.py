"""Small random models held in memory, for tests of the decoder and the engine."""

from __future__ import annotations

import numpy as np

from elmoe.bitslice import ExpertLayout, NestedMatrix
from elmoe.schema.model import ModelSchema


def tiny_schema(**changes: object) -> ModelSchema:
    values: dict = dict(
        family="qwen3_moe", vocabulary=97, hidden=48, layers=3, heads=4, kv_heads=2, head_dim=16, experts=8, top_k=2,
        expert_width=32, dense_width=64, dense_layers=(), normalize_top_k=True, norm_epsilon=1e-6, rope_theta=10000.0,
        max_positions=256, tied_embeddings=True, eos_tokens=(0,),
    )  # fmt: skip
    return ModelSchema(**(values | changes))


class TinyReader:
    """Random weights with the reader interface of a store."""

    def __init__(self, schema: ModelSchema, seed: int = 0) -> None:
        self.schema = schema
        rng = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> NestedMatrix:
            return NestedMatrix.from_weights((rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32))

        def norm(size: int) -> np.ndarray:
            return (1 + 0.1 * rng.standard_normal(size)).astype(np.float32)

        self._nested = {"embedding": matrix(schema.vocabulary, schema.hidden)}
        if not schema.tied_embeddings:
            self._nested["head"] = matrix(schema.vocabulary, schema.hidden)
        self._arrays = {"final_norm": norm(schema.hidden)}
        self._records, self._addresses = [], []
        for layer in range(schema.layers):
            name = f"layers.{layer}."
            inner = schema.heads * schema.head_dim
            self._nested[name + "query_key_value"] = matrix(inner + 2 * schema.kv_heads * schema.head_dim, schema.hidden)
            self._nested[name + "attention_output"] = matrix(schema.hidden, inner)
            self._arrays[name + "attention_norm"] = norm(schema.hidden)
            self._arrays[name + "ffn_norm"] = norm(schema.hidden)
            self._arrays[name + "query_norm"] = norm(schema.head_dim)
            self._arrays[name + "key_norm"] = norm(schema.head_dim)
            self._arrays[name + "router"] = rng.standard_normal((schema.experts, schema.hidden)).astype(np.float32) * 0.3
            layout = self.expert_layout(layer)
            addresses = np.zeros((1 if layer in schema.dense_layers else schema.experts, 2), np.int64)
            for expert in range(len(addresses)):
                records = layout.pack(
                    {p: matrix(*layout.shape(p)) for p in ("gate", "up")} | {"down": matrix(*layout.shape("down"))}
                )
                self._records.append(records)
                addresses[expert] = [record.ctypes.data for record in records]
            self._addresses.append(addresses)
        self.dense_bytes = sum(m.hi.nbytes * 2 + m.scales.nbytes for m in self._nested.values())

    def nested(self, name: str) -> NestedMatrix:
        return self._nested[name]

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def expert_layout(self, layer: int) -> ExpertLayout:
        width = self.schema.dense_width if layer in self.schema.dense_layers else self.schema.expert_width
        return ExpertLayout(self.schema.hidden, width)

    def expert_addresses(self, layer: int) -> np.ndarray:
        return self._addresses[layer]
