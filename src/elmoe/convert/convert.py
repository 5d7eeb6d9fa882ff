"""The conversion: every tensor is checked first, then written file by file, resuming where an earlier attempt stopped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import ExpertLayout
from elmoe.convert.source import NORM_NAMES, open_source
from elmoe.errors import ConvertError
from elmoe.models import family_of
from elmoe.schema.model import ModelSchema
from elmoe.store import StoreWriter
from elmoe.store.writer import DenseFile


def schema_of_config(config: dict[str, Any]) -> ModelSchema:
    """The schema of a Hugging Face config; ConvertError names an architecture or a value that is not supported."""
    return family_of(config).read_config(config)


def convert_checkpoint(
    source: str | Path,
    store: str | Path,
    progress: Callable[[int, int], None] | None = None,
    tokenizer: Path | None = None,
) -> None:
    """Convert a Hugging Face folder or a GGUF file to a store.

    :param progress: takes (tensors and experts done, all).
    :param tokenizer: a tokenizer.json in place of the one a GGUF file describes.
    :raises ConvertError: the checkpoint is incomplete or not supported, or the store cannot be written.
    :raises NumericsError: a weight is NaN or infinite; the message names the tensor.
    """
    model = open_source(Path(source), tokenizer)
    schema, tensors = model.schema, model.tensors
    tokenizer_json, template = model.tokenizer(), model.chat_template()
    model.check()
    total = len(tensors) + len(schema.moe_layers) * schema.experts
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    def records(layout: ExpertLayout, layer: int, expert: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        return layout.pack(model.expert(layer, expert))

    def fill(dense: DenseFile) -> None:
        for name, parts in tensors.items():
            if name.endswith(NORM_NAMES):
                values = np.ascontiguousarray(model.array(name))
                if not np.isfinite(values).all():
                    raise ConvertError(f"tensor '{parts[0][0]}' holds NaN or infinite values")
                dense.array(name, values)
            else:
                shapes = [part[1] for part in parts]
                dense.nested(name, (sum(shape[0] for shape in shapes), shapes[0][1]), partial(model.matrix, name))
            step()
        for layer in schema.dense_layers:
            layout = ExpertLayout(schema.hidden, schema.dense_width)
            dense.expert(f"layers.{layer}.dense_ffn", layout, *records(layout, layer, 0))

    writer = StoreWriter(Path(store), schema, f"converted from {model.name}", model.fingerprint())
    writer.dense_file(fill)
    layout = ExpertLayout(schema.hidden, schema.expert_width)
    for layer in schema.moe_layers:
        writer.layer(layer, layout, partial(records, layout, layer), step)
        done = max(done, len(tensors) + schema.experts * (schema.moe_layers.index(layer) + 1))  # resumed files count too
    writer.finish(tokenizer_json, template)
