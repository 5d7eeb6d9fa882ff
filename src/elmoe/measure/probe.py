"""Measurements of this machine: read bandwidth of memory and of a disk."""

from __future__ import annotations

import os
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np

from elmoe.errors import StoreError
from elmoe.store import private_memory

DISK_BLOCK = 4 << 20
"""Bytes per direct read: large enough to saturate an NVMe disk with one reader."""


def memory_bandwidth(size: int, threads: int, repeats: int = 5) -> float:
    """Median bytes per second of reading ``size`` bytes of memory with ``threads`` kernel threads."""
    from elmoe import kernels

    before = kernels.threads()
    kernels.set_threads(threads)
    try:
        data = np.ones(size, np.uint8)  # written, so that every page is present
        kernels.stream_read(data)
        rates = []
        for _ in range(repeats):
            began = perf_counter()
            kernels.stream_read(data)
            rates.append(size / (perf_counter() - began))
        return median(rates)
    finally:
        kernels.set_threads(before)


def disk_bandwidth(path: Path, limit: int = 512 << 20) -> float:
    """Bytes per second of reading the start of a file past the page cache (O_DIRECT), up to ``limit`` bytes.

    :raises StoreError: the file cannot be read that way (some file systems refuse O_DIRECT).
    """
    buffer = private_memory(DISK_BLOCK)
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        raise StoreError(f"'{path.name}' cannot be read directly: {error.strerror}") from error
    try:
        done, began = 0, perf_counter()
        while done < limit:
            read = os.preadv(handle, [buffer], done)
            if read == 0:
                break
            done += read
            if read < DISK_BLOCK:
                break
        return done / (perf_counter() - began)
    finally:
        os.close(handle)
        buffer.close()
