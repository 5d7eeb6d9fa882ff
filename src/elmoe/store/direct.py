"""Reading a store past the page cache: dense parts are loaded once, experts are read on demand by the engine's tier."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np

from elmoe.bitslice.expert import PAGE
from elmoe.errors import StoreError
from elmoe.store.format import DENSE_FILE, check_header
from elmoe.store.machine import private_memory
from elmoe.store.reader import MemoryReader
from elmoe.store.resolve import resolve_store

CHUNK = 8 << 20
"""Most bytes of one read."""


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
        handle = self._handles[name] = self._opened(name)
        found = os.fstat(handle).st_size
        if found != size or size < PAGE:
            raise StoreError(f"'{name}' has {found} bytes, the manifest says {size}", "truncated: copy it anew")
        content = private_memory(size if name == DENSE_FILE else PAGE)
        _read(handle, name, memoryview(content), 0)
        self._shapes[name] = check_header(content[:PAGE], name, role, layer)
        self._sizes[name] = size
        if name == DENSE_FILE:
            self._maps[name] = np.frombuffer(content, np.uint8)

    def _opened(self, name: str) -> int:
        """A descriptor that reads past the page cache, or one that reads through it where the file system refuses that: some
        do so at the first read."""
        path = self.path / name
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
            try:
                os.preadv(handle, [private_memory(PAGE)], 0)
                return handle
            except BaseException:
                os.close(handle)
                raise
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise StoreError(f"'{name}' cannot be opened: {error.strerror}") from error
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"'{name}' cannot be opened: {error.strerror}") from error
        self.buffered = True
        return handle

    def read_expert(self, layer: int, expert: int, target: memoryview) -> None:
        """Fill page-aligned memory from an expert's records: MSB, then LSB; StoreError where that fails."""
        handle, offset = self.extent(layer, expert)
        _read(handle, self._layers[layer].file, target, offset)

    def extent(self, layer: int, expert: int) -> tuple[int, int]:
        """(file descriptor, offset) of an expert's MSB record; its LSB record lies behind it."""
        file = self._layers[layer].file
        if file not in self._handles:
            raise StoreError(f"the store '{self.path.name}' is closed", "keep it open while it is used")
        return self._handles[file], self.expert_extent(layer, expert)[0]


def _read(handle: int, name: str, target: memoryview, offset: int) -> None:
    """Fill page-aligned memory from ``offset`` of a file on."""
    done = 0
    while done < len(target):
        try:
            got = os.preadv(handle, [target[done : done + CHUNK]], offset + done)
        except OSError as error:
            raise StoreError(f"'{name}' cannot be read: {error.strerror}") from error
        if got == 0:
            raise StoreError(f"'{name}' ends at byte {offset + done} of {offset + len(target)}", "truncated: copy it anew")
        done += got


def open_direct(name: str | Path) -> DirectReader:
    """Open a store for direct reads; StoreError names the file and field that is wrong."""
    return DirectReader(resolve_store(name))
