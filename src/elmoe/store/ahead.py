"""What goes on beside a writer: the next piece is computed, and what was written is put on the disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

T = TypeVar("T")
STEP = 64 << 20
"""Bytes of a file that are put on the disk together."""


def ahead(calls: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What the calls return, in their order; while a result is used, the next call runs in another thread."""
    with ThreadPoolExecutor(1) as pool:
        pending: Future[T] | None = None
        for call in calls:
            result = None if pending is None else (pending.result(),)
            pending = pool.submit(call)
            if result is not None:
                yield result[0]
        if pending is not None:
            yield pending.result()


class WriteBack:
    """Puts the bytes of an open file on the disk while more are written, so that the end need not wait for all of them. A
    context manager; OSError of a write that failed is raised by it or by the next call."""

    def __init__(self, handle: int) -> None:
        self._handle, self._bytes, self._pool = handle, 0, ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def __enter__(self) -> WriteBack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if self._pending is not None and error is None:
            self._pending.result()

    def wrote(self, size: int) -> None:
        """So many bytes more were written."""
        self._bytes += size
        if self._bytes >= STEP and (self._pending is None or self._pending.done()):
            if self._pending is not None:
                self._pending.result()
            self._pending, self._bytes = self._pool.submit(os.fdatasync, self._handle), 0
