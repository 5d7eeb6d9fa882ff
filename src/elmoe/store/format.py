"""What is in a store: names, manifest types, the header page of data files.

A store is a directory: ``manifest.json``, ``dense.bin`` (everything but routed experts), one ``layer-NNN.experts`` for each
MoE layer, ``tokenizer.json`` and perhaps ``chat_template.jinja``. Every data file begins with one header page. In a layer
file the records of an expert lie side by side, MSB then LSB, each padded to whole pages: a slice is one contiguous,
page-aligned read, and so is a whole expert.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable

import msgspec

from elmoe.bitslice.expert import PAGE
from elmoe.errors import StoreError
from elmoe.models.spec import ModelSpec
from elmoe.untrusted import short

FORMAT = "elmoe-store"
VERSION = 2
"""Of the manifest."""
DATA_VERSION = 1
"""Of the data files."""
MAGIC = b"ELMOESTR"
MANIFEST = "manifest.json"
DENSE_FILE = "dense.bin"
DENSE_ROLE, EXPERTS_ROLE = 0, 1
_HEADER = struct.Struct("<8sIII8s")
NO_SHAPES = b"\0" * 8
"""In place of the digest of shapes, in stores of before it was written."""
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}")  # as long as file systems have them


class _Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of all manifest parts."""


class FileEntry(_Part, frozen=True):
    """A file of the store and its size."""

    name: str
    bytes: int


class TextFile(_Part, frozen=True):
    """A tokenizer or chat template with its checksum."""

    name: str
    checksum: str


class TensorEntry(_Part, frozen=True):
    """A tensor of ``dense.bin``; kind and shape follow from the model's spec. ``offsets``: of ``data`` (float32), of the
    sections of its format (of each part, where they differ), or of ``msb`` and ``lsb`` records (a dense feed-forward).
    ``checksum``: over these sections."""

    name: str
    format: str
    offsets: dict[str, int]
    checksum: str


class LayerEntry(_Part, frozen=True):
    """The experts of a layer; sizes of their records follow from spec and format. Expert ``e`` has its MSB record at
    ``offset`` plus ``e`` times the bytes of an expert, its LSB record, if it has one, behind it. ``checksums``: [msb, lsb]
    or [msb] by expert."""

    layer: int
    file: str
    format: str
    offset: int
    checksums: tuple[tuple[str, ...], ...]


class Manifest(_Part, frozen=True):
    """The whole manifest; ``special_tokens``: variables of the chat template such as ``bos_token``, absent if there are
    none; ``source`` says how the store was made."""

    format: str
    version: int
    model: ModelSpec
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]
    layers: tuple[LayerEntry, ...]
    tokenizer: TextFile
    chat_template: TextFile | None = None
    special_tokens: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    source: str = ""


def layer_file(layer: int) -> str:
    """Name of the file with a layer's experts."""
    return f"layer-{layer:03d}.experts"


def header_page(role: int, layer: int, shapes: bytes) -> bytes:
    """The first page of a data file. ``shapes``: see ``layout.shapes_digest``."""
    return _HEADER.pack(MAGIC, DATA_VERSION, role, layer, shapes).ljust(PAGE, b"\0")


def check_header(page: bytes, name: str, role: int, layer: int) -> bytes:
    """The digest of shapes in a data file, or ``NO_SHAPES``; StoreError where it does not begin as it must."""
    if len(page) < _HEADER.size or page[:8] != MAGIC:
        raise StoreError(f"'{name}' does not begin with the magic of an elmoe data file", "the file is damaged or foreign")
    _, version, found_role, found_layer, found_shapes = _HEADER.unpack_from(page)
    if version > DATA_VERSION:
        raise StoreError(f"'{name}' has version {version}, this elmoe reads up to {DATA_VERSION}", "update elmoe")
    if (found_role, found_layer) != (role, layer):
        raise StoreError(f"'{name}' is the file of another role or layer", "convert the model anew")
    return bytes(found_shapes)


def check_name(name: str, field: str) -> None:
    """Raise StoreError unless a file name stays inside the store."""
    if not _PLAIN_NAME.fullmatch(name):
        raise StoreError(
            f"manifest.json: {field} '{short(name)}' is not a plain file name", "the manifest is damaged or hostile"
        )


def checksum(*parts: bytes | memoryview) -> str:
    """Checksum of bytes, 16 hexadecimal digits."""
    return checksum_of(parts)


def checksum_of(parts: Iterable[bytes | memoryview]) -> str:
    """The same, of parts that come one after the other."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return state.hexdigest()
