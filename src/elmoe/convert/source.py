"""What a conversion reads from: a checkpoint folder or a GGUF file behind one interface, in terms of the spec's tensors."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix
from elmoe.bitslice.formats import concatenated
from elmoe.bitslice.nested import BLOCK_ROWS
from elmoe.convert.checkpoint import Checkpoint
from elmoe.convert.effort import conversion_memory, conversion_seconds, weights_of
from elmoe.convert.file_reading import read_json
from elmoe.convert.fused_experts import BLOCKS, MXFP4, SCALES, FusedExperts
from elmoe.convert.identity import is_source
from elmoe.convert.latent_rows import KEYS, ROLES, FusedRows
from elmoe.convert.losses import FormatChoice, Losses
from elmoe.convert.stacked import Stacked, stacked_names, stacked_shapes
from elmoe.errors import ConvertError, ModelError, NumericsError
from elmoe.kernels.packing import quantized
from elmoe.models import family_of, spec_of_config
from elmoe.models.config import Config
from elmoe.models.family import Names
from elmoe.models.formats import Format
from elmoe.models.spec import ModelSpec
from elmoe.models.support import check_supported
from elmoe.models.tensors import DEFAULT, PROJECTIONS, FeedForward, Part, Tensor, feed_forwards, tensors
from elmoe.store.writer import Weights

ALTERNATING = {"expert_gate_bias": 0, "expert_up_bias": 1}
"""First columns of biases that are one tensor, where a family's rows of gates and ups alternate."""
PIECE = 4 << 20
"""Weights that are quantised at a time."""
HARMLESS = ("rotary_emb.inv_freq", "masked_bias")
"""Ends of the names of tensors that hold constants, which a spec implies."""
TIED_ROWS = 8192
"""Rows of a head that are compared with the embedding table at a time."""


class Source(Weights, Protocol):
    """A model to convert. ``name`` is its folder or file; ``left_out`` names tensors that are not converted and do not
    matter; ``losses`` tells, after the conversion, what became of the others."""

    name: str
    spec: ModelSpec
    left_out: tuple[str, ...]
    losses: Losses

    @property
    def formats(self) -> dict[str, str]:
        """Formats of the store's matrices and feed-forwards, by store name."""

    def fingerprint(self) -> str:
        """What tells one source, and formats asked for, from another."""

    def check(self) -> None:
        """ConvertError unless all tensors are there, with their shapes and supported types, and no others."""

    def seconds(self) -> float:
        """About how long a conversion takes."""

    def memory(self) -> int:
        """About how many bytes of memory it takes."""

    def tokenizer(self) -> bytes:
        """The tokenizer.json."""

    def chat_template(self) -> str | None:
        """The chat template, if there is one."""

    def special_tokens(self) -> dict[str, str]:
        """Texts of special tokens by the variables that chat templates know them by, such as ``bos_token``."""


class CheckpointSource:
    """A Hugging Face folder; its matrices are quantised. See :class:`Source`."""

    def __init__(self, folder: Path, choice: FormatChoice | None = None) -> None:
        self.losses, self._choice = Losses(), choice or FormatChoice()
        self._checkpoint = checkpoint = Checkpoint(folder)
        config = checkpoint.config | _generation_ends(checkpoint)
        self.name = folder.name
        self.spec = spec_of_config(config)
        family = family_of(config)
        names = family.names
        check_supported(self.spec)
        if names is None:
            raise ConvertError(f"checkpoints of the family {self.spec.family} cannot be converted yet")
        self._names: Names = names
        self._tensors = checkpoint.names()
        self._fused = FusedExperts(checkpoint, family.alternating, self.losses) if family.alternating else None
        self.left_out: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """See :class:`Source`."""
        return told_apart(self._checkpoint.fingerprint(), self._choice)

    @property
    def formats(self) -> dict[str, str]:
        """See :class:`Source`: all matrices are quantised alike, but for experts that are MXFP4."""
        usual = MXFP4 if self._fused and self._fused.packed else DEFAULT
        matrices, experts = self._choice.matrices or DEFAULT, self._choice.experts or usual
        found = {tensor.name: matrices for tensor in tensors(self.spec) if tensor.kind == "matrix"}
        parts = feed_forwards(self.spec)
        return found | {part.name: experts if part.kind == "expert" else matrices for part in parts}

    def check(self) -> None:
        """See :class:`Source`."""
        spec, expected = self.spec, set()
        for tensor in tensors(spec):
            for part, name in zip(tensor.parts, self._parts(tensor), strict=True):
                self._checkpoint.check(name, self._shape(part))
                expected.add(name)
        for feed_forward in feed_forwards(spec):
            if self._is_fused(feed_forward) and self._fused:
                expected |= self._fused.check(feed_forward)
                continue
            shapes = self._feed_forward_shapes(feed_forward)
            for name, shape in shapes.items():
                self._checkpoint.check(name, shape)
            expected |= shapes.keys()
        expected |= self._checkpoint.scale_names({name for name in expected if not name.endswith((BLOCKS, SCALES))})
        tied = {self._names["head"]} if spec.tied_embeddings else set()
        for name in tied & self._checkpoint.names():
            self._check_tied(name)
        others = sorted(self._checkpoint.names() - expected)
        further = self._further_layers()
        self.left_out = tuple(name for name in others if name.endswith(HARMLESS) or name in tied or name.startswith(further))
        refuse_leftovers([name for name in others if name not in self.left_out], spec.family)

    def _check_tied(self, head: str) -> None:
        """ConvertError unless a head beside tied embeddings equals them; transformers would take the head."""
        table, (rows, columns) = self._names["embedding"], (self.spec.vocabulary, self.spec.hidden)
        self._checkpoint.check(head, (rows, columns))
        for first in range(0, rows, TIED_ROWS):
            last = min(first + TIED_ROWS, rows)
            one, other = (self._checkpoint.rows([name], first, last) for name in (head, table))
            if not np.array_equal(one, other, equal_nan=True):
                raise ConvertError(
                    f"'{head}' differs from '{table}', and config.json says 'tie_word_embeddings'",
                    "set it to false if the head is the model's own, as transformers takes it, or remove the head",
                )

    def _further_layers(self) -> tuple[str, ...]:
        """What names of tensors begin with that predict further tokens: layers behind those of the model."""
        gguf = family_of(self._checkpoint.config).gguf
        if gguf is None or gguf.further is None:  # a family without such layers
            return ()
        config, layers = Config(self._checkpoint.config), len(self.spec.layers)
        count = config.integer("num_nextn_predict_layers", default=0, least=0, most=16)
        return tuple(f"model.layers.{layer}." for layer in range(layers, layers + count))

    def floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """See ``store.writer.Weights``."""
        values = self._checkpoint.rows(self._parts(tensor))
        role = tensor.parts[0].role
        if self._fused and role in ALTERNATING:
            values = values[:, ALTERNATING[role] :: 2]
        if not np.isfinite(values).all():
            raise NumericsError(
                f"tensor '{', '.join(self._parts(tensor))}' holds NaN or infinite values", "download it anew"
            )
        return values

    def matrix(self, tensor: Tensor, first: int, last: int, format: Format) -> QuantizedMatrix:
        """See ``store.writer.Weights``; NumericsError names the checkpoint's tensor."""
        names = self._parts(tensor)
        return self._quantised(self._matrix_rows(tensor, names, first, last), names, format)

    def _matrix_rows(self, tensor: Tensor, names: list[str], first: int, last: int) -> NDArray[np.float32]:
        """Rows of a matrix, which may be a part of the checkpoint's tensor."""
        if tensor.parts[0].role not in ROLES:
            return self._checkpoint.rows(names, first, last)
        rows = FusedRows.of(self.spec)

        def read(low: int, high: int) -> NDArray[np.float32]:
            return self._checkpoint.rows(names, low, high)

        if tensor.parts[0].role == KEYS:
            return rows.keys(read, first, last)
        return np.concatenate([read(low, high) for low, high in rows.value_spans(first, last)])

    def _quantised(self, weights: NDArray[np.float32], names: list[str], format: Format) -> QuantizedMatrix:
        label = ", ".join(names)
        matrix = quantized(format, weights, label)
        self.losses.quantised(self._checkpoint.dtype(names[0]), format.name, label, weights, matrix)
        return matrix

    def projections(self, part: FeedForward, expert: int, formats: tuple[Format, ...]) -> dict[str, QuantizedMatrix]:
        """See ``store.writer.Weights``; NumericsError names the checkpoint's tensor."""
        if self._is_fused(part) and self._fused:
            return self._fused.projections(part, expert, formats)
        stacked = self._stacked(part)
        if stacked is not None:
            gate_up, down = (self._of_expert(name, part, expert) for name in stacked)
            found = {"gate": gate_up[: part.width], "up": gate_up[part.width :], "down": down}
            names = {"gate": stacked.gate_up, "up": stacked.gate_up, "down": stacked.down}
        else:
            names = {projection: self._name(part.part(projection), part.layer, expert) for projection in PROJECTIONS}
            return {
                projection: self._whole(names[projection], *part.shape(projection), format)
                for projection, format in zip(PROJECTIONS, formats, strict=True)
            }
        return {
            projection: self._quantised(found[projection], [names[projection]], format)
            for projection, format in zip(PROJECTIONS, formats, strict=True)
        }

    def _of_expert(self, name: str, part: FeedForward, expert: int) -> NDArray[np.float32]:
        """One expert's matrix of a tensor that holds all of a layer, or the whole tensor of a feed-forward that is one."""
        return (
            self._checkpoint.rows([name], expert, expert + 1)[0] if part.kind == "expert" else self._checkpoint.rows([name])
        )

    def _whole(self, name: str, rows: int, columns: int, format: Format) -> QuantizedMatrix:
        """A tensor quantised piece by piece: the floats of a large one take much memory."""
        step = max(BLOCK_ROWS, PIECE // columns // BLOCK_ROWS * BLOCK_ROWS)
        return concatenated(
            [
                self._quantised(self._checkpoint.rows([name], first, min(first + step, rows)), [name], format)
                for first in range(0, rows, step)
            ]
        )

    def _feed_forward_shapes(self, part: FeedForward) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the checkpoint's tensors that make a feed-forward."""
        stacked = self._stacked(part)
        if stacked is not None:
            return dict(zip(stacked, stacked_shapes(part), strict=True))
        return {
            self._name(one, part.layer, expert): one.shape
            for expert in range(part.count)
            for one in map(part.part, PROJECTIONS)
        }

    def _stacked(self, part: FeedForward) -> Stacked | None:
        return stacked_names(self._names, part, self._tensors)

    def _is_fused(self, part: FeedForward) -> bool:
        return self._fused is not None and part.kind == "expert"

    def _shape(self, part: Part) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor of a part: biases of gates and ups may be one, parts from latents are."""
        if part.role in ROLES:
            return FusedRows.of(self.spec).shape
        if self._fused and part.role in ALTERNATING:
            return part.shape[0], 2 * part.shape[1]
        return part.shape

    def _parts(self, tensor: Tensor) -> list[str]:
        """Names of the checkpoint's tensors that make one of the store."""
        return [self._name(part, tensor.layer) for part in tensor.parts]

    def _name(self, part: Part, layer: int | None, expert: int = 0) -> str:
        return self._names[part.role].format(layer=layer, expert=expert)

    def seconds(self) -> float:
        """See :class:`Source`."""
        return conversion_seconds(weights_of(self.spec))

    def memory(self) -> int:
        """See :class:`Source`."""
        return conversion_memory(self.spec, self.formats)

    def tokenizer(self) -> bytes:
        """See :class:`Source`."""
        return self._checkpoint.tokenizer()

    def chat_template(self) -> str | None:
        """See :class:`Source`."""
        return self._checkpoint.chat_template()

    def special_tokens(self) -> dict[str, str]:
        """See :class:`Source`."""
        return self._checkpoint.special_tokens()


def open_source(path: Path, tokenizer: Path | None = None, choice: FormatChoice | None = None) -> Source:
    """A GGUF file (``.gguf``), or a Hugging Face folder. ``tokenizer`` is a tokenizer.json to take for a GGUF file's own;
    ``choice`` of formats: None takes what is exact, or nearest.

    :raises ConvertError: it is neither, or damaged, or not supported.
    """
    try:
        if not os.path.isdir(path) and (path.suffix.lower() == ".gguf" or is_source(path)):
            from elmoe.convert.gguf_import import GgufSource

            return GgufSource(path, tokenizer, choice)
        if tokenizer is not None:
            raise ConvertError("--tokenizer is for GGUF files", "a Hugging Face folder has its tokenizer.json inside")
        return CheckpointSource(path, choice)
    except ModelError as error:
        raise ConvertError(str(error), error.hint) from error


def told_apart(fingerprint: str, choice: FormatChoice) -> str:
    """A source's fingerprint, with the formats that were asked for."""
    return fingerprint if choice == FormatChoice() else f"{fingerprint} {choice}"


def refuse_leftovers(names: list[str], family: str) -> None:
    """ConvertError that lists tensors which the model's family does not have: they would change what it computes."""
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        listed = ", ".join(f"'{name}'" for name in names[:5])
        raise ConvertError(
            f"the checkpoint has tensors that a {family} model does not have: {listed}{more}",
            "it is of another architecture, or has parts that are not supported",
        )


def _generation_ends(checkpoint: Checkpoint) -> dict[str, Any]:
    """The end-of-sequence ids of generation_config.json, which count in place of those of config.json, as transformers has
    it, those of both first; empty where it names none."""
    path = checkpoint.folder / "generation_config.json"
    found = Config(read_json(path), path.name) if os.path.isfile(path) else None
    if found is None or not found.has("eos_token_id"):
        return {}
    config = Config(checkpoint.config)
    vocabulary = config.integer("vocab_size")
    first = config.tokens("eos_token_id", vocabulary)
    return {"eos_token_id": sorted(found.tokens("eos_token_id", vocabulary), key=lambda token: token not in first)}
