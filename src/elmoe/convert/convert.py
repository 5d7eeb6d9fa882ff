"""The conversion: every tensor is checked first, then written file by file, resuming where an earlier attempt stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import ExpertLayout, NestedMatrix
from elmoe.bitslice.expert import PROJECTIONS
from elmoe.convert.checkpoint import Checkpoint, read_json
from elmoe.errors import ConvertError
from elmoe.models import family_of
from elmoe.schema.model import ModelSchema
from elmoe.store import StoreWriter
from elmoe.store.writer import DenseFile

NORM_NAMES = ("norm", "router")
"""Tensors whose names end so stay float32."""


def schema_of_config(config: dict[str, Any]) -> ModelSchema:
    """The schema of a Hugging Face config; ConvertError names an architecture or a value that is not supported."""
    return family_of(config).read_config(config)


def convert_checkpoint(source: str | Path, store: str | Path, progress: Callable[[int, int], None] | None = None) -> None:
    """Convert a Hugging Face folder to a store.

    :param progress: takes (tensors and experts done, all).
    :raises ConvertError: the checkpoint is incomplete or not supported, or the store cannot be written.
    :raises NumericsError: a weight is NaN or infinite; the message names the tensor.
    """
    checkpoint = Checkpoint(Path(source))
    family = family_of(checkpoint.config)
    config = dict(checkpoint.config)
    if (checkpoint.folder / "generation_config.json").is_file():
        eos = read_json(checkpoint.folder / "generation_config.json").get("eos_token_id")
        config["eos_token_id"] = _merged(config.get("eos_token_id"), eos)
    schema = family.read_config(config)
    sources = family.tensor_sources(schema)
    tokenizer, template = checkpoint.tokenizer(), checkpoint.chat_template()
    for parts in sources.values():
        for name, shape in parts:
            checkpoint.check(name, shape)
    for layer in range(schema.layers):
        for expert in range(schema.experts if layer in schema.moe_layers else 1):
            for name, shape in family.ffn_sources(schema, layer, expert).values():
                checkpoint.check(name, shape)
    total = len(sources) + len(schema.moe_layers) * schema.experts
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def records(layout: ExpertLayout, layer: int, expert: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        names = family.ffn_sources(schema, layer, expert)
        return layout.pack(
            {
                projection: NestedMatrix.from_weights(checkpoint.rows([names[projection][0]]), names[projection][0])
                for projection in PROJECTIONS
            }
        )

    def fill(dense: DenseFile) -> None:
        for name, parts in sources.items():
            names, shapes = [part[0] for part in parts], [part[1] for part in parts]
            if name.endswith(NORM_NAMES):
                values = np.ascontiguousarray(checkpoint.rows(names))
                if not np.isfinite(values).all():
                    raise ConvertError(f"tensor '{names[0]}' holds NaN or infinite values")
                dense.array(name, values)
            else:
                rows = sum(shape[0] for shape in shapes)
                dense.nested(name, (rows, shapes[0][1]), partial(checkpoint.rows, names), ", ".join(names))
            step()
        for layer in schema.dense_layers:
            layout = ExpertLayout(schema.hidden, schema.dense_width)
            dense.expert(f"layers.{layer}.dense_ffn", layout, *records(layout, layer, 0))

    writer = StoreWriter(Path(store), schema, f"converted from {checkpoint.folder.name}", checkpoint.fingerprint())
    writer.dense_file(fill)
    layout = ExpertLayout(schema.hidden, schema.expert_width)
    for layer in schema.moe_layers:
        writer.layer(layer, layout, partial(records, layout, layer), step)
        done = max(done, len(sources) + schema.experts * (schema.moe_layers.index(layer) + 1))  # resumed files count too
    writer.finish(tokenizer, template)


def _merged(*values: Any) -> list[int]:
    """End-of-sequence ids from several places, in order, once each."""
    ids: list[int] = []
    for value in values:
        ids += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int) and one not in ids]
    return ids
