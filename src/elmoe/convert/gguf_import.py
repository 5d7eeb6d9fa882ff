"""A GGUF file as the source of a conversion: Q8_0 tensors bit for bit, F32, F16 and BF16 ones quantised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import Keys
from numpy.typing import NDArray

from elmoe.bitslice import NestedMatrix
from elmoe.convert.gguf_file import GgufFile
from elmoe.convert.gguf_tokenizer import eos_tokens, rebuild
from elmoe.convert.source import NORM_NAMES
from elmoe.errors import ConvertError
from elmoe.models import qwen3_moe_gguf
from elmoe.models.qwen3_moe import Source as TensorSource

MOST_TOKENS = 1 << 24


class GgufSource:
    """A GGUF file. See ``elmoe.convert.source.Source``."""

    def __init__(self, path: Path, tokenizer: Path | None = None) -> None:
        self._file = file = GgufFile(path)
        self.name, self._tokenizer = path.name, tokenizer
        shape = file.tensor("token_embd.weight").shape
        if len(shape) != 2 or shape[0] > MOST_TOKENS:
            raise ConvertError(f"tensor 'token_embd.weight' has shape {list(shape)}, not that of an embedding")
        eos = eos_tokens(file.metadata, shape[0])
        self.schema = qwen3_moe_gguf.read_metadata(file.metadata, shape[0], eos, file.__contains__)
        self.tensors = qwen3_moe_gguf.tensor_sources(self.schema)

    def fingerprint(self) -> str:
        """See ``Source``."""
        return self._file.fingerprint()

    def check(self) -> None:
        """See ``Source``."""
        for ours, parts in self.tensors.items():
            for name, shape in parts:
                self._file.check(name, shape, matrix=not ours.endswith(NORM_NAMES))
        for layer in range(self.schema.layers):
            for name, shape in qwen3_moe_gguf.ffn_sources(self.schema, layer).values():
                self._file.check(name, shape, matrix=True)

    def array(self, name: str) -> NDArray[np.float32]:
        """See ``Source``."""
        ((theirs, shape),) = self.tensors[name]
        return self._file.floats(theirs).reshape(shape)

    def matrix(self, name: str, first: int, last: int) -> NestedMatrix:
        """See ``Source``."""
        return self._rows(self.tensors[name], first, last)

    def expert(self, layer: int, expert: int) -> dict[str, NestedMatrix]:
        """See ``Source``."""
        matrices = {}
        for projection, (name, shape) in qwen3_moe_gguf.ffn_sources(self.schema, layer).items():
            rows = shape[-2]
            matrices[projection] = self._rows([(name, shape)], expert * rows, (expert + 1) * rows)
        return matrices

    def _rows(self, parts: list[TensorSource], first: int, last: int) -> NestedMatrix:
        """Rows [first, last) of tensors laid one below the other, each seen as a matrix."""
        codes, scales, before = [], [], 0
        columns = parts[0][1][-1]
        for name, shape in parts:
            count = int(np.prod(shape[:-1], dtype=np.int64))
            low, high = max(first - before, 0), min(last - before, count)
            before += count
            if low >= high:
                continue
            stored = self._file.codes(name, low, high)
            if stored is None:
                matrix = NestedMatrix.from_weights(self._file.floats(name, low, high), name)
                stored = matrix.codes[: high - low], matrix.row_scales[: high - low].astype(np.float16)
            codes.append(stored[0])
            scales.append(stored[1])
        return NestedMatrix.from_codes(np.concatenate(codes), np.concatenate(scales), columns)

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
