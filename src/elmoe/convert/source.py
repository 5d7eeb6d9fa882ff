"""What a conversion reads from: a checkpoint folder or a GGUF file behind one interface, in the store's own terms."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import NestedMatrix
from elmoe.bitslice.expert import PROJECTIONS
from elmoe.convert.checkpoint import Checkpoint, read_json
from elmoe.errors import ConvertError
from elmoe.models import family_of
from elmoe.models.qwen3_moe import Source as TensorSource
from elmoe.schema.model import ModelSchema

NORM_NAMES = ("norm", "router")
"""Tensors whose names end so stay float32."""


class Source(Protocol):
    """A model to convert. ``name`` is its folder or file, ``tensors`` says which of its tensors make a store's tensor, all
    but FFNs."""

    name: str
    schema: ModelSchema
    tensors: dict[str, list[TensorSource]]

    def fingerprint(self) -> str:
        """What tells one source from another."""

    def check(self) -> None:
        """ConvertError unless all tensors are there, with their shapes and supported types."""

    def array(self, name: str) -> NDArray[np.float32]:
        """A norm or a router, by the store's name."""

    def matrix(self, name: str, first: int, last: int) -> NestedMatrix:
        """Rows [first, last) of a matrix, by the store's name; NumericsError names the source's tensor."""

    def expert(self, layer: int, expert: int) -> dict[str, NestedMatrix]:
        """The projections of an expert, or of a layer's dense FFN."""

    def tokenizer(self) -> bytes:
        """The tokenizer.json."""

    def chat_template(self) -> str | None:
        """The chat template, if there is one."""


class CheckpointSource:
    """A Hugging Face folder; its matrices are quantised. See :class:`Source`."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = checkpoint = Checkpoint(folder)
        self._family: ModuleType = family_of(checkpoint.config)
        config = dict(checkpoint.config)
        if (checkpoint.folder / "generation_config.json").is_file():
            eos = read_json(checkpoint.folder / "generation_config.json").get("eos_token_id")
            config["eos_token_id"] = _merged(config.get("eos_token_id"), eos)
        self.name = folder.name
        self.schema: ModelSchema = self._family.read_config(config)
        self.tensors: dict[str, list[TensorSource]] = self._family.tensor_sources(self.schema)

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return self._checkpoint.fingerprint()

    def check(self) -> None:
        """See :class:`Source`."""
        for parts in self.tensors.values():
            for name, shape in parts:
                self._checkpoint.check(name, shape)
        schema = self.schema
        for layer in range(schema.layers):
            for expert in range(schema.experts if layer in schema.moe_layers else 1):
                for name, shape in self._family.ffn_sources(schema, layer, expert).values():
                    self._checkpoint.check(name, shape)

    def array(self, name: str) -> NDArray[np.float32]:
        """See :class:`Source`."""
        return self._checkpoint.rows([part[0] for part in self.tensors[name]])

    def matrix(self, name: str, first: int, last: int) -> NestedMatrix:
        """See :class:`Source`."""
        names = [part[0] for part in self.tensors[name]]
        return NestedMatrix.from_weights(self._checkpoint.rows(names, first, last), ", ".join(names))

    def expert(self, layer: int, expert: int) -> dict[str, NestedMatrix]:
        """See :class:`Source`."""
        names = self._family.ffn_sources(self.schema, layer, expert)
        return {
            projection: NestedMatrix.from_weights(self._checkpoint.rows([names[projection][0]]), names[projection][0])
            for projection in PROJECTIONS
        }

    def tokenizer(self) -> bytes:
        """See :class:`Source`."""
        return self._checkpoint.tokenizer()

    def chat_template(self) -> str | None:
        """See :class:`Source`."""
        return self._checkpoint.chat_template()


def open_source(path: Path, tokenizer: Path | None = None) -> Source:
    """A GGUF file (``.gguf``), or a Hugging Face folder. ``tokenizer`` is a tokenizer.json to take for a GGUF file's own.

    :raises ConvertError: it is neither, or damaged, or not supported.
    """
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        from elmoe.convert.gguf_import import GgufSource

        return GgufSource(path, tokenizer)
    if tokenizer is not None:
        raise ConvertError("--tokenizer is for GGUF files", "a Hugging Face folder has its tokenizer.json inside")
    return CheckpointSource(path)


def _merged(*values: Any) -> list[int]:
    """End-of-sequence ids from several places, in order, once each."""
    ids: list[int] = []
    for value in values:
        ids += [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int) and one not in ids]
    return ids
