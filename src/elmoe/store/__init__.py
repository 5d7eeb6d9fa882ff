"""The nested container on disk: format, writer, reader, checksums, synthetic stores. Knows nothing of tokens or policies."""

from elmoe.store.direct import DirectReader, open_direct
from elmoe.store.machine import available_memory, peak_memory, private_memory
from elmoe.store.reader import MemoryReader, open_store, read_manifest
from elmoe.store.resolve import resolve_store
from elmoe.store.writer import StoreWriter

__all__ = [
    "DirectReader",
    "MemoryReader",
    "StoreWriter",
    "available_memory",
    "open_direct",
    "open_store",
    "peak_memory",
    "private_memory",
    "read_manifest",
    "resolve_store",
]
