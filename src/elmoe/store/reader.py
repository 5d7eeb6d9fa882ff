"""Reading a store: the manifest is checked against the files, then tensors are views of mapped memory."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from weakref import finalize

import msgspec
import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import ExpertLayout, Matrix, StackedMatrix, from_sections
from elmoe.bitslice.expert import PAGE
from elmoe.bitslice.nested import BLOCK_ROWS, NestedMatrix, ceil_div
from elmoe.errors import ModelError, StoreError
from elmoe.models.spec import ModelSpec
from elmoe.models.support import check_supported
from elmoe.models.tensors import FeedForward, Tensor, feed_forward, feed_forwards, shared_feed_forward, tensors
from elmoe.store.format import (
    DENSE_FILE,
    DENSE_ROLE,
    EXPERTS_ROLE,
    FORMAT,
    MANIFEST,
    NO_SHAPES,
    VERSION,
    LayerEntry,
    Manifest,
    TensorEntry,
    check_header,
    check_name,
    checksum,
)
from elmoe.store.layout import after_sections, record_layout, record_sections, shapes_digest, tensor_sections
from elmoe.store.resolve import resolve_store
from elmoe.tokenizer import TOKENIZER_LIMIT, load_tokenizer
from elmoe.untrusted import read_bytes, read_text

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MANIFEST_LIMIT = 32 << 20
"""Bytes of the largest manifest that is read: 40 times that of 60 layers of 256 experts. Reading takes 13-fold memory."""


def read_manifest(path: Path) -> Manifest:
    """Parse and check ``manifest.json``; StoreError names file and field."""
    file = path / MANIFEST
    if file.stat().st_size > MANIFEST_LIMIT:
        raise StoreError(f"{MANIFEST} has more than {MANIFEST_LIMIT} bytes", "the manifest is damaged or hostile")
    raw = file.read_bytes()
    try:
        head = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise StoreError(f"{MANIFEST} is not JSON: {error}", "the store is damaged: convert the model anew") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise StoreError(f"{MANIFEST}: field 'format' is not '{FORMAT}'", "the directory is no elmoe store")
    version = head.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{MANIFEST}: version {version} is of a newer elmoe, this one reads up to {VERSION}", "update elmoe"
        )
    if version != VERSION:
        raise StoreError(f"{MANIFEST}: version {version!r:.20} is of an older elmoe", "convert the model anew")
    try:
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.ValidationError, ModelError, RecursionError) as error:
        raise StoreError(f"{MANIFEST}: {error}", "the store is damaged: convert the model anew") from error


def _close(ends: list[tuple[int, int, str]]) -> None:
    while ends:
        os.close(ends.pop()[0])


class MemoryReader:
    """A store mapped into memory, read-only; the page cache is its tier. A context manager.

    A file that is shortened while it is mapped ends the process when it is read beyond its new end (SIGBUS). ``check_sizes``
    tells of it, and the engine asks before each step; what happens within a step it cannot tell. Replace a store's files by
    renaming others: those that are mapped stay.
    """

    kind = "memory"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = manifest = read_manifest(path)
        self.spec: ModelSpec = manifest.model
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._sizes: dict[str, int] = {}
        self._ends: list[tuple[int, int, str]] = []  # descriptors of the mapped files, their sizes and names at the time
        self._close_files = finalize(self, _close, self._ends)
        self._shapes: dict[str, bytes] = {}
        self._check_model()
        self._feed_forwards = [feed_forward(self.spec, layer) for layer in range(len(self.spec.layers))]
        self.formats: dict[str, str] = {entry.name: entry.format for entry in manifest.tensors}
        """Format of every tensor and feed-forward, by store name."""
        self._tensors: dict[str, tuple[TensorEntry, Tensor | FeedForward]] = self._match_tensors()
        self._layers: dict[int, LayerEntry] = {layer.layer: layer for layer in manifest.layers}
        self.formats |= {f"layers.{layer.layer}.experts": layer.format for layer in manifest.layers}
        _check_names("layers", [str(layer) for layer in self.spec.moe_layers], [str(one.layer) for one in manifest.layers])
        roles = {DENSE_FILE: (DENSE_ROLE, 0)} | {layer.file: (EXPERTS_ROLE, layer.layer) for layer in manifest.layers}
        for entry in manifest.files:
            check_name(entry.name, "files.name")
        _check_names("files", list(roles), [entry.name for entry in manifest.files])
        for entry in manifest.files:
            self._open(entry.name, entry.bytes, *roles[entry.name])
        self._check_dense_file()
        self._check_layer_files()
        self._check_shapes()
        for text in filter(None, (manifest.tokenizer, manifest.chat_template)):
            check_name(text.name, "tokenizer or chat template")
            if not (path / text.name).is_file():
                raise StoreError(f"'{text.name}' is missing", "convert the model anew")

    def __enter__(self) -> MemoryReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mappings; views handed out keep theirs alive."""
        self._maps.clear()
        self._close_files()

    def _file(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a data file; StoreError once the reader is closed."""
        if name not in self._maps:
            raise StoreError(f"the store '{self.path.name}' is closed", "keep it open while it is used")
        return self._maps[name]

    def check_sizes(self) -> None:
        """StoreError that names a file which is shorter now than it was when the store was opened."""
        seek, end = os.lseek, os.SEEK_END
        for file, size, name in self._ends:  # in every step: a seek takes half of the time of fstat
            if (found := seek(file, 0, end)) < size:
                raise StoreError(f"'{name}' has {found} bytes, and had {size} when the store was opened", "copy it anew")

    def _open(self, name: str, size: int, role: int, layer: int) -> None:
        file = self.path / name
        try:
            with open(file, "rb") as handle:
                found = handle.seek(0, 2)
                if found != size or size < PAGE:
                    raise StoreError(f"'{name}' has {found} bytes, the manifest says {size}", "truncated: copy it anew")
                view = mmap.mmap(handle.fileno(), size, prot=mmap.PROT_READ)
                self._ends.append((os.dup(handle.fileno()), size, name))
            with suppress(OSError):  # pages of 2 MB, where the file system has them
                view.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            raise StoreError(f"'{name}' cannot be opened: {error.strerror}") from error
        self._shapes[name] = check_header(view[:PAGE], name, role, layer)
        self._sizes[name] = size
        self._maps[name] = np.frombuffer(view, np.uint8)

    def _check_shapes(self) -> None:
        """StoreError where a file holds tensors of other shapes than the model's: some leave no trace in its size."""
        expected = shapes_digest(self.spec)
        for name, found in self._shapes.items():
            if found not in (expected, NO_SHAPES):
                raise StoreError(
                    f"'{name}' holds tensors of other shapes than those of the model in {MANIFEST}",
                    "the store is damaged, or mixed from two: convert the model anew",
                )
        if self._shapes[DENSE_FILE] == NO_SHAPES:
            self._check_padding()

    def _check_model(self) -> None:
        try:
            check_supported(self.spec)
        except ModelError as error:
            raise StoreError(f"{MANIFEST}: model: {error}", error.hint) from error

    def _match_tensors(self) -> dict[str, tuple[TensorEntry, Tensor | FeedForward]]:
        """Each entry beside the tensor of the spec that it is; StoreError lists what is missing, doubled or left over."""
        expected: dict[str, Tensor | FeedForward] = {tensor.name: tensor for tensor in tensors(self.spec)}
        expected |= {part.name: part for part in feed_forwards(self.spec) if part.kind != "expert"}
        _check_names("tensors", list(expected), [entry.name for entry in self.manifest.tensors])
        entries = {entry.name: entry for entry in self.manifest.tensors}
        for name, tensor in expected.items():
            self._check_format(f"tensors.{name}", tensor)
        return {name: (entries[name], tensor) for name, tensor in expected.items()}

    def _check_format(self, where: str, tensor: Tensor | FeedForward) -> None:
        """StoreError unless a tensor can have the format that the manifest gives it."""
        try:
            tensor.format(self.formats)
        except ModelError as error:
            raise StoreError(
                f"{MANIFEST}: {where}.format is '{self.formats[tensor.name][:40]}': {error}",
                "update elmoe, or convert the model anew",
            ) from error

    def _check_dense_file(self) -> None:
        """StoreError unless the tensors of the spec fill ``dense.bin`` one behind the other, as they are written."""
        limit, damaged = self._sizes[DENSE_FILE], "the store is damaged: convert the model anew"
        laid_out = []
        for name in self._tensors:
            sections = self._sections(name)
            for section, offset, size in sections:
                if not PAGE <= offset <= limit - size:
                    raise StoreError(
                        f"{MANIFEST}: tensors.{name}.offsets.{section} = {offset} lies outside {DENSE_FILE}", damaged
                    )
            laid_out.append((sections[0][1], name, sections))
        end = PAGE
        for _, name, sections in sorted(laid_out):
            expected, end = after_sections(end, {section: size for section, _, size in sections})
            for section, offset, _ in sections:
                if offset != expected[section]:
                    raise StoreError(
                        f"{MANIFEST}: tensors.{name}.offsets.{section} = {offset} leaves a gap or an overlap in "
                        f"{DENSE_FILE}: by the model's shapes it is {expected[section]}", damaged,
                    )  # fmt: skip
        if ceil_div(end, PAGE) * PAGE != limit:
            raise StoreError(f"{MANIFEST}: the model's tensors fill {end} of {limit} bytes of {DENSE_FILE}", damaged)

    def _check_padding(self) -> None:
        """StoreError where ``dense.bin`` holds values behind the end of a tensor: the model's sizes are too small. For files
        that do not know the shapes of their tensors; of matrices those of the default format, which older stores have."""
        for name, (_, tensor) in self._tensors.items():
            if isinstance(tensor, FeedForward):
                continue
            if tensor.kind == "matrix":
                matrix = self.matrix(name)
                if not isinstance(matrix, NestedMatrix):
                    continue
                behind: NDArray = matrix.scales[-1, :, (tensor.shape[0] - 1) % BLOCK_ROWS + 1 :]
            else:
                _, offset, size = self._sections(name)[0]
                behind = self._file(DENSE_FILE)[offset + size : ceil_div(offset + size, PAGE) * PAGE]
            if behind.any():
                raise StoreError(
                    f"{MANIFEST}: '{name}' is larger in {DENSE_FILE} than the model says", "convert the model anew"
                )

    def _check_layer_files(self) -> None:
        """StoreError unless the experts of each layer fill its file."""
        for layer in self.manifest.layers:
            part, where = self._feed_forwards[layer.layer], f"{MANIFEST}: layers.{layer.layer}"
            self._check_format(f"layers.{layer.layer}", part)
            sections, size = record_sections(part, layer.format), self._sizes[layer.file]
            end = layer.offset + part.count * sum(sections.values())
            if layer.offset < PAGE or layer.offset % PAGE or end > size:
                raise StoreError(f"{where}.offset = {layer.offset} lies outside '{layer.file}'")
            if end != size:
                raise StoreError(f"{where}: by the model's shapes its experts end at byte {end} of {size} of '{layer.file}'")
            if len(layer.checksums) != part.count or any(len(sums) != len(sections) for sums in layer.checksums):
                raise StoreError(f"{where}.checksums has not one for each slice of each expert")

    def _sections(self, name: str) -> list[tuple[str, int, int]]:
        """(section, offset, bytes) of a tensor of ``dense.bin``, as spec and format have it."""
        entry, tensor = self._tensors[name]
        if isinstance(tensor, FeedForward):
            sizes = record_sections(tensor, entry.format)
        else:
            sizes = tensor_sections(tensor, entry.format)
        if entry.offsets.keys() != sizes.keys():
            raise StoreError(f"{MANIFEST}: tensors.{name}.offsets does not have {', '.join(sizes)}")
        return [(section, entry.offsets[section], size) for section, size in sizes.items()]

    def _section_bytes(self, name: str) -> list[NDArray[np.uint8]]:
        """The bytes of a tensor's sections."""
        data = self._file(DENSE_FILE)
        return [data[offset : offset + size] for _, offset, size in self._sections(name)]

    def _tensor(self, name: str, kind: str) -> Tensor:
        tensor = self._tensors[name][1] if name in self._tensors else None
        if not isinstance(tensor, Tensor) or tensor.kind != kind:
            raise StoreError(f"the model has no {kind} tensor '{name}'")
        return tensor

    def matrix(self, name: str) -> Matrix:
        """A matrix of the dense parts, without a copy."""
        tensor, sections = self._tensor(name, "matrix"), self._section_bytes(name)
        parts = []
        for piece, format in tensor.pieces(self.formats[name]).values():
            found = {section.name: sections.pop(0) for section in format.sections}
            rows, columns = piece.shape
            parts.append(from_sections(format, rows, columns, found))
        return parts[0] if len(parts) == 1 else StackedMatrix(tuple(parts))

    def array(self, name: str) -> NDArray[np.float32]:
        """A float32 tensor, without a copy."""
        shape = self._tensor(name, "floats").shape
        return self._section_bytes(name)[0].view(np.float32).reshape(shape)

    def _feed_forward(self, layer: int, shared: bool) -> FeedForward:
        part = shared_feed_forward(self.spec, layer) if shared else self._feed_forwards[layer]
        if part is None:
            raise StoreError(f"layer {layer} has no shared expert")
        return part

    def expert_layout(self, layer: int, shared: bool = False) -> ExpertLayout:
        """How an expert of the layer, or its dense feed-forward, or its ``shared`` expert, lies in memory."""
        part = self._feed_forward(layer, shared)
        return record_layout(part, self.formats[part.name])

    def expert_addresses(self, layer: int, shared: bool = False) -> NDArray[np.int64]:
        """(experts, 2) addresses of the MSB and LSB records, 0 where there is none; a dense feed-forward counts as one
        expert, as the ``shared`` one does."""
        part = self._feed_forward(layer, shared)
        if part.kind != "expert":
            found = [section.ctypes.data for section in self._section_bytes(part.name)]
            return np.array([[*found, 0][:2]], np.int64)
        entry, layout = self._layers[layer], self.expert_layout(layer)
        first = self._file(entry.file).ctypes.data + entry.offset
        msb = first + (layout.msb_bytes + layout.lsb_bytes) * np.arange(part.count, dtype=np.int64)
        lsb = msb + layout.msb_bytes if layout.lsb_bytes else np.zeros_like(msb)
        return np.ascontiguousarray(np.stack([msb, lsb], axis=1))

    def expert_extent(self, layer: int, expert: int) -> tuple[int, int]:
        """(offset, bytes) of an expert in its layer's file: its MSB record, its LSB record behind it."""
        layout = self.expert_layout(layer)
        size = layout.msb_bytes + layout.lsb_bytes
        return self._layers[layer].offset + expert * size, size

    def expert_records(self, layer: int, shared: bool = False) -> Iterator[tuple[NDArray[np.uint8], ...]]:
        """The records of each expert of the layer, or of its dense feed-forward, or of its ``shared`` expert, one for each
        slice, without a copy."""
        part = self._feed_forward(layer, shared)
        if part.kind != "expert":
            yield tuple(self._section_bytes(part.name))
            return
        layout, data = self.expert_layout(layer), self._file(self._layers[layer].file)
        middle = layout.msb_bytes
        for expert in range(part.count):
            start, size = self.expert_extent(layer, expert)
            msb, lsb = data[start : start + middle], data[start + middle : start + size]
            yield (msb, lsb) if layout.lsb_bytes else (msb,)

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything but routed experts."""
        return self._file(DENSE_FILE).size

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's file."""
        return self.path / self.manifest.tokenizer.name

    def chat_template(self) -> str | None:
        """The chat template's text, if the checkpoint had one."""
        from elmoe.chat import TEMPLATE_LIMIT  # here, because loading it delays a first token that needs no template

        entry = self.manifest.chat_template
        return None if entry is None else read_text(self.path / entry.name, StoreError, TEMPLATE_LIMIT, "chat template")

    def tokenizer(self) -> Tokenizer:
        """The tokenizer; StoreError where its file is damaged."""
        raw = read_bytes(self.tokenizer_path, StoreError, TOKENIZER_LIMIT, "tokenizer")
        return load_tokenizer(raw, str(self.tokenizer_path))

    @property
    def special_tokens(self) -> dict[str, str]:
        """Texts of special tokens by the variables of the chat template, such as ``bos_token``."""
        return self.manifest.special_tokens or {}

    def verify(self, progress: Callable[[float], None] | None = None) -> None:
        """Recompute every checksum; StoreError names what differs. ``progress`` takes the bytes done so far."""
        done = 0
        wrong = []

        def report(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done)

        for name, (tensor, _) in self._tensors.items():
            parts = [section.data for section in self._section_bytes(name)]
            if checksum(*parts) != tensor.checksum:
                wrong.append(f"{DENSE_FILE}: tensor '{name}'")
            report(sum(len(part) for part in parts))
        for layer in self.manifest.layers:
            for expert, (sums, records) in enumerate(zip(layer.checksums, self.expert_records(layer.layer), strict=True)):
                for name, expected, record in zip(("MSB", "LSB"), sums, records, strict=False):
                    if checksum(record.data) != expected:
                        wrong.append(f"{layer.file}: expert {expert}, {name} slice")
                report(sum(len(record) for record in records))
        for text in filter(None, (self.manifest.tokenizer, self.manifest.chat_template)):
            if checksum((self.path / text.name).read_bytes()) != text.checksum:
                wrong.append(text.name)
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise StoreError(f"checksum mismatch in {'; '.join(wrong[:5])}{more}", "copy or convert the store anew")


def _check_names(field: str, expected: list[str], found: list[str]) -> None:
    """StoreError where a field of the manifest lists a name twice, lacks one or has one that the model does not."""
    twice = {name for name, count in Counter(found).items() if count > 1}
    lacking, unknown = set(expected) - set(found), set(found) - set(expected)
    for what, names in (("lists twice", twice), ("lacks", lacking), ("has unknown", unknown)):
        if names:
            listed = ", ".join(f"'{name[:80]}'" for name in sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            raise StoreError(f"{MANIFEST}: field '{field}' {what} {listed}{more}", "convert the model anew")


def open_store(name: str | Path) -> MemoryReader:
    """Open a store by path, or ``demo``; StoreError names the file and field that is wrong."""
    return MemoryReader(resolve_store(name))
