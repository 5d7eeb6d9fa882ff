"""A GGUF file as the source of a conversion: bit for bit where a format holds a type exactly, else quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import Keys
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix, quantized
from elmoe.bitslice.formats import concatenated
from elmoe.convert.gguf_blocks import EXACT, dequantized, nearest_format, read_blocks
from elmoe.convert.gguf_file import GgufFile
from elmoe.convert.gguf_tokenizer import eos_tokens, rebuild, template_tokens
from elmoe.convert.losses import FormatChoice, Losses
from elmoe.convert.source import refuse_leftovers
from elmoe.errors import ConvertError
from elmoe.models import FAMILIES
from elmoe.models.formats import Format, joined_formats
from elmoe.models.gguf import gguf_family, spec_of_metadata
from elmoe.models.support import check_supported
from elmoe.models.tensors import PROJECTIONS, FeedForward, Tensor, feed_forward, tensors

MOST_TOKENS = 1 << 24


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
        self.spec = spec_of_metadata(file.metadata, family, shape[0], eos, file.__contains__)
        check_supported(self.spec)
        self._names = gguf.names
        self.left_out: tuple[str, ...] = ()
        self.losses, self._choice = Losses(), choice or FormatChoice()

    def fingerprint(self) -> str:
        """See ``Source``."""
        return self._file.fingerprint()

    @property
    def formats(self) -> dict[str, str]:
        """See ``Source``."""
        found = {}
        for tensor in tensors(self.spec):
            if tensor.kind == "matrix":
                names = [name for name, _ in self._parts(tensor)]
                found[tensor.name] = self._joined(names, self._choice.matrices)
        for layer in range(len(self.spec.layers)):
            part = feed_forward(self.spec, layer)
            names = [self._stacked(part, projection)[0] for projection in PROJECTIONS]
            found[part.name] = self._joined(names, self._choice.experts if part.kind == "expert" else self._choice.matrices)
        return found

    def _joined(self, names: list[str], chosen: str | None) -> str:
        return chosen or joined_formats([nearest_format(self._file.tensor(name).type) for name in names])

    def check(self) -> None:
        """See ``Source``."""
        expected = set()
        for tensor in tensors(self.spec):
            for name, shape in self._parts(tensor):
                self._file.check(name, shape, matrix=tensor.kind == "matrix")
                expected.add(name)
        for layer in range(len(self.spec.layers)):
            part = feed_forward(self.spec, layer)
            for projection in PROJECTIONS:
                name, shape = self._stacked(part, projection)
                self._file.check(name, shape, matrix=True)
                expected.add(name)
        refuse_leftovers(sorted(self._file.names() - expected), self.spec.family)

    def floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """See ``store.writer.Weights``."""
        ((theirs, shape),) = self._parts(tensor)
        values = self._file.floats(theirs).reshape(shape)
        if not np.isfinite(values).all():
            raise ConvertError(f"tensor '{theirs}' holds NaN or infinite values", "download the file anew")
        return values

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

    def _parts(self, tensor: Tensor) -> list[tuple[str, tuple[int, ...]]]:
        """(name, shape) of the file's tensors that make one of the store."""
        return [(self._names[part.role].format(layer=tensor.layer), part.shape) for part in tensor.parts]

    def _stacked(self, part: FeedForward, projection: str) -> tuple[str, tuple[int, ...]]:
        """(name, shape) of a projection of all experts, or of the dense feed-forward."""
        one = part.part(projection)
        shape = (part.count, *one.shape) if part.kind == "expert" else one.shape
        return self._names[one.role].format(layer=part.layer), shape

    def _rows(self, parts: list[tuple[str, tuple[int, ...]]], first: int, last: int, format: Format) -> QuantizedMatrix:
        """Rows [first, last) of tensors laid one below the other, each seen as a matrix."""
        found, before = [], 0
        for name, shape in parts:
            count = int(np.prod(shape[:-1], dtype=np.int64))
            low, high = max(first - before, 0), min(last - before, count)
            before += count
            if low < high:
                found.append(self._tensor_rows(name, shape[-1], low, high, format))
        return concatenated(found)

    def _tensor_rows(self, name: str, columns: int, first: int, last: int, format: Format) -> QuantizedMatrix:
        kind, raw = self._file.tensor(name).type, self._file.raw(name, first, last)
        if EXACT.get(kind) == format.name:
            self.losses.exact(kind.name, format.name, name)
            return read_blocks(kind, raw, columns, name)
        weights = dequantized(kind, raw, columns)
        matrix = quantized(format, weights, name)
        self.losses.quantised(kind.name, format.name, name, weights, matrix)
        return matrix

    def tokenizer(self) -> bytes:
        """See ``Source``."""
        if self._tokenizer is not None:
            try:
                return self._tokenizer.read_bytes()
            except OSError as error:
                raise ConvertError(f"'{self._tokenizer}' cannot be read: {error.strerror}") from error
        return rebuild(self._file.metadata)

    def chat_template(self) -> str | None:
        """See ``Source``."""
        template = self._file.metadata.get(Keys.Tokenizer.CHAT_TEMPLATE)
        return template if isinstance(template, str) else None

    def special_tokens(self) -> dict[str, str]:
        """See ``Source``."""
        return template_tokens(self._file.metadata)
