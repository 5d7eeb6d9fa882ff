"""A Hugging Face folder: config, shards, tokenizer, each checked before it is used."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.chat import choose_template, special_tokens_of, templates_of
from elmoe.convert.file_reading import SourceFile, read_json
from elmoe.convert.identity import SMALL_FILES
from elmoe.errors import ConvertError
from elmoe.models import family_of
from elmoe.tokenizer import TOKENIZER_LIMIT
from elmoe.untrusted import load_object, read_bytes, short

HEADER_LIMIT = 100 << 20
"""Bytes of the largest safetensors header that is read (the format's own limit)."""
MOST_DIMENSIONS = 8
ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1}
BYTES = "U8"
"""The type of packed codes, which are read as they are."""
SCALE_SUFFIX = "_scale_inv"
"""Behind the name of an FP8 tensor: its float32 or BF16 scales, one for each block of the config's ``weight_block_size``."""


def _e4m3() -> NDArray[np.float32]:
    """Values of the 256 codes of F8_E4M3: 1 sign, 4 exponent and 3 mantissa bits, no infinities, two NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    magnitude = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8 + mantissa, exponent - 10))
    magnitude[code & 127 == 127] = np.nan
    return np.where(code & 128, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3()


class Shard:
    """One safetensors file; offsets are checked against shapes and the file's size.

    The ``safetensors`` package cannot hand out bf16 rows to NumPy, and its format is a length, a JSON header and raw data.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._file = file = SourceFile(path, "complete the download")
        length = int.from_bytes(file.read(0, 8).tobytes(), "little") if file.size >= 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, file.size - 8):
            raise ConvertError(f"shard '{self.name}' is no safetensors file", "complete the download")
        try:
            header = load_object(file.read(8, length).tobytes(), self.name, ConvertError)
        except ConvertError as error:
            raise ConvertError(f"shard '{self.name}' has a damaged header: {error}", "download it anew") from error
        header.pop("__metadata__", None)
        self._entries = {name: _entry(entry, name, self.name) for name, entry in header.items()}
        spans = sorted((begin, end, name) for name, (_, _, begin, end) in self._entries.items() if begin < end)
        for (_, end, one), (begin, _, other) in pairwise(spans):
            if begin < end:
                raise ConvertError(f"tensors '{one}' and '{other}' overlap in '{self.name}'", "the file is damaged")
        self._start, self._end = 8 + length, file.size

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def names(self) -> set[str]:
        """Names of the tensors."""
        return set(self._entries)

    def dtype(self, name: str) -> str:
        """Type of a tensor's values."""
        return self._entries[name][0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, after all its header fields were checked."""
        dtype, shape, begin, end = self._entries[name]
        if dtype not in ITEM_BYTES:
            raise ConvertError(f"tensor '{name}' has dtype {short(dtype, 40)}", f"supported are {', '.join(ITEM_BYTES)}")
        count = math.prod(shape)
        if end - begin != count * ITEM_BYTES[dtype] or self._start + end > self._end:
            raise ConvertError(f"tensor '{name}' in '{self.name}' lies outside its file", "complete the download")
        return shape

    def byte_shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor of bytes, after all its header fields were checked."""
        dtype, shape, begin, end = self._entries[name]
        if dtype != BYTES:
            raise ConvertError(f"tensor '{name}' has dtype {short(dtype, 40)}", f"expected {BYTES}")
        if end - begin != math.prod(shape) or self._start + end > self._end:
            raise ConvertError(f"tensor '{name}' in '{self.name}' lies outside its file", "complete the download")
        return shape

    def raw(self, name: str, first: int) -> NDArray[np.uint8]:
        """Row ``first`` along the first axis of a tensor of bytes."""
        shape, size = self.byte_shape(name), math.prod(self.byte_shape(name)[1:])
        start = self._start + self._entries[name][2] + first * size
        return self._file.read(start, size).reshape(shape[1:])

    def rows(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Rows [first, last) along the first axis, as float32; those of FP8 without their scales."""
        shape = self.shape(name)
        dtype, _, begin, _ = self._entries[name]
        last = shape[0] if last is None else last
        per_row = ITEM_BYTES[dtype] * int(np.prod(shape[1:], dtype=np.int64))
        start = self._start + begin + first * per_row
        raw = self._file.read(start, (last - first) * per_row)
        if dtype == "BF16":
            values = (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
        elif dtype == "F8_E4M3":
            values = E4M3[raw]
        else:
            values = raw.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)
        return values.reshape(last - first, *shape[1:])


def _entry(entry: Any, name: str, file: str) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of a tensor in the header of a file."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        sound = isinstance(dtype, str) and len(shape) <= MOST_DIMENSIONS
        sound = sound and all(type(value) is int and 0 <= value < 1 << 63 for value in numbers)
    except (ValueError, TypeError, KeyError):
        sound = False
    if not sound:
        raise ConvertError(f"tensor '{short(name)}' in '{file}' has a damaged shape or offsets", "download it anew")
    return dtype, tuple(shape), begin, end


def _fp8_block(quantization: Any) -> tuple[int, int] | None:
    """Sides of the blocks of FP8 weights that share a scale; None where nothing is quantised, ConvertError for all else."""
    if quantization is None:
        return None
    if isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4":
        return None  # of experts, whose tensors say so by their names
    block: Any = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    sound = isinstance(block, list) and len(block) == 2 and all(type(side) is int and 0 < side <= 1 << 20 for side in block)
    if not sound or quantization.get("quant_method") != "fp8":
        raise ConvertError(
            f"config.json: this 'quantization_config' is not supported: {short(quantization)}",
            "supported: 'mxfp4', 'fp8' with a weight_block_size; or give the checkpoint in BF16 or FP16",
        )
    return block[0], block[1]


class Checkpoint:
    """A folder with one or many shards."""

    def __init__(self, folder: Path) -> None:
        if not os.path.isdir(folder):
            raise ConvertError(f"there is no folder '{short(folder)}'", "give a Hugging Face folder with config.json")
        self.folder = folder
        self.config: dict[str, Any] = read_json(folder / "config.json")
        family_of(self.config)  # told first: weights may be downloaded later
        self._block = _fp8_block(self.config.get("quantization_config"))
        if os.path.exists(folder / "model.safetensors.index.json"):
            index = read_json(folder / "model.safetensors.index.json").get("weight_map")
            if not isinstance(index, dict) or not index or not all(isinstance(name, str) for name in index.values()):
                raise ConvertError("'model.safetensors.index.json' has no weight_map", "download it anew")
            names = sorted(set(index.values()))
            for name in names:
                if Path(name).name != name or name in ("", ".."):
                    told = f"'model.safetensors.index.json' names '{short(name)}' outside the folder"
                    raise ConvertError(told, "download it anew")
        else:
            index, names = None, ["model.safetensors"]
            if not os.path.exists(folder / names[0]) and os.path.exists(folder / "pytorch_model.bin"):
                raise ConvertError(
                    f"'{short(folder.name)}' has its weights in pytorch_model.bin, which may run code when it is read",
                    "take the model's safetensors, or write them with transformers: save_pretrained",
                )
        self.shards = [Shard(folder / name) for name in names]
        by_name = {shard.name: shard for shard in self.shards}
        if index is None:
            index = dict.fromkeys(self.shards[0].names(), "model.safetensors")
        self._shard_of = {tensor: by_name[file] for tensor, file in index.items()}
        """The shard of each tensor, as the index has it: transformers reads no tensor that the index does not name."""

    def fingerprint(self) -> str:
        """What tells one source from another: config, and names, sizes and times of the files."""
        files = [self.folder / name for name in (*SMALL_FILES, *(shard.name for shard in self.shards))]
        try:
            stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists()]
        except OSError as error:
            raise ConvertError(f"'{self.folder}' cannot be read: {error.strerror}") from error
        return json.dumps([self.config, stats], sort_keys=True)

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def _shard(self, name: str) -> Shard:
        shard = self._shard_of.get(name)
        if shard is None:
            raise ConvertError(f"tensor '{name}' is missing", "the checkpoint is incomplete, or of another architecture")
        if name not in shard:
            raise ConvertError(f"tensor '{name}' is not in '{shard.name}', where the index has it", "complete the download")
        return shard

    def dtype(self, name: str) -> str:
        """Type of a tensor's values."""
        return self._shard(name).dtype(name)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """ConvertError unless a tensor exists with this shape."""
        found = self._shard(name).shape(name)
        if found != shape:
            raise ConvertError(f"tensor '{name}' has shape {list(found)}, the config says {list(shape)}")
        if self.dtype(name) == "F8_E4M3":
            self._check_scales(name, shape)

    def check_bytes(self, name: str, shape: tuple[int, ...]) -> None:
        """ConvertError unless a tensor of bytes exists with this shape."""
        found = self._shard(name).byte_shape(name)
        if found != shape:
            raise ConvertError(f"tensor '{name}' has shape {list(found)}, the config says {list(shape)}")

    def raw(self, name: str, first: int) -> NDArray[np.uint8]:
        """Row ``first`` along the first axis of a tensor of bytes."""
        return self._shard(name).raw(name, first)

    def _check_scales(self, name: str, shape: tuple[int, ...]) -> None:
        if self._block is None or len(shape) != 2:
            raise ConvertError(
                f"tensor '{name}' is FP8, and the config gives no weight_block_size for it",
                "supported: matrices of FP8 with block scales (quant_method 'fp8')",
            )
        scales = name + SCALE_SUFFIX
        blocks = tuple(-(-side // block) for side, block in zip(shape, self._block, strict=True))
        if self._shard(scales).shape(scales) != blocks or self.dtype(scales) not in ("F32", "BF16"):
            raise ConvertError(f"tensor '{scales}' is not of shape {list(blocks)}, float32 or BF16", "download it anew")

    def scale_names(self, names: set[str]) -> set[str]:
        """Names of the scales of those tensors that are FP8."""
        return {name + SCALE_SUFFIX for name in names if self.dtype(name) == "F8_E4M3"}

    def _values(self, name: str, first: int, last: int) -> NDArray[np.float32]:
        """Rows [first, last) of a tensor, scaled."""
        values = self._shard(name).rows(name, first, last)
        if self.dtype(name) != "F8_E4M3" or self._block is None:
            return values
        height, width = self._block
        scales = self._shard(name + SCALE_SUFFIX).rows(name + SCALE_SUFFIX, first // height, -(-last // height))
        rows = np.arange(first, last) // height - first // height
        return values * np.repeat(scales, width, axis=1)[rows, : values.shape[1]]

    def rows(self, names: list[str], first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        """Rows [first, last) of tensors laid one below the other, as float32."""
        parts, before = [], 0
        for name in names:
            shard = self._shard(name)
            count = shard.shape(name)[0]
            low, high = max(first - before, 0), count if last is None else min(last - before, count)
            if low < high:
                parts.append(self._values(name, low, high))
            before += count
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def tokenizer(self) -> bytes:
        """The tokenizer's file."""
        file = self.folder / "tokenizer.json"
        if not os.path.isfile(file):
            raise ConvertError(
                f"'tokenizer.json' is missing in '{self.folder}'", "save it with AutoTokenizer.save_pretrained(folder)"
            )
        return read_bytes(file, ConvertError, TOKENIZER_LIMIT, "tokenizer")

    def chat_template(self) -> str | None:
        """The chat template, from wherever checkpoints keep it."""
        return choose_template(templates_of(self.folder))

    def special_tokens(self) -> dict[str, str]:
        """Texts of special tokens by the variables that chat templates know them by."""
        file = self.folder / "tokenizer_config.json"
        return special_tokens_of(read_json(file)) if os.path.isfile(file) else {}
