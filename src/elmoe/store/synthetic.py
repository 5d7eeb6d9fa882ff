"""Stores with the shapes of a model and deterministic random weights, written straight to disk for benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from elmoe.bitslice import ExpertLayout, NestedMatrix
from elmoe.bitslice.expert import PROJECTIONS
from elmoe.bitslice.nested import BLOCK_ROWS, GROUP, GROUP_BYTES, ceil_div
from elmoe.schema.model import ModelSchema
from elmoe.store.writer import DenseFile, StoreWriter

UNIFORM_CODE_DEVIATION = 73.9
"""Standard deviation of codes drawn evenly from -128..127."""


def random_matrix(rng: np.random.Generator, rows: int, columns: int) -> NestedMatrix:
    """Uniform random nibbles; one scale, so that an output has about the variance of an input."""
    grid = ceil_div(rows, BLOCK_ROWS), ceil_div(columns, GROUP)
    scale = np.float16(1 / (UNIFORM_CODE_DEVIATION * np.sqrt(columns)))
    planes = [np.frombuffer(rng.bytes(grid[0] * grid[1] * GROUP_BYTES), np.uint8) for _ in range(2)]
    hi, lo = (plane.reshape(*grid, GROUP_BYTES) for plane in planes)
    return NestedMatrix(rows, columns, hi, lo, np.full((*grid, BLOCK_ROWS), scale, np.float16))


def byte_tokenizer(vocabulary: int) -> bytes:
    """A tokenizer.json of single bytes, filled up with tokens that text never yields."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = symbols + [f"<filler {index}>" for index in range(max(0, vocabulary - len(symbols)))]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


def synthesize(path: Path, schema: ModelSchema, seed: int = 0, progress: Callable[[int, int], None] | None = None) -> None:
    """Write a store with random weights; equal schema and seed give equal bytes. ``progress`` takes (done, total) experts.

    :raises ConvertError: the target exists or the disk has no room.
    """
    writer = StoreWriter(path, schema, f"random weights, seed {seed}", f"synthetic {seed} {schema}")
    total, done = len(schema.moe_layers) * schema.experts, 0

    def generator(*key: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([seed, *key]))

    def expert(layout: ExpertLayout, *key: int) -> tuple[np.ndarray, np.ndarray]:
        rng = generator(*key)
        return layout.pack({projection: random_matrix(rng, *layout.shape(projection)) for projection in PROJECTIONS})

    def fill(dense: DenseFile) -> None:
        rng = generator(1)
        inner = schema.heads * schema.head_dim
        dense.matrix("embedding", random_matrix(rng, schema.vocabulary, schema.hidden))
        if not schema.tied_embeddings:
            dense.matrix("head", random_matrix(rng, schema.vocabulary, schema.hidden))
        dense.array("final_norm", np.ones(schema.hidden, np.float32))
        for layer in range(schema.layers):
            rng, name = generator(2, layer), f"layers.{layer}."
            rows = inner + 2 * schema.kv_heads * schema.head_dim
            dense.array(name + "attention_norm", np.ones(schema.hidden, np.float32))
            dense.matrix(name + "query_key_value", random_matrix(rng, rows, schema.hidden))
            dense.array(name + "query_norm", np.ones(schema.head_dim, np.float32))
            dense.array(name + "key_norm", np.ones(schema.head_dim, np.float32))
            dense.matrix(name + "attention_output", random_matrix(rng, schema.hidden, inner))
            dense.array(name + "ffn_norm", np.ones(schema.hidden, np.float32))
            if layer in schema.dense_layers:
                layout = ExpertLayout(schema.hidden, schema.dense_width)
                dense.expert(name + "dense_ffn", layout, *expert(layout, 3, layer))
            else:
                router = rng.standard_normal((schema.experts, schema.hidden), np.float32)
                dense.array(name + "router", router * np.float32(2 / np.sqrt(schema.hidden)))

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    writer.dense_file(fill)
    layout = ExpertLayout(schema.hidden, schema.expert_width)
    for layer in schema.moe_layers:
        writer.layer(layer, layout, partial(expert, layout, 4, layer), step)
    writer.finish(byte_tokenizer(schema.vocabulary))
