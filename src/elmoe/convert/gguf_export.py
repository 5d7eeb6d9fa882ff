"""Store -> GGUF: codes and scales as they are, norms and routers as float32, tensor by tensor."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import GGUFWriter
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix, StackedMatrix
from elmoe.convert.gguf_tokenizer import ALL_EOS_KEY, SPECIAL_TOKENS_KEY, GgufTokenizer, describe, idle_merge
from elmoe.convert.gguf_writing import FILE_TYPES, tensor_bytes, type_of, write_blocks
from elmoe.convert.head_rows import rows_of_halves
from elmoe.errors import ConvertError, ModelError
from elmoe.files import whole_file
from elmoe.models import FAMILIES
from elmoe.models.family import GgufFamily
from elmoe.models.formats import split_formats
from elmoe.models.gguf import gguf_shape, metadata_of_spec
from elmoe.models.gguf_rope import FACTORS, factors_of
from elmoe.models.spec import GroupedAttention, ModelSpec, Rope
from elmoe.models.tensors import PROJECTIONS, feed_forwards, tensors
from elmoe.store import MemoryReader
from elmoe.store.writer import ROW_BLOCK
from elmoe.units import format_bytes

Rows = Callable[[], Iterator[NDArray]]
"""A tensor's rows, part by part."""


def export_store(
    reader: MemoryReader, path: str | Path, progress: Callable[[int, int], None] | None = None, replace: bool = False
) -> None:
    """Write an open store as one GGUF file of llama.cpp's architecture for its family, under a temporary name until it is
    whole. Peak memory is that of the largest tensor.

    :param progress: takes (bytes of tensors written, all). :param replace: a file that exists.
    :raises ConvertError: the file exists and is not to be replaced, the model or its tokenizer cannot be said in GGUF, or
        the disk has no room.
    """
    path, spec = Path(path), reader.spec
    if os.path.exists(path) and not replace:
        raise ConvertError(f"'{path}' exists already", "remove it or choose another name")
    gguf = FAMILIES[spec.family].gguf
    if gguf is None:
        raise ConvertError(f"models of the family {spec.family} cannot be written as GGUF yet")
    try:
        metadata = metadata_of_spec(spec, gguf)
        factors_of(rope_of(spec))
    except ModelError as error:
        raise ConvertError(str(error), error.hint) from error
    tokenizer_json = reader.tokenizer_path.read_bytes()
    tokenizer = describe(tokenizer_json, spec.vocabulary)
    tensors = list(_tensors(reader, gguf))
    total = sum(tensor_bytes(name, shape, kind) for name, shape, kind, _ in tensors)
    with whole_file(path, ConvertError, "choose another place, or free some disk", sync=True, folders=True) as partial_path:
        _check_room(path, total + len(tokenizer_json) * 4)
        writer = GGUFWriter(partial_path, gguf.architecture)
        try:
            for key, value in metadata.items():
                if isinstance(value, (str, bool)):
                    writer.add_string(key, value) if isinstance(value, str) else writer.add_bool(key, value)
                else:
                    writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, int(value))
            layer = min(spec.moe_layers, default=0)
            writer.add_file_type(FILE_TYPES[type_of(reader.expert_layout(layer).formats[0])])
            _add_texts(writer, spec, tokenizer, tokenizer_json)
            if (template := reader.chat_template()) is not None:
                writer.add_chat_template(template)
            writer.add_string(SPECIAL_TOKENS_KEY, json.dumps(reader.special_tokens))
            for name, shape, kind, _ in tensors:
                # The writer takes the shape in elements where the type is not said to be bytes.
                writer.add_tensor_info(name, shape, np.dtype(np.float32), tensor_bytes(name, shape, kind), kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            done = 0
            for name, shape, kind, rows in tensors:
                data = np.empty(tensor_bytes(name, shape, kind), np.uint8)
                end = 0
                for part in rows():
                    flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
                    data[end : end + flat.size] = flat
                    end += flat.size
                assert end == data.size, name
                writer.write_tensor_data(data)
                done += end
                if progress is not None:
                    progress(done, total)
        finally:
            writer.close()


def _tensors(reader: MemoryReader, gguf: GgufFamily) -> Iterator[tuple[str, tuple[int, ...], TensorType, Rows]]:
    """(name, shape outermost first, type, rows) of every tensor, in the order they are written."""
    for tensor in tensors(reader.spec):
        before, formats = 0, [] if tensor.kind == "floats" else split_formats(reader.formats[tensor.name], len(tensor.parts))
        for index, part in enumerate(tensor.parts):
            name, last = gguf.names[part.role].format(layer=tensor.layer), before + part.shape[0]
            if tensor.kind == "floats":
                kind, rows = TensorType.F32, partial(_plain, reader, tensor.name, before, last)
            else:
                kind = type_of(formats[index])
                rows = partial(_matrix_rows, reader, tensor.name, index, before, last, name)
            attention = None if tensor.layer is None else reader.spec.layers[tensor.layer].attention
            if part.role in gguf.neighbours and isinstance(attention, GroupedAttention):
                rows = partial(_neighbours, rows, attention.head_dim)
            yield name, gguf_shape(part), kind, rows
            before = last
    factors = factors_of(rope_of(reader.spec))
    if factors is not None:
        values = np.array(factors, np.float32)
        yield FACTORS, values.shape, TensorType.F32, lambda: iter([values])
    for one in feed_forwards(reader.spec):
        layer, shared = one.layer, one.kind == "shared"
        for projection, format in zip(PROJECTIONS, reader.expert_layout(layer, shared).formats, strict=True):
            part = one.part(projection)
            shape = (one.count, *part.shape) if one.kind == "expert" else part.shape
            name = gguf.names[part.role].format(layer=layer)
            yield name, shape, type_of(format), partial(_expert_rows, reader, layer, shared, projection, name)


def rope_of(spec: ModelSpec) -> Rope | None:
    """The rotary embedding of a model, one for all layers."""
    return spec.layers[0].attention.rope


def _plain(reader: MemoryReader, name: str, first: int, last: int) -> Iterator[NDArray]:
    yield reader.array(name)[first:last]


def _matrix_rows(reader: MemoryReader, ours: str, part: int, first: int, last: int, name: str) -> Iterator[NDArray]:
    matrix = reader.matrix(ours)
    if isinstance(matrix, StackedMatrix):
        yield from _part_rows(matrix.parts[part], 0, last - first, name)
    else:
        yield from _part_rows(matrix, first, last, name)


def _neighbours(rows: Rows, head_dim: int) -> Iterator[NDArray]:
    """The rows of a whole tensor, those of a rotated pair side by side."""
    whole = np.concatenate(list(rows()))
    yield whole[rows_of_halves(np.arange(len(whole)), head_dim)]


def _expert_rows(reader: MemoryReader, layer: int, shared: bool, projection: str, name: str) -> Iterator[NDArray]:
    layout = reader.expert_layout(layer, shared)
    for records in reader.expert_records(layer, shared):
        matrix = layout.unpack(*records)[projection]
        yield from _part_rows(matrix, 0, matrix.rows, name)


def _part_rows(matrix: QuantizedMatrix, first: int, last: int, name: str) -> Iterator[NDArray[np.uint8]]:
    """Blocks of rows [first, last), ``ROW_BLOCK`` at a time."""
    for start in range(first - first % 16, last, ROW_BLOCK):
        blocks = write_blocks(matrix, start, min(start + ROW_BLOCK, last), name)
        yield blocks[max(first - start, 0) :]


def _add_texts(writer: GGUFWriter, spec: ModelSpec, tokenizer: GgufTokenizer, tokenizer_json: bytes) -> None:
    """The tokenizer and the ids that end a generation."""
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.types)
    writer.add_token_merges(tokenizer.merges or [idle_merge(tokenizer.tokens)])
    writer.add_string("tokenizer.huggingface.json", tokenizer_json.decode())
    writer.add_add_bos_token(tokenizer.add_bos is not None)
    if tokenizer.add_bos is not None:
        writer.add_bos_token_id(tokenizer.add_bos)
    for index, add in zip(spec.eos_tokens, (writer.add_eos_token_id, writer.add_eot_token_id), strict=False):
        add(index)
    if spec.eos_tokens:
        writer.add_array(ALL_EOS_KEY, list(spec.eos_tokens))
    else:
        writer.add_string(ALL_EOS_KEY, "none")  # the writer leaves out empty lists


def _check_room(path: Path, needed: int) -> None:
    """ConvertError unless the disk of ``path`` has ``needed`` bytes free."""
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise ConvertError(
            f"'{path}' needs {format_bytes(needed)} of disk, {format_bytes(free)} are free",
            "free some disk or choose another place",
        )
