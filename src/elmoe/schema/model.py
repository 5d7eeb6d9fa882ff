"""The architecture of a model as the engine, the store and the simulator see it."""

from __future__ import annotations

import msgspec


class ModelSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Shapes and constants of a decoder-only MoE transformer. Read from a checkpoint's config.json by its family file.

    ``dense_layers`` are the layers with one dense FFN of ``dense_width`` in place of experts. ``eos_tokens`` end a
    generation. ``normalize_top_k``: whether the weights of the chosen experts are rescaled to sum to one.
    """

    family: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    top_k: int
    expert_width: int
    dense_width: int
    dense_layers: tuple[int, ...] = ()
    normalize_top_k: bool
    norm_epsilon: float
    rope_theta: float
    max_positions: int
    tied_embeddings: bool
    eos_tokens: tuple[int, ...] = ()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have experts."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dense_layers)

    @property
    def kv_bytes_per_position(self) -> int:
        """Bytes of one position's keys and values over all layers, fp16."""
        return self.layers * 2 * self.kv_heads * self.head_dim * 2
