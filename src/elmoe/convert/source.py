"""What a conversion reads from: a checkpoint folder or a GGUF file behind one interface, in terms of the spec's tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import NestedMatrix
from elmoe.convert.checkpoint import Checkpoint
from elmoe.convert.file_reading import read_json
from elmoe.errors import ConvertError, ModelError
from elmoe.models import family_of, spec_of_config
from elmoe.models.family import Names
from elmoe.models.spec import ModelSpec
from elmoe.models.support import check_supported
from elmoe.models.tensors import PROJECTIONS, FeedForward, Part, Tensor, feed_forward, tensors
from elmoe.store.writer import Weights

HARMLESS = ("rotary_emb.inv_freq", "masked_bias")
"""Ends of the names of tensors that hold constants, which a spec implies."""


class Source(Weights, Protocol):
    """A model to convert. ``name`` is its folder or file; ``left_out`` names tensors that are not converted and do not
    matter."""

    name: str
    spec: ModelSpec
    left_out: tuple[str, ...]

    def fingerprint(self) -> str:
        """What tells one source from another."""

    def check(self) -> None:
        """ConvertError unless all tensors are there, with their shapes and supported types, and no others."""

    def tokenizer(self) -> bytes:
        """The tokenizer.json."""

    def chat_template(self) -> str | None:
        """The chat template, if there is one."""

    def special_tokens(self) -> dict[str, str]:
        """Texts of special tokens by the variables that chat templates know them by, such as ``bos_token``."""


class CheckpointSource:
    """A Hugging Face folder; its matrices are quantised. See :class:`Source`."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint = checkpoint = Checkpoint(folder)
        config = dict(checkpoint.config)
        if (checkpoint.folder / "generation_config.json").is_file():
            eos = read_json(checkpoint.folder / "generation_config.json").get("eos_token_id")
            config["eos_token_id"] = _merged(config.get("eos_token_id"), eos)
        if config.get("quantization_config") is not None:
            raise ConvertError("config.json: 'quantization_config' is not supported", "give the checkpoint in BF16 or FP16")
        self.name = folder.name
        self.spec = spec_of_config(config)
        names = family_of(config).names
        check_supported(self.spec)
        if names is None:
            raise ConvertError(f"checkpoints of the family {self.spec.family} cannot be converted yet")
        self._names: Names = names
        self.left_out: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return self._checkpoint.fingerprint()

    def check(self) -> None:
        """See :class:`Source`."""
        spec, expected = self.spec, set()
        for tensor in tensors(spec):
            for part, name in zip(tensor.parts, self._parts(tensor), strict=True):
                self._checkpoint.check(name, part.shape)
                expected.add(name)
        for layer in range(len(spec.layers)):
            one = feed_forward(spec, layer)
            for expert in range(one.count):
                for projection in PROJECTIONS:
                    part = one.part(projection)
                    self._checkpoint.check(self._name(part, layer, expert), part.shape)
                    expected.add(self._name(part, layer, expert))
        tied = {self._names["head"]} if spec.tied_embeddings else set()
        others = sorted(self._checkpoint.names() - expected)
        self.left_out = tuple(name for name in others if name.endswith(HARMLESS) or name in tied)
        refuse_leftovers([name for name in others if name not in self.left_out], spec.family)

    def floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """See ``store.writer.Weights``."""
        values = self._checkpoint.rows(self._parts(tensor))
        if not np.isfinite(values).all():
            raise ConvertError(f"tensor '{self._parts(tensor)[0]}' holds NaN or infinite values", "download it anew")
        return values

    def matrix(self, tensor: Tensor, first: int, last: int) -> NestedMatrix:
        """See ``store.writer.Weights``; NumericsError names the checkpoint's tensor."""
        names = self._parts(tensor)
        return NestedMatrix.from_weights(self._checkpoint.rows(names, first, last), ", ".join(names))

    def projections(self, part: FeedForward, expert: int) -> dict[str, NestedMatrix]:
        """See ``store.writer.Weights``; NumericsError names the checkpoint's tensor."""
        names = {projection: self._name(part.part(projection), part.layer, expert) for projection in PROJECTIONS}
        return {
            projection: NestedMatrix.from_weights(self._checkpoint.rows([name]), name) for projection, name in names.items()
        }

    def _parts(self, tensor: Tensor) -> list[str]:
        """Names of the checkpoint's tensors that make one of the store."""
        return [self._name(part, tensor.layer) for part in tensor.parts]

    def _name(self, part: Part, layer: int | None, expert: int = 0) -> str:
        return self._names[part.role].format(layer=layer, expert=expert)

    def tokenizer(self) -> bytes:
        """See :class:`Source`."""
        return self._checkpoint.tokenizer()

    def chat_template(self) -> str | None:
        """See :class:`Source`."""
        return self._checkpoint.chat_template()

    def special_tokens(self) -> dict[str, str]:
        """See :class:`Source`."""
        return self._checkpoint.special_tokens()


def open_source(path: Path, tokenizer: Path | None = None) -> Source:
    """A GGUF file (``.gguf``), or a Hugging Face folder. ``tokenizer`` is a tokenizer.json to take for a GGUF file's own.

    :raises ConvertError: it is neither, or damaged, or not supported.
    """
    try:
        if path.suffix.lower() == ".gguf" and not path.is_dir():
            from elmoe.convert.gguf_import import GgufSource

            return GgufSource(path, tokenizer)
        if tokenizer is not None:
            raise ConvertError("--tokenizer is for GGUF files", "a Hugging Face folder has its tokenizer.json inside")
        return CheckpointSource(path)
    except ModelError as error:
        raise ConvertError(str(error), error.hint) from error


def refuse_leftovers(names: list[str], family: str) -> None:
    """ConvertError that lists tensors which the model's family does not have: they would change what it computes."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        listed = ", ".join(f"'{name}'" for name in names[:5])
        raise ConvertError(
            f"the checkpoint has tensors that a {family} model does not have: {listed}{more}",
            "it is of another architecture, or has parts that are not supported",
        )


def _merged(*values: Any) -> list[Any]:
    """End-of-sequence ids from several places, in order, once each."""
    ids: list[Any] = []
    for value in values:
        ids += [one for one in (value if isinstance(value, list) else [value]) if one is not None and one not in ids]
    return ids
