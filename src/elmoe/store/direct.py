"""Reading a store past the page cache: dense parts are loaded once, experts are read on demand by the engine's tier."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.expert import PAGE
from elmoe.errors import StoreError
from elmoe.store.format import DENSE_FILE, check_header
from elmoe.store.machine import private_memory
from elmoe.store.reader import MemoryReader, resolve_store

CHUNK = 8 << 20
"""Bytes of one read while dense parts are loaded."""


class DirectReader(MemoryReader):
    """A store whose experts stay on disk. ``buffered`` tells that the file system refused O_DIRECT, so that reads go through
    the page cache after all."""

    kind = "direct"

    def __init__(self, path: Path) -> None:
        self._handles: dict[str, int] = {}
        self.buffered = False
        try:
            super().__init__(path)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files; no read may be in flight."""
        super().close()
        while self._handles:
            os.close(self._handles.popitem()[1])

    def _open(self, name: str, size: int, role: int, layer: int) -> None:
        try:
            handle = os.open(self.path / name, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise StoreError(f"'{name}' cannot be opened: {error.strerror}") from error
            handle = os.open(self.path / name, os.O_RDONLY)
            self.buffered = True
        self._handles[name] = handle
        found = os.fstat(handle).st_size
        if found != size or size < PAGE:
            raise StoreError(f"'{name}' has {found} bytes, the manifest says {size}", "truncated: copy it anew")
        content = _read(handle, name, size if name == DENSE_FILE else PAGE)
        check_header(content[:PAGE].tobytes(), name, role, layer)
        self._sizes[name] = size
        if name == DENSE_FILE:
            self._maps[name] = content

    def extent(self, layer: int, expert: int) -> tuple[int, int]:
        """(file descriptor, offset) of an expert's MSB record; its LSB record lies behind it."""
        file = self._layers[layer].file
        if file not in self._handles:
            raise StoreError(f"the store '{self.path.name}' is closed", "keep the session open while it is used")
        return self._handles[file], self.expert_extent(layer, expert)[0]


def _read(handle: int, name: str, size: int) -> NDArray[np.uint8]:
    """The first ``size`` bytes of a file in page-aligned memory of its own."""
    memory = private_memory(size)
    view = memoryview(memory)
    done = 0
    while done < size:
        try:
            got = os.preadv(handle, [view[done : done + CHUNK]], done)
        except OSError as error:
            raise StoreError(f"'{name}' cannot be read: {error.strerror}") from error
        if got == 0:
            raise StoreError(f"'{name}' ends at byte {done} of {size}", "truncated: copy it anew")
        done += got
    return np.frombuffer(memory, np.uint8)


def open_direct(name: str | Path) -> DirectReader:
    """Open a store for direct reads; StoreError names the file and field that is wrong."""
    return DirectReader(resolve_store(name))
