"""The nested container on disk: format, writer, reader, checksums, synthetic stores. Knows nothing of tokens or policies."""

from elmoe.store.machine import available_memory
from elmoe.store.reader import MemoryReader, open_store, resolve_store
from elmoe.store.writer import StoreWriter

__all__ = ["MemoryReader", "StoreWriter", "available_memory", "open_store", "resolve_store"]
