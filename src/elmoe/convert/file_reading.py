"""Bytes of a source file, read and not mapped: a mapped file that shrinks during a conversion would end the process."""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmoe.errors import ConvertError
from elmoe.untrusted import load_object, read_bytes

JSON_LIMIT = 64 << 20
"""Largest JSON file of a checkpoint, bytes: the index of a model with many tensors."""


class SourceFile:
    """A file to convert from. ``size``: its bytes when it was looked at first. ConvertError where it cannot be read.

    :param missing: what to do about a file that is not there.
    """

    def __init__(self, path: Path, missing: str) -> None:
        self.name, self._path, self._missing = path.name, path, missing
        with self._opened() as handle:
            self.size = os.fstat(handle.fileno()).st_size

    def _opened(self) -> FileIO:
        try:
            return open(self._path, "rb", buffering=0)
        except FileNotFoundError:
            raise ConvertError(f"'{self.name}' is missing in '{self._path.parent}'", self._missing) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConvertError(f"'{self.name}' cannot be opened: {reason}") from error

    def read(self, start: int, size: int) -> NDArray[np.uint8]:
        """Bytes [start, start + size), which lie within the size at first."""
        data = np.empty(size, np.uint8)
        view, done = data.data, 0
        with self._opened() as handle:
            while done < size:
                try:
                    got = os.preadv(handle.fileno(), [view[done:]], start + done)
                except OSError as error:
                    raise ConvertError(f"'{self.name}' cannot be read: {error.strerror}") from error
                if got == 0:
                    raise ConvertError(
                        f"'{self.name}' ends at byte {start + done}, it had {self.size} bytes before",
                        "leave the source as it is during a conversion",
                    )
                done += got
        return data


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file of a checkpoint; ConvertError names the file."""
    if not os.path.exists(path):
        raise ConvertError(f"'{path.name}' is missing in '{path.parent}'", "give a complete Hugging Face folder")
    raw = read_bytes(path, ConvertError, JSON_LIMIT, "file of a checkpoint")
    return load_object(raw, path.name, ConvertError, "download it anew", repeated_keys=True)
