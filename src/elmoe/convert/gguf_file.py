"""GGUF files, one or split, each count and offset checked before it is used.

Types, sizes and names are those of the ``gguf`` package, its reader is not: it believes counts (an array of 2^40 entries is
walked through, file or no file) and makes several arrays for every token of the vocabulary.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import GGUFValueType as ValueType
from numpy.typing import NDArray

from elmoe.convert.file_reading import SourceFile
from elmoe.convert.gguf_blocks import FLOATS, SUPPORTED, dequantized
from elmoe.convert.identity import part_paths
from elmoe.errors import ConvertError

VERSIONS = (2, 3)
SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
"""Metadata of a part: its number from 0, how many parts there are, and the tensors of all of them."""
CHUNK = 1 << 20
"""Bytes of a header read at a time."""
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4
DAMAGED = "download the file anew"
_SCALARS = {
    ValueType.UINT8: "B", ValueType.INT8: "b", ValueType.UINT16: "H", ValueType.INT16: "h", ValueType.UINT32: "I",
    ValueType.INT32: "i", ValueType.FLOAT32: "f", ValueType.UINT64: "Q", ValueType.INT64: "q", ValueType.FLOAT64: "d",
    ValueType.BOOL: "?",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """A tensor's place: ``shape`` outermost first (GGUF writes it innermost first), ``start`` in bytes from the file's
    begin."""

    shape: tuple[int, ...]
    type: TensorType
    start: int
    bytes: int


class GgufPart:
    """One file: its metadata and where its tensors are. ConvertError where anything lies outside the file."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = SourceFile(path, "give a GGUF file; of a split one, all parts")
        self._end, self._at = self._file.size, 0
        self._chunk, self._chunk_start = b"", 0
        if self._end < 4 or self._take(4) != b"GGUF":
            raise ConvertError(f"'{self.name}' is no GGUF file", "give a .gguf file, or a Hugging Face folder")
        version = self._number("I", "the version")
        if version not in VERSIONS and version.to_bytes(4, "little")[::-1] in [
            one.to_bytes(4, "little") for one in VERSIONS
        ]:
            raise ConvertError(f"'{self.name}' is big-endian", "supported: little-endian files of version 2 and 3")
        if version not in VERSIONS:
            raise ConvertError(
                f"'{self.name}' has GGUF version {version}", "supported: little-endian files of version 2 and 3"
            )
        tensors, values = self._number("Q", "the tensor count"), self._number("Q", "the metadata count")
        # An entry takes at least: name length, dimensions, type and offset; name length, type and one byte.
        self._room(tensors * 24 + values * 13, f"{tensors} tensors and {values} metadata values")
        self.metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self._text("a metadata key")
            if key in self.metadata:
                raise ConvertError(f"metadata '{key}' is in '{self.name}' twice", DAMAGED)
            self.metadata[key] = self._value(self._number("I", key), key)
        infos = [self._tensor() for _ in range(tensors)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise ConvertError(f"'{self.name}': general.alignment is {alignment!r}", DAMAGED)
        self._chunk = b""
        data = -(-self._at // alignment) * alignment
        self.tensors: dict[str, Tensor] = {}
        expected = 0  # one behind the other, as llama.cpp wants them: none overlaps another, or a changed type shows
        for name, shape, kind, offset, size in infos:
            if name in self.tensors:
                raise ConvertError(f"tensor '{name}' is in '{self.name}' twice", DAMAGED)
            if data + offset + size > self._end:
                raise ConvertError(f"tensor '{name}' lies outside '{self.name}'", "complete the download")
            if offset != expected:
                raise ConvertError(
                    f"tensor '{name}' in '{self.name}' begins at byte {offset} of the data, expected is {expected}",
                    DAMAGED,
                )
            expected += -(-size // alignment) * alignment
            self.tensors[name] = Tensor(shape, kind, data + offset, size)

    def _room(self, size: int, what: str) -> None:
        if size > self._end - self._at:
            raise ConvertError(f"'{self.name}' ends before {what}", "complete the download")

    def _take(self, size: int) -> bytes:
        """The next bytes of the header, read ``CHUNK`` at a time."""
        begin = self._at - self._chunk_start
        if begin + size > len(self._chunk):
            count = min(max(size, CHUNK), self._end - self._at)
            self._chunk, self._chunk_start, begin = self._file.read(self._at, count).tobytes(), self._at, 0
        self._at += size
        return self._chunk[begin : begin + size]

    def _number(self, letter: str, what: str) -> Any:
        size = struct.calcsize("<" + letter)
        self._room(size, what)
        return struct.unpack("<" + letter, self._take(size))[0]

    def _text(self, what: str) -> str:
        length = self._number("Q", what)
        self._room(length, what)
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            raise ConvertError(f"'{self.name}': {what} is not UTF-8", DAMAGED) from None

    def _value(self, kind: int, key: str) -> Any:
        if kind == ValueType.STRING:
            return self._text(f"'{key}'")
        if kind in _SCALARS:
            number = self._number(_SCALARS[ValueType(kind)], f"'{key}'")
            # 1e-6 was rounded to float32: take the shortest decimal that is rounded so.
            return float(str(np.float32(number))) if kind == ValueType.FLOAT32 else number
        if kind != ValueType.ARRAY:
            raise ConvertError(f"'{self.name}': metadata '{key}' has the unknown type {kind}", DAMAGED)
        inner, count = self._number("I", f"'{key}'"), self._number("Q", f"'{key}'")
        if inner == ValueType.STRING:
            self._room(8 * count, f"the {count} strings of '{key}'")
            return [self._text(f"'{key}'") for _ in range(count)]
        if inner not in _SCALARS:
            raise ConvertError(f"'{self.name}': metadata '{key}' is an array of the type {inner}", DAMAGED)
        layout = np.dtype("<" + _SCALARS[ValueType(inner)])
        self._room(layout.itemsize * count, f"the {count} values of '{key}'")
        return np.frombuffer(self._take(layout.itemsize * count), layout).tolist()

    def _tensor(self) -> tuple[str, tuple[int, ...], TensorType, int, int]:
        name = self._text("a tensor's name")
        dimensions = self._number("I", f"tensor '{name}'")
        if not 0 < dimensions <= MOST_DIMENSIONS:
            raise ConvertError(f"tensor '{name}' in '{self.name}' has {dimensions} dimensions", DAMAGED)
        shape = tuple(self._number("Q", f"tensor '{name}'") for _ in range(dimensions))[::-1]
        number, offset = self._number("I", f"tensor '{name}'"), self._number("Q", f"tensor '{name}'")
        try:
            kind = TensorType(number)
        except ValueError:
            raise ConvertError(f"tensor '{name}' has the unknown type {number}", "update the package gguf") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        if not all(shape) or shape[-1] % block:
            raise ConvertError(f"tensor '{name}' of type {kind.name} has shape {list(shape)}", DAMAGED)
        count = 1
        for side in shape:
            count *= side
        return name, shape, kind, offset, count // block * block_bytes

    def rows(self, tensor: Tensor, first: int, last: int) -> NDArray[np.uint8]:
        """Rows [first, last) of a tensor seen as a matrix of its innermost dimension: (rows, bytes of a row)."""
        count = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        size = tensor.bytes // count
        data = self._file.read(tensor.start + first * size, (last - first) * size)
        return data.reshape(last - first, size)


class GgufFile:
    """A model in one GGUF file or in parts named ``-00001-of-0000N.gguf`` (give the first)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = [GgufPart(part) for part in part_paths(path)]
        self.metadata = self.parts[0].metadata
        self._tensors: dict[str, tuple[GgufPart, Tensor]] = {}
        self._check_parts()
        for part in self.parts:
            for name, tensor in part.tensors.items():
                if name in self._tensors:
                    raise ConvertError(f"tensor '{name}' is in more than one part of '{path.name}'", DAMAGED)
                self._tensors[name] = part, tensor

    def _check_parts(self) -> None:
        """ConvertError unless the parts say that they belong together; those of other programs may say nothing."""
        said = [tuple(part.metadata.get(key) for key in SPLIT_KEYS) for part in self.parts]
        total = sum(len(part.tensors) for part in self.parts)
        for index, (part, (number, count, tensors)) in enumerate(zip(self.parts, said, strict=True)):
            expected = index, len(self.parts), total if number is not None else said[0][2]
            for key, found, right in zip(SPLIT_KEYS, (number, count, tensors), expected, strict=True):
                if found is not None and found != right:
                    raise ConvertError(
                        f"'{part.name}' does not belong to '{self.path.name}': its '{key}' is {found!r}, expected {right}",
                        "download all parts of one model",
                    )

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def fingerprint(self) -> str:
        """What tells one source from another: names, sizes and times of the files."""
        try:
            stats = [(part.name, (self.path.parent / part.name).stat()) for part in self.parts]
        except OSError as error:
            raise ConvertError(f"'{self.path}' cannot be read: {error.strerror}") from error
        return json.dumps(["gguf", [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]])

    def tensor(self, name: str) -> Tensor:
        """A tensor's place; ConvertError if it is missing."""
        if name not in self._tensors:
            raise ConvertError(f"tensor '{name}' is missing", "the file is incomplete, or of another architecture")
        return self._tensors[name][1]

    def check(self, name: str, shape: tuple[int, ...], matrix: bool) -> None:
        """ConvertError unless a tensor exists with this shape and a type that is supported, for a matrix or an array."""
        tensor = self.tensor(name)
        if tensor.shape != shape:
            raise ConvertError(f"tensor '{name}' has shape {list(tensor.shape)}, the metadata says {list(shape)}", DAMAGED)
        allowed = SUPPORTED if matrix else FLOATS
        if tensor.type not in allowed:
            raise ConvertError(
                f"tensor '{name}' is {tensor.type.name}", f"supported: {', '.join(kind.name for kind in allowed)}"
            )

    def floats(self, name: str) -> NDArray[np.float32]:
        """A tensor seen as a matrix of its innermost dimension, as float32."""
        tensor = self._tensors[name][1]
        return dequantized(tensor.type, self.raw(name), tensor.shape[-1])

    def raw(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.uint8]:
        """Rows [first, last) of a tensor seen as a matrix of its innermost dimension, as they are in the file."""
        part, tensor = self._tensors[name]
        count = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        return part.rows(tensor, first, count if last is None else last)
