"""Opening a store to serve from it: the backend, its threads, and the reader that fits. What ``elmoe.load`` begins with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from elmoe.bitslice import Backend
from elmoe.convert.cache import naming_mend, stored
from elmoe.engine.direct_tier import DirectTier
from elmoe.engine.options import EngineOptions
from elmoe.engine.tier import ExpertTier
from elmoe.errors import RequestError
from elmoe.processors import processors
from elmoe.store import available_memory, open_direct, open_store, read_manifest, resolve_store
from elmoe.store.direct import DirectReader
from elmoe.store.reader import MemoryReader
from elmoe.units import format_bytes

BackendName = Literal["native", "reference"]
Reader = Literal["auto", "memory", "direct"]
HEADROOM = 512 << 20
"""Bytes left to everything else when a budget is derived from the memory available."""
MOST_THREADS = 64
"""The largest thread pool of the kernels."""


def load_backend(name: BackendName) -> Backend:
    """``native`` kernels, or ``reference``: the NumPy definition (same bits, slow). KernelError without native kernels."""
    if name == "native":
        from elmoe import kernels

        return kernels
    from elmoe import bitslice

    return bitslice


def use_threads(backend: BackendName, threads: int | None = None) -> None:
    """Set the native kernels' thread count: by default all cores of this process, at most ``MOST_THREADS``."""
    if backend == "native":
        from elmoe import kernels

        kernels.set_threads(threads or min(MOST_THREADS, processors()))


@dataclass(frozen=True)
class Opened:
    """An open store. ``options``: with the budget that was derived from memory, if one was; ``note`` tells why this reader,
    ``tier`` what the fast tier is."""

    path: Path
    reader: MemoryReader | DirectReader
    options: EngineOptions
    note: str
    tier: str


def open_to_serve(
    store: str | Path, options: EngineOptions, backend: BackendName, wanted: Reader, store_dir: Path | None = None
) -> Opened:  # fmt: skip
    """Open a store with the reader that is ``wanted``; a GGUF file or a Hugging Face folder is converted into the cache
    ``store_dir`` before (see ``convert.cache``).

    ``memory`` maps the store, a budget is accounted only; ``direct`` enforces the budget and reads experts past the page
    cache; ``auto`` is direct for a budget in bytes, or for a store larger than the memory available, where no budget means
    what is available.
    """
    given = stored(store, store_dir)
    path = resolve_store(given)
    with naming_mend(store, given):
        return _open(path, options, backend, wanted)


def _open(path: Path, options: EngineOptions, backend: BackendName, wanted: Reader) -> Opened:
    store_bytes, available = sum(file.bytes for file in read_manifest(path).files), available_memory()
    kind = wanted if wanted != "auto" else _choose_reader(options, store_bytes, available)
    note = f"{kind} ({format_bytes(store_bytes)} store, {format_bytes(available)} of memory available)"
    if kind == "direct" and options.fast_memory is None and store_bytes > available - HEADROOM:
        options = replace(options, fast_memory=max(0, available - HEADROOM))
    if kind == "memory" and options.slow_bandwidth is not None:
        raise RequestError("the memory reader has no slow tier to throttle", "use --reader direct")
    reader = open_direct(path) if kind == "direct" else open_store(path)
    tier = DirectTier.label if kind == "direct" else ExpertTier.label
    if kind == "memory" and options.fast_memory is None:
        tier = "memory, no budget"
    if getattr(reader, "buffered", False):
        tier += " (through the page cache: this file system refuses O_DIRECT)"
    if options.slow_bandwidth is not None:
        tier += f", throttled to {options.slow_bandwidth / 1e9:g} GB/s"
    if kind == "memory" and backend == "native":
        from elmoe.engine.prefetch_distance import choose_prefetch_distance  # needs the native kernels

        choose_prefetch_distance(reader)
    return Opened(path, reader, options, note, tier)


def _choose_reader(options: EngineOptions, store_bytes: int, available: int) -> Reader:
    """``direct`` where a budget in bytes is to be kept, or memory does not hold the store."""
    return "direct" if isinstance(options.fast_memory, int) or store_bytes > available - HEADROOM else "memory"
