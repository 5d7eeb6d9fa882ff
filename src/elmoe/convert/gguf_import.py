"""A GGUF file as the source of a conversion: bit for bit where a format holds a type exactly, else quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import Keys
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix
from elmoe.bitslice.formats import concatenated
from elmoe.bitslice.nested import BLOCK_ROWS
from elmoe.convert.effort import conversion_memory, conversion_seconds
from elmoe.convert.gguf_blocks import EXACT, FLOATS, dequantized, nearest_format, read_blocks
from elmoe.convert.gguf_file import GgufFile
from elmoe.convert.gguf_tokenizer import eos_tokens, rebuild, template_tokens
from elmoe.convert.head_rows import rows_of_neighbours
from elmoe.convert.latent_rows import KEYS, ROLES, FusedRows
from elmoe.convert.losses import FormatChoice, Losses
from elmoe.convert.source import PIECE, refuse_leftovers, told_apart
from elmoe.errors import ConvertError, NumericsError
from elmoe.kernels.packing import quantized
from elmoe.models import FAMILIES
from elmoe.models.formats import Format, joined_formats
from elmoe.models.gguf import further_layers, gguf_family, gguf_shape, spec_of_metadata
from elmoe.models.gguf_rope import FACTORS
from elmoe.models.spec import GroupedAttention, ModelSpec
from elmoe.models.support import check_supported
from elmoe.models.tensors import DEFAULT, PROJECTIONS, FeedForward, Tensor, feed_forwards, tensors
from elmoe.tokenizer import load_tokenizer

MOST_TOKENS = 1 << 24
MOST_VALUES = 1 << 12


@dataclass(frozen=True)
class _Part:
    """A tensor of the file. ``head_dim``: of a head whose rows lie as neighbours (see ``GgufFamily``), else 0. ``fused``:
    the role of a part of one that holds the whole projection from latents, see ``FusedRows``; ``shape`` is the whole's."""

    name: str
    shape: tuple[int, ...]
    head_dim: int = 0
    fused: str = ""


class GgufSource:
    """A GGUF file. See ``elmoe.convert.source.Source``."""

    def __init__(self, path: Path, tokenizer: Path | None = None, choice: FormatChoice | None = None) -> None:
        self._file = file = GgufFile(path)
        self.name, self._tokenizer = path.name, tokenizer
        shape = file.tensor("token_embd.weight").shape
        if len(shape) != 2 or shape[0] > MOST_TOKENS:
            raise ConvertError(f"tensor 'token_embd.weight' has shape {list(shape)}, not that of an embedding")
        eos = eos_tokens(file.metadata, shape[0])
        family, gguf = gguf_family(file.metadata, FAMILIES.values())
        self.spec = spec_of_metadata(file.metadata, family, shape[0], eos, file.__contains__, self._values)
        check_supported(self.spec)
        self._gguf = gguf
        self._heads = {role: _head_dim(self.spec) for role in gguf.neighbours}
        self.left_out: tuple[str, ...] = ()
        self.losses, self._choice = Losses(), choice or FormatChoice()

    def _values(self, name: str) -> list[float]:
        """The values of a small tensor of floats."""
        shape = self._file.tensor(name).shape
        self._file.check(name, (min(shape[0], MOST_VALUES),), matrix=False)
        values = self._file.floats(name).reshape(-1)
        if not np.isfinite(values).all() or (values <= 0).any():
            raise ConvertError(f"tensor '{name}' holds values that are not positive numbers", "download the file anew")
        return [float(value) for value in values]

    def fingerprint(self) -> str:
        """See ``Source``."""
        return told_apart(self._file.fingerprint(), self._choice)

    @property
    def formats(self) -> dict[str, str]:
        """See ``Source``."""
        found = {}
        for tensor in tensors(self.spec):
            if tensor.kind == "matrix":
                parts = self._parts(tensor)
                chosen = self._choice.matrices or (DEFAULT if parts[0].fused == KEYS else None)
                found[tensor.name] = self._joined([one.name for one in parts], chosen)
        for part in feed_forwards(self.spec):
            names = [self._stacked(part, projection).name for projection in PROJECTIONS]
            found[part.name] = self._joined(names, self._choice.experts if part.kind == "expert" else self._choice.matrices)
        return found

    def _joined(self, names: list[str], chosen: str | None) -> str:
        return chosen or joined_formats([nearest_format(self._file.tensor(name).type) for name in names])

    def check(self) -> None:
        """See ``Source``."""
        expected = set()
        for tensor in tensors(self.spec):
            for one in self._parts(tensor):
                self._file.check(one.name, one.shape, matrix=tensor.kind == "matrix")
                expected.add(one.name)
        for part in feed_forwards(self.spec):
            for projection in PROJECTIONS:
                one = self._stacked(part, projection)
                self._file.check(one.name, one.shape, matrix=True)
                expected.add(one.name)
        others = sorted(self._file.names() - expected - {FACTORS})  # from which the spec was read
        further = further_layers(self._file.metadata, self._gguf)
        self.left_out = tuple(name for name in others if name.startswith(further))
        refuse_leftovers([name for name in others if name not in self.left_out], self.spec.family)

    def floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """See ``store.writer.Weights``."""
        found = []
        for part in self._parts(tensor):
            values = self._file.floats(part.name).reshape(part.shape)
            if not np.isfinite(values).all():
                raise NumericsError(f"tensor '{part.name}' holds NaN or infinite values", "download the file anew")
            if part.head_dim:
                values = values[rows_of_neighbours(np.arange(len(values)), part.head_dim)]
            found.append(values)
        return np.concatenate(found)

    def matrix(self, tensor: Tensor, first: int, last: int, format: Format) -> QuantizedMatrix:
        """See ``store.writer.Weights``."""
        return self._rows(self._parts(tensor), first, last, format)

    def projections(self, part: FeedForward, expert: int, formats: tuple[Format, ...]) -> dict[str, QuantizedMatrix]:
        """See ``store.writer.Weights``."""
        matrices = {}
        for projection, format in zip(PROJECTIONS, formats, strict=True):
            rows = part.shape(projection)[0]
            stacked = [self._stacked(part, projection)]
            matrices[projection] = self._rows(stacked, expert * rows, (expert + 1) * rows, format)
        return matrices

    def _parts(self, tensor: Tensor) -> list[_Part]:
        """The file's tensors that make one of the store."""
        names = self._gguf.names
        found = []
        for part in tensor.parts:
            name = names[part.role].format(layer=tensor.layer)
            whole = names.get("fused_up", "").format(layer=tensor.layer)
            if part.role in ROLES and name not in self._file and whole in self._file:
                found.append(_Part(whole, FusedRows.of(self.spec).shape, fused=part.role))
            else:
                found.append(_Part(name, gguf_shape(part), self._heads.get(part.role, 0)))
        return found

    def _stacked(self, part: FeedForward, projection: str) -> _Part:
        """A projection of all experts, or of the dense feed-forward."""
        one = part.part(projection)
        shape = (part.count, *one.shape) if part.kind == "expert" else one.shape
        return _Part(self._gguf.names[one.role].format(layer=part.layer), shape)

    def _rows(self, parts: list[_Part], first: int, last: int, format: Format) -> QuantizedMatrix:
        """Rows [first, last) of tensors laid one below the other, each seen as a matrix."""
        found, before = [], 0
        for part in parts:
            count = last if part.fused else math.prod(part.shape[:-1])  # which is the only part of its matrix
            low, high = max(first - before, 0), min(last - before, count)
            before += count
            step = max(BLOCK_ROWS, PIECE // part.shape[-1] // BLOCK_ROWS * BLOCK_ROWS)
            found += [self._piece(part, start, min(start + step, high), format) for start in range(low, high, step)]
        return concatenated(found)

    def _piece(self, part: _Part, first: int, last: int, format: Format) -> QuantizedMatrix:
        """Rows [first, last) of one tensor."""
        kind, columns = self._file.tensor(part.name).type, part.shape[-1]
        if part.fused == KEYS:
            weights = FusedRows.of(self.spec).keys(
                lambda low, high: dequantized(kind, self._file.raw(part.name, low, high), columns), first, last
            )
            matrix = quantized(format, weights, part.name)
            self.losses.quantised(kind.name, format.name, part.name, weights, matrix)
            return matrix
        raw = self._raw(part, first, last)
        if EXACT.get(kind) == format.name:
            self.losses.exact(kind.name, format.name, part.name)
            return read_blocks(kind, raw, columns, part.name)
        weights = dequantized(kind, raw, columns)
        matrix = quantized(format, weights, part.name)
        self.losses.quantised(kind.name, format.name, part.name, weights, matrix)
        return matrix

    def _raw(self, part: _Part, first: int, last: int) -> NDArray[np.uint8]:
        """Rows as they are in the file, in the order of the checkpoint: of neighbours, whole heads are read."""
        if part.fused:
            spans = FusedRows.of(self.spec).value_spans(first, last)
            return np.concatenate([self._file.raw(part.name, low, high) for low, high in spans])
        if not part.head_dim:
            return self._file.raw(part.name, first, last)
        low = first - first % part.head_dim
        raw = self._file.raw(part.name, low, last + -last % part.head_dim)
        return raw[rows_of_neighbours(np.arange(first, last), part.head_dim) - low]

    def seconds(self) -> float:
        """See ``Source``."""
        counts = {"floats": 0, "exact": 0, "requantised": 0}
        for name in self._file.names():
            tensor = self._file.tensor(name)
            kind = "exact" if tensor.type in EXACT else "floats" if tensor.type in FLOATS else "requantised"
            counts[kind] += math.prod(tensor.shape) if len(tensor.shape) > 1 else 0
        return conversion_seconds(**counts)

    def memory(self) -> int:
        """See ``Source``."""
        return conversion_memory(self.spec, self.formats)

    def tokenizer(self) -> bytes:
        """See ``Source``."""
        if self._tokenizer is not None:
            try:
                raw = self._tokenizer.read_bytes()
            except OSError as error:
                raise ConvertError(f"'{self._tokenizer}' cannot be read: {error.strerror}") from error
            load_tokenizer(raw, str(self._tokenizer), ConvertError)  # an error names the file that was given
            return raw
        return rebuild(self._file.metadata)

    def chat_template(self) -> str | None:
        """See ``Source``."""
        template = self._file.metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
        return template if isinstance(template, str) else None

    def special_tokens(self) -> dict[str, str]:
        """See ``Source``."""
        return template_tokens(self._file.metadata)


def _head_dim(spec: ModelSpec) -> int:
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedAttention)  # the others are not supported
    return attention.head_dim
