"""Which files a source is, and what tells it from another: names, sizes, times and samples of their bytes. Light: whoever
starts with a model that is in the cache loads no more than this.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from elmoe.errors import ConvertError

SMALL_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Files of a checkpoint that a store depends on, beside its shards."""
MOST_PARTS = 1000
HEAD, SAMPLE, SAMPLES = 64 << 10, 4 << 10, 16
"""Bytes of a file's begin that are looked at, and of samples spread over the rest. Archives give all their files one time,
so that names, sizes and times are not enough."""
Identity = dict[str, tuple[int, int, str]]
"""File -> size, time of change in nanoseconds, and digest of samples."""
_SPLIT_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def is_source(path: Path) -> bool:
    """Whether there is a GGUF file or a Hugging Face folder, as far as its name and begin tell."""
    try:
        if path.is_dir():
            return (path / "config.json").is_file() and not (path / "manifest.json").is_file()
        if path.suffix.lower() == ".gguf":
            return path.is_file()
        if not path.is_file():  # a pipe would never answer
            return False
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except (OSError, ValueError):
        return False


def part_paths(path: Path) -> list[Path]:
    """All files of a model in GGUF, given its only or its first one."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return [path]
    stem, number, count = match[1], int(match[2]), int(match[3])
    if number != 1 or not 0 < count <= MOST_PARTS:
        raise ConvertError(f"'{path.name}' is not the first part of a split file", "give the part ...-00001-of-...")
    return [path.with_name(f"{stem}-{index:05d}-of-{count:05d}.gguf") for index in range(1, count + 1)]


def source_files(path: Path) -> list[Path]:
    """The files of a source, whether they are there or not."""
    if not os.path.isdir(path):
        return part_paths(path)
    return [*(path / name for name in SMALL_FILES), *sorted(path.glob("*.safetensors"))]


def identity(path: Path) -> Identity:
    """Of a source; ConvertError where a file cannot be read. The folder is not part of it: a model that was moved is the
    same."""
    found: Identity = {}
    for file in source_files(path):
        if file.exists() and not file.is_file():
            raise ConvertError(f"'{file}' is not a regular file", "give a copy of it")
        try:
            with open(file, "rb") as handle:
                size, digest = handle.seek(0, 2), hashlib.blake2b(digest_size=8)
                for at in range(SAMPLES + 1):  # the first at the begin, the last at the end
                    handle.seek((size - SAMPLE) * at // SAMPLES if at and size > SAMPLE else 0)
                    digest.update(handle.read(SAMPLE if at else HEAD))
            found[printable(file.name)] = size, file.stat().st_mtime_ns, digest.hexdigest()
        except FileNotFoundError:
            if not path.is_dir():
                raise ConvertError(
                    f"'{file.name}' is missing in '{file.parent}'", "give a GGUF file; of a split one, all parts"
                ) from None
        except OSError as error:
            raise ConvertError(f"'{file}' cannot be read: {error.strerror}") from error
    return found


def printable(path: str) -> str:
    """A path as text that JSON can hold, whatever its bytes."""
    return os.fsencode(path).decode("utf-8", "replace")


def difference(before: Identity, after: Identity) -> str:
    """In words, what differs between two identities that do: the first file."""
    name = next(name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name))
    if name not in before:
        return f"'{name}' has come"
    if name not in after:
        return f"'{name}' has gone"
    (size, _, sample), (new_size, _, new_sample) = before[name], after[name]
    if size != new_size:
        return f"'{name}' had {size} bytes and has {new_size}"
    return f"'{name}' has another {'content' if sample != new_sample else 'time of change'}"
