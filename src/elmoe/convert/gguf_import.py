"""A GGUF file as the source of a conversion: Q8_0 tensors bit for bit, F32, F16 and BF16 ones quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import Keys
from numpy.typing import NDArray

from elmoe.bitslice import NestedMatrix
from elmoe.convert.effort import conversion_memory, conversion_seconds
from elmoe.convert.gguf_file import FLOAT_TYPES, GgufFile
from elmoe.convert.gguf_tokenizer import eos_tokens, rebuild, template_tokens
from elmoe.convert.head_rows import rows_of_neighbours
from elmoe.convert.requantise import Losses
from elmoe.convert.source import PIECE, refuse_leftovers
from elmoe.errors import ConvertError
from elmoe.models import FAMILIES
from elmoe.models.gguf import gguf_family, spec_of_metadata
from elmoe.models.spec import GroupedAttention, ModelSpec
from elmoe.models.support import check_supported
from elmoe.models.tensors import PROJECTIONS, FeedForward, Tensor, feed_forward, tensors

MOST_TOKENS = 1 << 24


@dataclass(frozen=True)
class _Part:
    """A tensor of the file. ``head_dim``: of a head whose rows lie as neighbours (see ``GgufFamily``), else 0."""

    name: str
    shape: tuple[int, ...]
    head_dim: int = 0


class GgufSource:
    """A GGUF file. See ``elmoe.convert.source.Source``."""

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        self._file = file = GgufFile(path)
        self.name, self._tokenizer = path.name, tokenizer
        shape = file.tensor("token_embd.weight").shape
        if len(shape) != 2 or shape[0] > MOST_TOKENS:
            raise ConvertError(f"tensor 'token_embd.weight' has shape {list(shape)}, not that of an embedding")
        eos = eos_tokens(file.metadata, shape[0])
        family, gguf = gguf_family(file.metadata, FAMILIES.values())
        self.spec = spec_of_metadata(file.metadata, family, shape[0], eos, file.__contains__)
        check_supported(self.spec)
        self._gguf = gguf
        self._heads = {role: _head_dim(self.spec) for role in gguf.neighbours}
        self._losses = Losses()
        self.left_out: tuple[str, ...] = ()

    def fingerprint(self) -> str:
        """See ``Source``."""
        return self._file.fingerprint()

    def check(self) -> None:
        """See ``Source``."""
        expected = set()
        for tensor in tensors(self.spec):
            for one in self._parts(tensor):
                self._file.check(one.name, one.shape, matrix=tensor.kind == "matrix")
                expected.add(one.name)
        for layer in range(len(self.spec.layers)):
            part = feed_forward(self.spec, layer)
            for projection in PROJECTIONS:
                one = self._stacked(part, projection)
                self._file.check(one.name, one.shape, matrix=True)
                expected.add(one.name)
        refuse_leftovers(sorted(self._file.names() - expected), self.spec.family)

    def floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """See ``store.writer.Weights``."""
        (part,) = self._parts(tensor)
        values = self._file.floats(part.name).reshape(part.shape)
        if not np.isfinite(values).all():
            raise ConvertError(f"tensor '{part.name}' holds NaN or infinite values", "download the file anew")
        return values

    def matrix(self, tensor: Tensor, first: int, last: int) -> NestedMatrix:
        """See ``store.writer.Weights``."""
        return self._rows(self._parts(tensor), first, last)

    def projections(self, part: FeedForward, expert: int) -> dict[str, NestedMatrix]:
        """See ``store.writer.Weights``."""
        matrices = {}
        for projection in PROJECTIONS:
            rows = part.shape(projection)[0]
            matrices[projection] = self._rows([self._stacked(part, projection)], expert * rows, (expert + 1) * rows)
        return matrices

    def _parts(self, tensor: Tensor) -> list[_Part]:
        """The file's tensors that make one of the store."""
        names = self._gguf.names
        return [
            _Part(names[part.role].format(layer=tensor.layer), part.shape, self._heads.get(part.role, 0))
            for part in tensor.parts
        ]

    def _stacked(self, part: FeedForward, projection: str) -> _Part:
        """A projection of all experts, or of the dense feed-forward."""
        one = part.part(projection)
        shape = (part.count, *one.shape) if part.kind == "expert" else one.shape
        return _Part(self._gguf.names[one.role].format(layer=part.layer), shape)

    def _rows(self, parts: list[_Part], first: int, last: int) -> NestedMatrix:
        """Rows [first, last) of tensors laid one below the other, each seen as a matrix."""
        codes, scales, before = [], [], 0
        columns = parts[0].shape[-1]
        for part in parts:
            count = int(np.prod(part.shape[:-1], dtype=np.int64))
            low, high = max(first - before, 0), min(last - before, count)
            before += count
            if low >= high:
                continue
            order = np.arange(low, high)
            if part.head_dim:  # whole heads are read, and their rows put in the order of the checkpoint
                low, high = low - low % part.head_dim, high + -high % part.head_dim
                order = rows_of_neighbours(order, part.head_dim)
            stored = self._file.codes(part.name, low, high) or self._quantised(part.name, low, high)
            codes.append(stored[0][order - low])
            scales.append(stored[1][order - low])
        return NestedMatrix.from_codes(np.concatenate(codes), np.concatenate(scales), columns)

    def _quantised(self, name: str, first: int, last: int) -> tuple[NDArray[np.int8], NDArray[np.float16]]:
        """Codes and scales of rows [first, last) of a tensor that is not Q8_0; what is lost is noted."""
        found = []
        step = max(16, PIECE // self._file.tensor(name).shape[-1])
        for start in range(first, last, step):
            values = self._file.floats(name, start, min(start + step, last))
            matrix = NestedMatrix.from_weights(values, name)
            codes, scales = matrix.codes[: len(values)], matrix.row_scales[: len(values)].astype(np.float16)
            self._losses.note(self._file.tensor(name).type.name, name, values, codes, scales)
            found.append((codes, scales))
        return np.concatenate([codes for codes, _ in found]), np.concatenate([scales for _, scales in found])

    def seconds(self) -> float:
        """See ``Source``."""
        counts = {"floats": 0, "exact": 0, "requantised": 0}
        for name in self._file.names():
            tensor = self._file.tensor(name)
            kind = "exact" if tensor.type == TensorType.Q8_0 else "floats" if tensor.type in FLOAT_TYPES else "requantised"
            counts[kind] += math.prod(tensor.shape) if len(tensor.shape) > 1 else 0
        return conversion_seconds(**counts)

    def memory(self) -> int:
        """See ``Source``."""
        return conversion_memory(self.spec)

    def notes(self) -> tuple[str, ...]:
        """See ``Source``."""
        return self._losses.lines()

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


def _head_dim(spec: ModelSpec) -> int:
    attention = spec.layers[0].attention
    assert isinstance(attention, GroupedAttention)  # the others are not supported
    return attention.head_dim
