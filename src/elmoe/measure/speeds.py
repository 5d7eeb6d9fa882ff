"""How fast this machine serves a store that lies in memory, measured once and kept: what forecasts of the server are of."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import msgspec
import numpy as np

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.convert.cache import default_folder
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import RequestError
from elmoe.files import write_whole
from elmoe.models.tensors import macs_per_token
from elmoe.store.format import MANIFEST
from elmoe.store.reader import MemoryReader
from elmoe.untrusted import decode_json, read_bytes

PROMPT, TOKENS, REPEATS = 1000, 32, 3
"""Tokens of the prompt and of the answer that are timed (fewer where the context is shorter), and how often."""
MOST_KEPT, LARGEST_FILE = 32, 1 << 20
"""Stores whose speeds are kept, the last ones measured, and bytes of their file."""


class Speeds(msgspec.Struct, frozen=True):
    """Of one store on one machine. ``store``: a digest of its manifest, ``name``: its folder. ``machine``: processor,
    kernels and threads. ``decode_seconds``: of a token of one sequence, plain, ``prompt_seconds``: of a token of a prompt;
    nothing is read from disk. ``decode_macs``, ``prompt_macs``, ``bytes``: what such a token computes and touches."""

    store: str
    name: str
    machine: str
    measured: str
    decode_seconds: float
    prompt_seconds: float
    decode_macs: float
    prompt_macs: float
    bytes: int

    def __post_init__(self) -> None:
        numbers = (self.decode_seconds, self.prompt_seconds, self.decode_macs, self.prompt_macs, self.bytes)
        if not min(numbers) > 0:
            raise ValueError("a speed is not above 0")

    def scaled(self, reader: MemoryReader) -> tuple[float, float]:
        """``decode_seconds`` and ``prompt_seconds`` of another store: by what its tokens compute or touch, whichever is
        more."""
        decode = max(macs_per_token(reader.spec) / self.decode_macs, touched_bytes(reader) / self.bytes)
        return self.decode_seconds * decode, self.prompt_seconds * (prompt_macs(reader) / self.prompt_macs)


def kept_file() -> Path:
    """``$XDG_CACHE_HOME/elmoe/speeds.json``."""
    return default_folder().with_name("speeds.json")


def this_machine() -> str:
    """What speeds depend on beside the store."""
    model = "unknown processor"
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return f"{model}, {kernels.variant()}, {kernels.threads()} threads"


def store_digest(path: Path) -> str:
    """A store as kept speeds name it."""
    return hashlib.blake2b((path / MANIFEST).read_bytes(), digest_size=8).hexdigest()


def prompt_macs(reader: MemoryReader) -> float:
    """Multiply-accumulates of a token of a prompt: without the head, which is computed for the last one only."""
    return macs_per_token(reader.spec) - reader.spec.hidden * reader.spec.vocabulary


def touched_bytes(reader: MemoryReader) -> int:
    """Bytes of weights that a decoded token reads: everything dense, and its experts."""
    spec = reader.spec
    layouts = [reader.expert_layout(layer) for layer in spec.moe_layers]
    return reader.dense_bytes + spec.top_k * sum(layout.msb_bytes + layout.lsb_bytes for layout in layouts)


def measure(reader: MemoryReader, repeats: int = REPEATS, longest: int = PROMPT) -> Speeds:
    """Measure a store that memory holds, with the threads of the kernels as they are: a second for the demo model, minutes
    for a large one. A longer prompt tells more of attention."""
    spec = reader.spec
    prompt = np.random.default_rng(0).integers(0, spec.vocabulary, min(longest, spec.max_positions // 2)).tolist()
    engine = Engine(reader, kernels, EngineOptions("plain", batch=1))
    request = Request(tuple(prompt), min(TOKENS, spec.max_positions // 4), SamplingParameters(), ignore_eos=True)
    engine.generate([request])
    runs = [engine.generate([request])[1].phases for _ in range(repeats)]
    return Speeds(
        store_digest(reader.path), reader.path.name, this_machine(), datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        median(run["plain"].seconds / run["plain"].steps for run in runs),
        median(run["prefill"].seconds for run in runs) / len(prompt),
        macs_per_token(spec), prompt_macs(reader), touched_bytes(reader),
    )  # fmt: skip


def keep(speeds: Speeds) -> None:
    """Keep speeds for later programs, in place of older ones of the same store and machine."""
    same = (speeds.store, speeds.machine)
    others = [one for one in _kept() if (one.store, one.machine) != same]
    content = msgspec.json.format(msgspec.json.encode([*others, speeds][-MOST_KEPT:]), indent=1)
    write_whole(kept_file(), content, RequestError)


def kept(path: Path) -> Speeds | None:
    """What was kept of a store on this machine; else of the store measured last; None where there is nothing."""
    own = [one for one in _kept() if one.machine == this_machine()]
    digest = store_digest(path)
    return next((one for one in own if one.store == digest), own[-1] if own else None)


def _kept() -> list[Speeds]:
    """All of them; a file that is missing, or that is none, holds nothing."""
    if not os.path.isfile(kept_file()):
        return []
    with suppress(RequestError):
        raw = read_bytes(kept_file(), RequestError, LARGEST_FILE, "file of speeds")
        return decode_json(raw, str(kept_file()), list[Speeds], RequestError, "no list of speeds")
    return []
