"""Writing a store file by file into ``<path>.partial``; a journal of finished files lets a killed conversion resume."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix, sections_of
from elmoe.bitslice.expert import PAGE
from elmoe.bitslice.nested import BLOCK_ROWS, ceil_div
from elmoe.errors import ConvertError, NumericsError, StoreError
from elmoe.models.formats import Format
from elmoe.models.spec import ModelSpec
from elmoe.models.tensors import FLOATS, FeedForward, Formats, Tensor, check_formats, feed_forward, feed_forwards, tensors
from elmoe.store.ahead import WriteBack, ahead
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
    check_header,
    checksum,
    checksum_of,
    header_page,
    layer_file,
)
from elmoe.store.journal import Journal, JournalLine, sync_directory
from elmoe.store.layout import after_sections, record_layout, record_sections, shapes_digest, store_bytes, tensor_sections
from elmoe.store.reader import MemoryReader
from elmoe.units import format_bytes

ROW_BLOCK = 4096
"""Rows of a large matrix quantised at a time."""
CHUNK = 8 << 20
"""Bytes of a tensor that are read back together."""
SAFE_BYTES = 256 << 20
"""Bytes of ``dense.bin`` after which they are put on the disk and noted, so that a resume goes on behind them."""
Progress = Callable[[int, int], None]
"""Takes tensors and experts written, and all there are."""
Step = Callable[[int, int], None]
"""Takes tensors and experts that were written since, and their bytes."""


class Weights(Protocol):
    """Where the contents of a store come from."""

    def floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """The values of a tensor that stays float32."""
        ...

    def matrix(self, tensor: Tensor, first: int, last: int, format: Format) -> QuantizedMatrix:
        """Rows [first, last) of a matrix, or of one of its parts, in a format; ``first`` is a multiple of ``ROW_BLOCK``."""
        ...

    def projections(self, part: FeedForward, expert: int, formats: tuple[Format, ...]) -> dict[str, QuantizedMatrix]:
        """Gate, up and down of an expert, each in its format; a dense feed-forward is expert 0."""
        ...


class StoreWriter:
    """Write the data files (``write``), then ``finish``. Files finished by an earlier attempt on the same source are kept
    if they are as they were written. A context manager; until it ends no other process can write this store.

    :param fingerprint: tells one source from another, and is asked again whenever a file is finished.
    :raises ConvertError: the target exists or another process writes it, the disk has no room, a write fails, or the source
        has changed.
    """

    def __init__(
        self, path: Path, spec: ModelSpec, source: str, fingerprint: Callable[[], str], formats: Formats | None = None
    ) -> None:
        self.path, self.spec, self._source, self._formats = Path(path), spec, source, formats or {}
        self._ask, self._fingerprint = fingerprint, fingerprint()
        self._shapes = shapes_digest(spec)
        check_formats(spec, self._formats)
        self._journal = journal = Journal(self.path)
        self.partial = journal.partial
        try:
            with _guarded(self.path):
                journal.resume(self._fingerprint, self._holds)
                kept = sum(line.file.bytes for line in journal.lines if line.file)
                needed, free = store_bytes(spec, self._formats) - kept, shutil.disk_usage(self.partial).free
            if free < needed:
                if len(journal.lines) == 1:  # nothing is finished
                    journal.discard()
                raise ConvertError(
                    f"'{path}' needs {format_bytes(needed)} more of disk, {format_bytes(free)} are free",
                    "free some disk or choose another place",
                )
        except BaseException:
            journal.close()
            raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, NumericsError):  # a weight of the source: another attempt would stop there too
            self._journal.remove()
        self._journal.close()

    @property
    def finished(self) -> set[str]:
        """Names of the data files that are whole."""
        return {line.file.name for line in self._journal.lines if line.file}

    def _holds(self, line: JournalLine) -> bool:
        """Whether a finished file, or the noted part of ``dense.bin``, is as it was written: its size and all checksums."""
        name = line.file.name if line.file else DENSE_FILE
        try:
            parts = list(self._sections(line))
            with open(self.partial / name, "rb") as handle:
                role = (DENSE_ROLE, 0) if line.layer is None else (EXPERTS_ROLE, line.layer.layer)
                shapes = check_header(handle.read(PAGE), name, *role)
                whole = line.file is None or os.fstat(handle.fileno()).st_size == line.file.bytes
                return (
                    shapes == self._shapes
                    and whole
                    and all(
                        checksum(*(os.pread(handle.fileno(), size, offset) for offset, size in sections)) == expected
                        for sections, expected in parts
                    )
                )
        except (OSError, StoreError, KeyError, ValueError, OverflowError):
            return False

    def _sections(self, line: JournalLine) -> Iterator[tuple[list[tuple[int, int]], str]]:
        """([(offset, bytes)], checksum) of all that a line notes; ValueError where it is no file of this store."""
        if line.layer is not None:
            assert line.file is not None
            if line.layer.layer not in self.spec.moe_layers or line.file.name != layer_file(line.layer.layer):
                raise ValueError(line.file.name)
            part, offset = feed_forward(self.spec, line.layer.layer), line.layer.offset
            sizes = list(record_sections(part, part.format(self._formats)).values())
            for sums in line.layer.checksums:
                for size, expected in zip(sizes, sums, strict=True):
                    yield [(offset, size)], expected
                    offset += size
            if len(line.layer.checksums) != part.count:
                raise ValueError(line.file.name)
            return
        known = {tensor.name: tensor_sections(tensor, tensor.format(self._formats)) for tensor in tensors(self.spec)}
        known |= {
            part.name: record_sections(part, part.format(self._formats))
            for part in feed_forwards(self.spec)
            if part.kind != "expert"
        }
        noted = {entry.name for entry in line.tensors}
        if not (noted <= set(known) if line.file is None else line.file.name == DENSE_FILE and noted == set(known)):
            raise ValueError(DENSE_FILE)
        for entry in line.tensors:
            yield [(entry.offsets[name], size) for name, size in known[entry.name].items()], entry.checksum

    def _append(self, line: JournalLine) -> None:
        """Note a finished file, unless the source it was made of is another one now."""
        self._check_source()
        self._journal.append(line)

    def _check_source(self) -> None:
        if self._ask() != self._fingerprint:
            raise ConvertError(
                f"the source of '{self.path}' has changed during the conversion",
                "run the same command again: it begins anew",
            )

    def write(self, weights: Weights, progress: Progress | None = None, written: Progress | None = None) -> None:
        """Write ``dense.bin``, then the experts of layer after layer. NumericsError names a tensor that is not finite.

        :param written: takes the bytes that are done, and all of the store.
        """
        parts = feed_forwards(self.spec)
        routed = [part for part in parts if part.kind == "expert"]
        names = list(tensors(self.spec))
        done = size = 0
        total, total_size = len(names) + sum(part.count for part in routed), store_bytes(self.spec, self._formats)

        def step(count: int, added: int) -> None:
            nonlocal done, size
            done, size = done + count, min(size + added, total_size)
            if progress is not None and count:
                progress(done, total)
            if written is not None:
                written(size, total_size)

        finished = {line.file.name: line.file.bytes for line in self._journal.lines if line.file}
        if DENSE_FILE in finished:
            step(len(names), finished[DENSE_FILE])
        else:
            self._write_dense(names, [part for part in parts if part.kind != "expert"], weights, step)
        for part in routed:
            if layer_file(part.layer) in finished:
                step(part.count, finished[layer_file(part.layer)])
            else:
                self._write_layer(part, weights, step)
        step(0, total_size)  # headers and padding

    def _write_dense(self, names: list[Tensor], parts: list[FeedForward], weights: Weights, step: Step) -> None:
        found = {entry.name: entry for line in self._journal.lines if not line.file for entry in line.tensors}
        with _guarded(self.path), open(self.partial / DENSE_FILE, "r+b" if found else "w+b") as handle:
            if not found:
                handle.write(header_page(DENSE_ROLE, 0, self._shapes))
                handle.flush()
            dense, noted, safe = DenseFile(handle.fileno(), found), len(found), 0
            everything: list[Tensor | FeedForward] = [*names, *parts]
            with WriteBack(handle.fileno()) as disk:
                for one in everything:
                    before = dense.end
                    if isinstance(one, Tensor):
                        dense.tensor(one, self._formats, weights)
                    else:
                        dense.record(one, self._formats, weights)
                    step(int(isinstance(one, Tensor)), dense.end - before)
                    disk.wrote(dense.end - before)
                    safe += dense.end - before
                    if safe >= SAFE_BYTES and len(dense.entries) > noted:
                        os.fsync(handle.fileno())
                        self._append(JournalLine(tensors=tuple(dense.entries[noted:])))
                        noted, safe = len(dense.entries), 0
            self._append(JournalLine(file=_close(handle.fileno(), DENSE_FILE, dense.end), tensors=tuple(dense.entries)))

    def _write_layer(self, part: FeedForward, weights: Weights, step: Step) -> None:
        format = part.format(self._formats)
        name, layout, sums = layer_file(part.layer), record_layout(part, format), []
        with _guarded(self.path), open(self.partial / name, "w+b") as handle:
            handle.write(header_page(EXPERTS_ROLE, part.layer, self._shapes))

            def packed(expert: int) -> tuple[NDArray[np.uint8], ...]:
                return layout.pack(weights.projections(part, expert, layout.formats))

            with WriteBack(handle.fileno()) as disk:
                for records in ahead(partial(packed, expert) for expert in range(part.count)):
                    for record in records:
                        handle.write(record.data)
                    sums.append(tuple(checksum(record.data) for record in records))
                    size = sum(record.nbytes for record in records)
                    step(1, size)
                    disk.wrote(size)
            handle.flush()
            size = PAGE + part.count * sum(record_sections(part, format).values())
            entry = LayerEntry(layer=part.layer, file=name, format=format, offset=PAGE, checksums=tuple(sums))
            self._append(JournalLine(file=_close(handle.fileno(), name, size), layer=entry))

    def finish(
        self, tokenizer: bytes, chat_template: str | None = None, special_tokens: dict[str, str] | None = None
    ) -> None:
        """Write the texts and the manifest, and give the store its name."""

        def text(name: str, data: bytes) -> TextFile:
            with open(self.partial / name, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            return TextFile(name=name, checksum=checksum(data))

        finished = [line for line in self._journal.lines if line.file]
        lines = sorted(finished, key=lambda line: -1 if line.layer is None else line.layer.layer)
        with _guarded(self.path):
            manifest = Manifest(
                format=FORMAT, version=VERSION, model=self.spec, source=self._source,
                files=tuple(line.file for line in lines if line.file),
                tensors=tuple(tensor for line in lines for tensor in line.tensors),
                layers=tuple(line.layer for line in lines if line.layer),
                tokenizer=text("tokenizer.json", tokenizer),
                chat_template=None if chat_template is None else text("chat_template.jinja", chat_template.encode()),
                special_tokens=special_tokens or msgspec.UNSET,
            )  # fmt: skip
            text(MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=1))
            sync_directory(self.partial)
            self._read_back()
            self._check_source()
            self._journal.finish()

    def _read_back(self) -> None:
        """Open what was written as a reader does; ConvertError where that fails."""
        from elmoe.chat import check_template  # here, because loading it delays whoever only reads

        try:
            with MemoryReader(self.partial) as reader:
                reader.tokenizer()
                template = reader.chat_template()
                if template is not None:
                    check_template(template, StoreError)
        except StoreError as error:
            raise ConvertError(f"what was written to '{self.path}' cannot be read: {error}", error.hint) from error


class DenseFile:
    """``dense.bin`` while it is written. ``found``: entries of tensors that an earlier attempt has written."""

    def __init__(self, handle: int, found: dict[str, TensorEntry]) -> None:
        self._handle, self._found = handle, found
        self.entries: list[TensorEntry] = []
        self.end = PAGE

    def tensor(self, tensor: Tensor, formats: Formats, weights: Weights) -> None:
        """Add a tensor; a matrix is quantised and written ``ROW_BLOCK`` rows at a time."""
        format = tensor.format(formats)
        sizes = tensor_sections(tensor, format)
        offsets, self.end = after_sections(self.end, sizes)
        if self._is_there(tensor.name, format, offsets):
            return
        if format == FLOATS:
            values = np.ascontiguousarray(weights.floats(tensor), np.float32)
            if not np.isfinite(values).all():
                raise NumericsError(f"tensor '{tensor.name}' holds NaN or infinite values", "download the checkpoint anew")
            self._put(values, offsets["data"])
        else:
            for before, (piece, one) in tensor.pieces(format).items():
                rows = piece.shape[0]
                padded, starts = ceil_div(rows, BLOCK_ROWS) * BLOCK_ROWS, range(0, rows, ROW_BLOCK)
                calls = (partial(weights.matrix, piece, first, min(first + ROW_BLOCK, rows), one) for first in starts)
                for first, matrix in zip(starts, ahead(calls), strict=True):
                    for section, data in sections_of(matrix).items():
                        name = before + section
                        self._put(data, offsets[name] + sizes[name] * first // padded)
        self._enter(tensor.name, format, offsets, sizes)

    def record(self, part: FeedForward, formats: Formats, weights: Weights) -> None:
        """Add a dense feed-forward as the records of one expert."""
        format = part.format(formats)
        sizes, layout = record_sections(part, format), record_layout(part, format)
        offsets, self.end = after_sections(self.end, sizes)
        if self._is_there(part.name, format, offsets):
            return
        records = layout.pack(weights.projections(part, 0, layout.formats))
        for offset, data in zip(offsets.values(), records, strict=True):
            self._put(data, offset)
        self._enter(part.name, format, offsets, sizes)

    def _is_there(self, name: str, format: str, offsets: dict[str, int]) -> bool:
        """Whether a tensor was written where it belongs; its entry is taken over."""
        entry = self._found.get(name)
        if entry is None or (entry.format, entry.offsets) != (format, offsets):
            return False
        self.entries.append(entry)
        return True

    def _put(self, data: NDArray, offset: int) -> None:
        view = np.ascontiguousarray(data).data.cast("B")
        while view:
            written = os.pwrite(self._handle, view, offset)
            view, offset = view[written:], offset + written

    def _enter(self, name: str, format: str, offsets: dict[str, int], sizes: dict[str, int]) -> None:
        parts = (
            os.pread(self._handle, min(CHUNK, offset + sizes[section] - at), at)
            for section, offset in offsets.items()
            for at in range(offset, offset + sizes[section], CHUNK)
        )
        self.entries.append(TensorEntry(name=name, format=format, offsets=offsets, checksum=checksum_of(parts)))


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
