"""Reading a store: the manifest is checked against the files, then tensors are views of mapped memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import ExpertLayout, NestedMatrix
from elmoe.bitslice.expert import PAGE
from elmoe.bitslice.nested import BLOCK_ROWS, GROUP, GROUP_BYTES, ceil_div
from elmoe.errors import StoreError
from elmoe.schema.model import ModelSchema
from elmoe.store.format import (
    DENSE_FILE,
    DENSE_ROLE,
    EXPERTS_ROLE,
    FORMAT,
    MANIFEST,
    VERSION,
    LayerEntry,
    Manifest,
    TensorEntry,
    check_header,
    check_name,
    checksum,
)

MANIFEST_LIMIT = 256 << 20
"""Bytes of the largest manifest that is read."""
DEMO = Path(__file__).resolve().parent.parent / "presets" / "demo"


def resolve_store(name: str | Path) -> Path:
    """A path, or the embedded store for ``demo``; StoreError if there is no store."""
    path = DEMO if str(name) == "demo" else Path(name)
    if not path.is_dir():
        raise StoreError(f"there is no store '{name}'", "give the directory that `elmoe convert` wrote, or `demo`")
    if not (path / MANIFEST).is_file():
        raise StoreError(f"'{name}' has no {MANIFEST}", "it is not a store, or its conversion did not finish")
    return path


def read_manifest(path: Path) -> Manifest:
    """Parse and check ``manifest.json``; StoreError names file and field."""
    file = path / MANIFEST
    if file.stat().st_size > MANIFEST_LIMIT:
        raise StoreError(f"{MANIFEST} has more than {MANIFEST_LIMIT} bytes")
    raw = file.read_bytes()
    try:
        head = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{MANIFEST} is not JSON: {error}", "the store is damaged: convert the model anew") from error
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise StoreError(f"{MANIFEST}: field 'format' is not '{FORMAT}'", "the directory is no elmoe store")
    version = head.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{MANIFEST}: version {version} is of a newer elmoe, this one reads up to {VERSION}", "update elmoe"
        )
    try:
        return msgspec.json.decode(raw, type=Manifest)
    except msgspec.ValidationError as error:
        raise StoreError(f"{MANIFEST}: {error}", "the store is damaged: convert the model anew") from error


class MemoryReader:
    """A store mapped into memory, read-only; the page cache is its tier. A context manager."""

    kind = "memory"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest = manifest = read_manifest(path)
        self.schema: ModelSchema = manifest.model
        self._maps: dict[str, NDArray[np.uint8]] = {}
        self._sizes: dict[str, int] = {}
        self._tensors: dict[str, TensorEntry] = {tensor.name: tensor for tensor in manifest.tensors}
        self._layers: dict[int, LayerEntry] = {layer.layer: layer for layer in manifest.layers}
        self._check_schema()
        roles = {DENSE_FILE: (DENSE_ROLE, 0)} | {layer.file: (EXPERTS_ROLE, layer.layer) for layer in manifest.layers}
        for entry in manifest.files:
            check_name(entry.name, "files.name")
            if entry.name not in roles:
                raise StoreError(f"{MANIFEST}: file '{entry.name}' belongs to no layer")
            self._open(entry.name, entry.bytes, *roles[entry.name])
        for name in roles:
            if name not in self._sizes:
                raise StoreError(f"{MANIFEST}: field 'files' lacks '{name}'")
        self._check_offsets()
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

    def _file(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a data file; StoreError once the reader is closed."""
        if name not in self._maps:
            raise StoreError(f"the store '{self.path.name}' is closed", "keep the session open while it is used")
        return self._maps[name]

    def _open(self, name: str, size: int, role: int, layer: int) -> None:
        file = self.path / name
        try:
            with open(file, "rb") as handle:
                found = handle.seek(0, 2)
                if found != size or size < PAGE:
                    raise StoreError(f"'{name}' has {found} bytes, the manifest says {size}", "truncated: copy it anew")
                view = mmap.mmap(handle.fileno(), size, prot=mmap.PROT_READ)
            with suppress(OSError):  # pages of 2 MB, where the file system has them
                view.madvise(mmap.MADV_HUGEPAGE)
        except OSError as error:
            raise StoreError(f"'{name}' cannot be opened: {error.strerror}") from error
        check_header(view[:PAGE], name, role, layer)
        self._sizes[name] = size
        self._maps[name] = np.frombuffer(view, np.uint8)

    def _check_schema(self) -> None:
        schema = self.schema
        for field in (
            "vocabulary", "hidden", "layers", "heads", "kv_heads", "head_dim", "experts", "top_k", "expert_width",
            "max_positions",
        ):  # fmt: skip
            value = getattr(schema, field)
            if not 0 < value < 1 << 31:
                raise StoreError(f"{MANIFEST}: model.{field} is {value}")
        if schema.top_k > schema.experts or schema.heads % schema.kv_heads:
            raise StoreError(f"{MANIFEST}: model.top_k or model.kv_heads does not fit")
        if set(self._layers) != set(schema.moe_layers) or len(self._layers) != len(self.manifest.layers):
            raise StoreError(f"{MANIFEST}: field 'layers' does not name the model's MoE layers")

    def _check_offsets(self) -> None:
        for tensor in self.manifest.tensors:
            for section, offset, size in self._sections(tensor):
                limit = self._sizes[DENSE_FILE]
                if not PAGE <= offset <= limit - size or offset % 64:
                    raise StoreError(
                        f"{MANIFEST}: tensors.{tensor.name}.offsets.{section} = {offset} lies outside {DENSE_FILE}",
                        "the store is damaged: convert the model anew",
                    )
        for layer in self.manifest.layers:
            layout = self.expert_layout(layer.layer)
            expected = (self.schema.experts, layout.msb_bytes, layout.lsb_bytes, layout.msb_bytes + layout.lsb_bytes)
            if (layer.experts, layer.msb_bytes, layer.lsb_bytes, layer.stride) != expected:
                raise StoreError(f"{MANIFEST}: layers.{layer.layer} does not have the sizes of the model's experts")
            end = layer.offset + layer.experts * layer.stride
            if layer.offset < PAGE or layer.offset % PAGE or end > self._sizes[layer.file]:
                raise StoreError(f"{MANIFEST}: layers.{layer.layer}.offset = {layer.offset} lies outside '{layer.file}'")
            if len(layer.checksums) != layer.experts:
                raise StoreError(f"{MANIFEST}: layers.{layer.layer}.checksums has {len(layer.checksums)} entries")

    def _sections(self, tensor: TensorEntry) -> list[tuple[str, int, int]]:
        """(name, offset, bytes) of a tensor's sections; StoreError where shape or offsets are malformed."""
        shape = tensor.shape
        if not shape or any(not 0 < side < 1 << 31 for side in shape):
            raise StoreError(f"{MANIFEST}: tensors.{tensor.name}.shape is {list(shape)}")
        if tensor.kind == "float32":
            sizes = {"data": 4 * int(np.prod(shape, dtype=object))}
        elif len(shape) != 2:
            raise StoreError(f"{MANIFEST}: tensors.{tensor.name}.shape is not that of a matrix")
        elif tensor.kind == "nested":
            cells = ceil_div(shape[0], BLOCK_ROWS) * ceil_div(shape[1], GROUP)
            sizes = {"hi": cells * GROUP_BYTES, "lo": cells * GROUP_BYTES, "scales": cells * 2 * BLOCK_ROWS}
        else:
            layout = ExpertLayout(*shape)
            sizes = {"msb": layout.msb_bytes, "lsb": layout.lsb_bytes}
        if tensor.offsets.keys() != sizes.keys():
            raise StoreError(f"{MANIFEST}: tensors.{tensor.name}.offsets does not have {', '.join(sizes)}")
        return [(name, tensor.offsets[name], size) for name, size in sizes.items()]

    def _section(self, tensor: TensorEntry, section: str) -> NDArray[np.uint8]:
        for name, offset, size in self._sections(tensor):
            if name == section:
                return self._file(DENSE_FILE)[offset : offset + size]
        raise StoreError(f"tensor '{tensor.name}' has no section '{section}'")

    def _tensor(self, name: str, kind: str) -> TensorEntry:
        tensor = self._tensors.get(name)
        if tensor is None or tensor.kind != kind:
            raise StoreError(f"{MANIFEST}: there is no {kind} tensor '{name}'", "convert the model anew")
        return tensor

    def nested(self, name: str) -> NestedMatrix:
        """A nested matrix of the dense parts, without a copy."""
        tensor = self._tensor(name, "nested")
        rows, columns = tensor.shape
        grid = ceil_div(rows, BLOCK_ROWS), ceil_div(columns, GROUP)
        hi, lo, scales = (self._section(tensor, section) for section in ("hi", "lo", "scales"))
        return NestedMatrix(
            rows,
            columns,
            hi.reshape(*grid, GROUP_BYTES),
            lo.reshape(*grid, GROUP_BYTES),
            scales.view(np.float16).reshape(*grid, BLOCK_ROWS),
        )

    def array(self, name: str) -> NDArray[np.float32]:
        """A float32 tensor, without a copy."""
        tensor = self._tensor(name, "float32")
        return self._section(tensor, "data").view(np.float32).reshape(tensor.shape)

    def expert_layout(self, layer: int) -> ExpertLayout:
        """How an expert of the layer, or its dense FFN, lies in memory."""
        dense = layer in self.schema.dense_layers
        return ExpertLayout(self.schema.hidden, self.schema.dense_width if dense else self.schema.expert_width)

    def _dense_ffn(self, layer: int) -> TensorEntry:
        """The dense FFN of a layer, of the sizes that its layout has."""
        tensor, layout = self._tensor(f"layers.{layer}.dense_ffn", "expert"), self.expert_layout(layer)
        if tuple(tensor.shape) != (layout.hidden, layout.width):
            raise StoreError(
                f"{MANIFEST}: tensors.{tensor.name}.shape is {list(tensor.shape)}, the model's is "
                f"{[layout.hidden, layout.width]}",
                "the store is damaged: convert the model anew",
            )
        return tensor

    def expert_addresses(self, layer: int) -> NDArray[np.int64]:
        """(experts, 2) addresses of the MSB and LSB records; a dense FFN counts as one expert."""
        if layer in self.schema.dense_layers:
            tensor = self._dense_ffn(layer)
            return np.array([[self._section(tensor, part).ctypes.data for part in ("msb", "lsb")]], np.int64)
        entry = self._layers[layer]
        first = self._file(entry.file).ctypes.data + entry.offset
        msb = first + entry.stride * np.arange(entry.experts, dtype=np.int64)
        return np.ascontiguousarray(np.stack([msb, msb + entry.msb_bytes], axis=1))

    def expert_records(self, layer: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """MSB and LSB record of each expert of the layer, or of its dense FFN, without a copy."""
        if layer in self.schema.dense_layers:
            tensor = self._dense_ffn(layer)
            yield self._section(tensor, "msb"), self._section(tensor, "lsb")
            return
        entry = self._layers[layer]
        for expert in range(entry.experts):
            start = entry.offset + expert * entry.stride
            record = self._file(entry.file)[start : start + entry.stride]
            yield record[: entry.msb_bytes], record[entry.msb_bytes :]

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
        entry = self.manifest.chat_template
        return None if entry is None else (self.path / entry.name).read_text(encoding="utf-8")

    def verify(self, progress: Callable[[float], None] | None = None) -> None:
        """Recompute every checksum; StoreError names what differs. ``progress`` takes the bytes done so far."""
        done = 0
        wrong = []

        def report(size: int) -> None:
            nonlocal done
            done += size
            if progress is not None:
                progress(done)

        for tensor in self.manifest.tensors:
            parts = [self._section(tensor, section).data for section, _, _ in self._sections(tensor)]
            if checksum(*parts) != tensor.checksum:
                wrong.append(f"{DENSE_FILE}: tensor '{tensor.name}'")
            report(sum(len(part) for part in parts))
        for layer in self.manifest.layers:
            data = self._file(layer.file)
            for expert, sums in enumerate(layer.checksums):
                start = layer.offset + expert * layer.stride
                middle, end = start + layer.msb_bytes, start + layer.stride
                for name, expected, part in (("MSB", sums[0], data[start:middle]), ("LSB", sums[1], data[middle:end])):
                    if checksum(part.data) != expected:
                        wrong.append(f"{layer.file}: expert {expert}, {name} slice")
                report(layer.stride)
        for text in filter(None, (self.manifest.tokenizer, self.manifest.chat_template)):
            if checksum((self.path / text.name).read_bytes()) != text.checksum:
                wrong.append(text.name)
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise StoreError(f"checksum mismatch in {'; '.join(wrong[:5])}{more}", "copy or convert the store anew")


def open_store(name: str | Path) -> MemoryReader:
    """Open a store by path, or ``demo``; StoreError names the file and field that is wrong."""
    return MemoryReader(resolve_store(name))
