"""Writing a store file by file into ``<path>.partial``; a journal of finished files lets a killed conversion resume."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import ExpertLayout, NestedMatrix
from elmoe.bitslice.expert import PAGE
from elmoe.bitslice.nested import BLOCK_ROWS, GROUP, GROUP_BYTES, ceil_div
from elmoe.errors import ConvertError
from elmoe.schema.model import ModelSchema
from elmoe.store.format import (
    DENSE_FILE,
    DENSE_ROLE,
    EXPERTS_ROLE,
    FORMAT,
    MANIFEST,
    VERSION,
    FileEntry,
    LayerEntry,
    Manifest,
    TensorEntry,
    TextFile,
    checksum,
    header_page,
    layer_file,
)

JOURNAL = "journal.jsonl"
Rows = Callable[[int, int], NestedMatrix]
"""Rows [first, last) of a matrix, nested."""
ExpertRecords = Callable[[int], tuple[NDArray[np.uint8], NDArray[np.uint8]]]
"""MSB and LSB record of an expert."""
ROW_BLOCK = 4096
"""Rows of a large matrix nested at a time."""


class JournalLine(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A finished data file with its manifest entries; the first line holds the fingerprint of the source instead."""

    fingerprint: str | None = None
    file: FileEntry | None = None
    tensors: tuple[TensorEntry, ...] = ()
    layer: LayerEntry | None = None


class StoreWriter:
    """Write ``dense.bin`` (``dense_file``), then layers (``layer``), then ``finish``. Files finished by an earlier attempt
    on the same source (``fingerprint``) are kept.

    :raises ConvertError: the target exists, the disk has no room, or a write fails.
    """

    def __init__(self, path: Path, schema: ModelSchema, source: str, fingerprint: str) -> None:
        self.path, self.schema, self._source = Path(path), schema, source
        if self.path.exists():
            raise ConvertError(f"'{path}' exists already", "remove it or choose another name")
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._lines = self._resume(fingerprint)
        needed = store_bytes(schema) - sum(line.file.bytes for line in self._lines if line.file)
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.partial).free
            if free < needed:
                raise ConvertError(
                    f"'{path}' needs {needed} more bytes of disk, {free} are free", "free some disk or choose another place"
                )
            if not self._lines:
                self._append(JournalLine(fingerprint=fingerprint))
        except OSError as error:
            raise ConvertError(f"cannot write '{path}': {error.strerror}") from error

    @property
    def finished(self) -> set[str]:
        """Names of the data files that are whole."""
        return {line.file.name for line in self._lines if line.file}

    def _resume(self, fingerprint: str) -> list[JournalLine]:
        try:
            raw = (self.partial / JOURNAL).read_bytes()
        except FileNotFoundError:
            return []
        lines = []
        for text in raw.split(b"\n"):
            try:
                lines.append(msgspec.json.decode(text, type=JournalLine))
            except msgspec.DecodeError:
                break  # the line that was being written when the process died
        if not lines or lines[0].fingerprint != fingerprint:
            shutil.rmtree(self.partial)
            return []
        (self.partial / JOURNAL).write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        return lines

    def _append(self, line: JournalLine) -> None:
        with open(self.partial / JOURNAL, "ab") as journal:
            journal.write(msgspec.json.encode(line) + b"\n")
            journal.flush()
            os.fsync(journal.fileno())
        self._lines.append(line)

    def dense_file(self, fill: Callable[[DenseFile], None]) -> None:
        """Write ``dense.bin``: ``fill`` adds its tensors. Nothing happens if it is finished already."""
        if DENSE_FILE in self.finished:
            return
        with _guarded(self.path), open(self.partial / DENSE_FILE, "w+b") as handle:
            handle.write(header_page(DENSE_ROLE, 0))
            dense = DenseFile(handle.fileno())
            fill(dense)
            self._append(JournalLine(file=_close(handle.fileno(), DENSE_FILE, dense.end), tensors=tuple(dense.entries)))

    def layer(
        self, layer: int, layout: ExpertLayout, records: ExpertRecords, step: Callable[[], None] | None = None
    ) -> None:
        """Write the experts of a layer. Nothing happens if they are finished already."""
        name = layer_file(layer)
        if name in self.finished:
            return
        sums = []
        with _guarded(self.path), open(self.partial / name, "w+b") as handle:
            handle.write(header_page(EXPERTS_ROLE, layer))
            for expert in range(self.schema.experts):
                msb, lsb = records(expert)
                handle.write(msb.data)
                handle.write(lsb.data)
                sums.append((checksum(msb.data), checksum(lsb.data)))
                if step is not None:
                    step()
            handle.flush()
            size = PAGE + self.schema.experts * (layout.msb_bytes + layout.lsb_bytes)
            entry = LayerEntry(
                layer=layer, file=name, experts=self.schema.experts, offset=PAGE, stride=layout.msb_bytes + layout.lsb_bytes,
                msb_bytes=layout.msb_bytes, lsb_bytes=layout.lsb_bytes, checksums=tuple(sums),
            )  # fmt: skip
            self._append(JournalLine(file=_close(handle.fileno(), name, size), layer=entry))

    def finish(self, tokenizer: bytes, chat_template: str | None = None) -> None:
        """Write the texts and the manifest, and give the store its name."""

        def text(name: str, data: bytes) -> TextFile:
            with open(self.partial / name, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            return TextFile(name=name, checksum=checksum(data))

        with _guarded(self.path):
            manifest = Manifest(
                format=FORMAT, version=VERSION, model=self.schema, source=self._source,
                files=tuple(line.file for line in self._lines if line.file),
                tensors=tuple(tensor for line in self._lines for tensor in line.tensors),
                layers=tuple(sorted((line.layer for line in self._lines if line.layer), key=lambda entry: entry.layer)),
                tokenizer=text("tokenizer.json", tokenizer),
                chat_template=None if chat_template is None else text("chat_template.jinja", chat_template.encode()),
            )  # fmt: skip
            text(MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
            (self.partial / JOURNAL).unlink()
            _sync_directory(self.partial)
            os.rename(self.partial, self.path)
            _sync_directory(self.path.parent)


class DenseFile:
    """``dense.bin`` while it is written; tensors begin on pages, their sections on 64 bytes."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.entries: list[TensorEntry] = []
        self.end = PAGE

    def _allocate(self, sizes: dict[str, int]) -> dict[str, int]:
        offsets, self.end = {}, ceil_div(self.end, PAGE) * PAGE
        for section, size in sizes.items():
            offsets[section] = self.end
            self.end = ceil_div(self.end + size, 64) * 64
        return offsets

    def _put(self, data: NDArray, offset: int) -> None:
        view = np.ascontiguousarray(data).data.cast("B")
        while view:
            written = os.pwrite(self._handle, view, offset)
            view, offset = view[written:], offset + written

    def _enter(self, name: str, kind: str, shape: tuple[int, ...], offsets: dict[str, int], sizes: dict[str, int]) -> None:
        parts = [os.pread(self._handle, sizes[section], offset) for section, offset in offsets.items()]
        self.entries.append(
            TensorEntry(name=name, kind=kind, shape=shape, offsets=offsets, checksum=checksum(*parts))  # type: ignore[arg-type]
        )

    def nested(self, name: str, shape: tuple[int, int], rows: Rows) -> None:
        """Add a matrix, ``ROW_BLOCK`` rows at a time."""
        cells, groups = ceil_div(shape[0], BLOCK_ROWS) * ceil_div(shape[1], GROUP), ceil_div(shape[1], GROUP)
        sizes = {"hi": cells * GROUP_BYTES, "lo": cells * GROUP_BYTES, "scales": cells * 2 * BLOCK_ROWS}
        offsets = self._allocate(sizes)
        for first in range(0, shape[0], ROW_BLOCK):
            matrix = rows(first, min(first + ROW_BLOCK, shape[0]))
            before = first // BLOCK_ROWS * groups
            for section, plane, per_cell in (
                ("hi", matrix.hi, GROUP_BYTES), ("lo", matrix.lo, GROUP_BYTES), ("scales", matrix.scales, 2 * BLOCK_ROWS)
            ):  # fmt: skip
                assert plane is not None
                self._put(plane, offsets[section] + before * per_cell)
        self._enter(name, "nested", shape, offsets, sizes)

    def matrix(self, name: str, matrix: NestedMatrix) -> None:
        """Add a matrix that is nested already."""
        sections = {"hi": matrix.hi, "lo": matrix.lo, "scales": matrix.scales}
        sizes = {section: plane.nbytes for section, plane in sections.items() if plane is not None}
        offsets = self._allocate(sizes)
        for section, plane in sections.items():
            assert plane is not None
            self._put(plane, offsets[section])
        self._enter(name, "nested", (matrix.rows, matrix.columns), offsets, sizes)

    def array(self, name: str, values: NDArray[np.float32]) -> None:
        """Add a float32 tensor."""
        sizes = {"data": values.nbytes}
        offsets = self._allocate(sizes)
        self._put(values, offsets["data"])
        self._enter(name, "float32", values.shape, offsets, sizes)

    def expert(self, name: str, layout: ExpertLayout, msb: NDArray[np.uint8], lsb: NDArray[np.uint8]) -> None:
        """Add a dense FFN as the records of one expert."""
        sizes = {"msb": msb.nbytes, "lsb": lsb.nbytes}
        offsets = self._allocate(sizes)
        self._put(msb, offsets["msb"])
        self._put(lsb, offsets["lsb"])
        self._enter(name, "expert", (layout.hidden, layout.width), offsets, sizes)


def store_bytes(schema: ModelSchema) -> int:
    """About how many bytes of data files a model takes, from above."""

    def nested(rows: int, columns: int) -> int:
        cells = ceil_div(rows, BLOCK_ROWS) * ceil_div(columns, GROUP)
        return cells * (2 * GROUP_BYTES + 2 * BLOCK_ROWS) + 2 * PAGE

    def expert(width: int) -> int:
        layout = ExpertLayout(schema.hidden, width)
        return layout.msb_bytes + layout.lsb_bytes

    inner = schema.heads * schema.head_dim
    attention = nested(inner + 2 * schema.kv_heads * schema.head_dim, schema.hidden) + nested(schema.hidden, inner)
    embeddings = nested(schema.vocabulary, schema.hidden) * (1 if schema.tied_embeddings else 2)
    small = 4 * (schema.experts + 4) * schema.hidden + 16 * PAGE
    experts = len(schema.moe_layers) * (PAGE + schema.experts * expert(schema.expert_width))
    dense = len(schema.dense_layers) * (expert(schema.dense_width) + PAGE)
    return embeddings + schema.layers * (attention + small) + experts + dense + 4 * PAGE


class _guarded:
    """Turn OSError into ConvertError that names the store."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            hint = "free some disk, then run the same command: it resumes" if error.errno == errno.ENOSPC else None
            raise ConvertError(f"cannot write '{self._path}': {error.strerror}", hint) from error


def _close(handle: int, name: str, size: int) -> FileEntry:
    """Pad a data file to whole pages and make it durable. Its pages leave the cache: a reader brings them back as huge ones,
    which decodes faster."""
    size = ceil_div(size, PAGE) * PAGE
    os.ftruncate(handle, size)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    return FileEntry(name=name, bytes=size)


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
