"""``--memory``: everything the server takes within one amount, foreseen before the model is loaded.

The parts: the program (interpreter, libraries, tokenizer), buffers of passes, and the fast tier: dense weights, experts,
staging, KV cache. Where the whole store fits beside a KV cache it is mapped into memory; otherwise experts are read from
disk, and the fast tier gets what program and buffers leave.
"""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from elmoe.engine.cache_layout import layout_of
from elmoe.engine.options import EngineOptions
from elmoe.engine.tier import tier_sizes
from elmoe.errors import BudgetError, StoreError
from elmoe.measure.probe import disk_bandwidth
from elmoe.measure.speeds import Speeds, kept, measure, store_digest
from elmoe.models.spec import GroupedAttention, ModelSpec
from elmoe.opening import HEADROOM
from elmoe.policy.budget import FastTierSizes, prefill_chunk
from elmoe.server.metrics import resident
from elmoe.store import available_memory, open_store
from elmoe.store.reader import MemoryReader
from elmoe.units import format_bytes

SERVER_BYTES = 96 << 20
"""Bytes of requests, answers and connections, and of the process that renders chat templates."""
TOKENIZER_GROWTH = 16
"""Bytes in memory of a byte of tokenizer.json."""
DRAFTED_ROWS = 8
"""Rows beside the first that a verification has of a sequence, as far as buffers foresee."""
LEAST_POSITIONS = 4096
"""Positions of the KV cache that a server has at least, or its context."""
KV_SHARE = 0.25
"""Largest share of a fast tier that the KV cache may take beyond that, where experts are read."""
PROBE_BYTES = 64 << 20
"""Bytes that are read to measure a bandwidth."""
PROMPT = 1000
"""Tokens of the prompt whose time is forecast, where the context holds so many."""
DEMO_PROMPT = 256
"""Tokens of the prompt that is measured where nothing was kept, so that a start takes little time."""
BUFFERED_RATE = 1e9
"""Bytes per second that are expected of a file system that refuses direct reads."""


def _rounded(value: float) -> str:
    """Two digits: an estimate has no more."""
    return f"{float(f'{value:.2g}'):g}"


@dataclass(frozen=True)
class Times:
    """Seconds: of a token of one answer without drafts, computing and reading; of a prompt of ``prompt`` tokens likewise.
    ``why``: what they are made of."""

    decode: float
    decode_reads: float
    prompt: int
    prompt_seconds: float
    prompt_reads: float
    why: str

    def facts(self) -> dict[str, str]:
        """In words, for the log."""
        token, prompt = self.decode + self.decode_reads, self.prompt_seconds + self.prompt_reads
        read = ""
        if self.decode_reads:
            read = (
                f"; of a token {_rounded(1e3 * self.decode)} ms compute and {_rounded(1e3 * self.decode_reads)} ms read, of "
                f"the prompt {_rounded(self.prompt_seconds)} s and {_rounded(self.prompt_reads)} s"
            )
        return {
            "tokens_per_second": f"about {_rounded(1 / token)} of one answer without drafts",
            "first_token": f"after about {_rounded(prompt)} s behind a prompt of {self.prompt} tokens",
            "why": self.why + read,
        }


@dataclass(frozen=True)
class Forecast:
    """What will be in memory, bytes, and how long things will take. ``whole``: the store is mapped. ``resident_share``: of
    the bytes of experts that the fast tier holds."""

    memory: int
    program: int
    buffers: int
    dense: int
    kv: int
    staging: int
    experts: int
    whole: bool
    resident_share: float
    times: Times

    @property
    def fast(self) -> int:
        """Bytes of the fast tier."""
        return self.dense + self.kv + self.staging + self.experts

    def facts(self) -> dict[str, str]:
        """In words, for the log."""
        parts = {
            "memory": self.memory, "program": self.program, "buffers": self.buffers, "dense": self.dense,
            "kv_cache": self.kv, "staging": self.staging, "experts": self.experts,
        }  # fmt: skip
        facts = {name: format_bytes(value).replace(" ", "") for name, value in parts.items()}
        facts["experts_in_memory"] = f"{100 * self.resident_share:.0f}%"
        return facts | self.times.facts()


def buffer_bytes(spec: ModelSpec, options: EngineOptions, chunk: int) -> int:
    """Bytes of the largest pass: activations of a chunk beside decoding rows, and the logits of those."""
    width = max(layer.feed_forward.width for layer in spec.layers)
    attention = max(
        one.heads * (one.head_dim if isinstance(one, GroupedAttention) else one.cache_values)
        for one in (layer.attention for layer in spec.layers)
    )
    drawn = options.batch * (1 + (DRAFTED_ROWS if options.mode == "elastic" and spec.moe_layers else 0))
    row = 4 * (8 * spec.hidden + 4 * attention + 3 * max(1, spec.top_k) * width)
    return (chunk + drawn) * row + 3 * 4 * drawn * spec.vocabulary


def forecast(reader: MemoryReader, store_bytes: int, options: EngineOptions, memory: int | None) -> Forecast:
    """How ``memory`` bytes would be used; None is what is available, less ``HEADROOM``.

    :raises BudgetError: the model cannot be served within it; the hint says what would do.
    """
    spec = reader.spec
    given = memory if memory is not None else max(0, available_memory() - HEADROOM)
    sizes = tier_sizes(reader, reader.dense_bytes, 0, options.staging_experts)
    program = resident() + SERVER_BYTES + TOKENIZER_GROWTH * _tokenizer_bytes(reader.path)
    layout, chunk = layout_of(spec), options.prefill_chunk or _chunk(spec, reads=False)
    page = layout.page_bytes
    most_kv = options.batch * layout.pages(spec.max_positions, chunk) * page
    least_kv = layout.pages(min(LEAST_POSITIONS, spec.max_positions), chunk) * page
    buffers = buffer_bytes(spec, options, chunk)
    left = given - program - buffers
    if left - store_bytes >= least_kv:
        kv = min(most_kv, (left - store_bytes) // page * page)
        times = _times(reader, sizes, 1.0)
        return Forecast(given, program, buffers, sizes.dense, kv, 0, store_bytes - sizes.dense, True, 1.0, times)
    if not spec.moe_layers:
        why = f"a model without experts is in memory as a whole, {format_bytes(store_bytes + least_kv)} with its KV cache"
        raise _too_little(given, program + buffers + store_bytes + least_kv, why)
    chunk = options.prefill_chunk or _chunk(spec, reads=True)
    most_kv = options.batch * layout.pages(spec.max_positions, chunk) * page
    least_kv = layout.pages(min(LEAST_POSITIONS, spec.max_positions), chunk) * page
    buffers = buffer_bytes(spec, options, chunk)
    fast = given - program - buffers
    least = (sizes.fixed if options.mode == "plain" else sizes.minimum) + least_kv
    if fast < least:
        raise _too_little(
            given, program + buffers + least, f"its dense parts, KV cache and fewest experts take {format_bytes(least)}"
        )
    spare = min(fast - least, int(KV_SHARE * fast))
    kv = min(most_kv, (least_kv + spare) // page * page)
    experts = fast - sizes.fixed - kv
    share = min(1.0, experts / max(1, sizes.all_experts))
    times = _times(reader, sizes, share)
    return Forecast(given, program, buffers, sizes.dense, kv, sizes.staging, experts, False, share, times)


def _too_little(given: int, needed: int, why: str) -> BudgetError:
    told = f"{why}, and with the program itself {format_bytes(needed)} are needed"
    return BudgetError(
        f"{format_bytes(given)} of memory are too little for this model: {told}",
        f"give --memory {-(-needed >> 20)}MiB, lower --batch, or convert the model to a smaller --format",
    )


def planned(options: EngineOptions, parts: Forecast) -> EngineOptions:
    """The options that keep a forecast."""
    return replace(options, kv_memory=parts.kv, fast_memory=None if parts.whole else parts.fast)


def _chunk(spec: ModelSpec, reads: bool) -> int:
    layers = spec.moe_layers or spec.dense_layers
    widest = max(spec.layers[layer].feed_forward.width for layer in layers)
    return prefill_chunk(max(1, spec.top_k), widest, reads)


def _tokenizer_bytes(path: Path) -> int:
    try:
        return (path / "tokenizer.json").stat().st_size
    except OSError:
        return 0


def _times(reader: MemoryReader, sizes: FastTierSizes, share: float) -> Times:
    """What this machine's kept speeds foretell (see ``measure.speeds``), and what reading adds: misses are as if all experts
    were used alike; real routing repeats itself, so that fewer are read."""
    speeds = kept(reader.path) or _of_demo()
    decode, each = speeds.scaled(reader)
    same = speeds.store == store_digest(reader.path)
    why = f"measured on {'this store' if same else repr(speeds.name)}, {speeds.measured}"
    if not same:
        why += f", scaled: elmoe doctor --store {shlex.quote(str(reader.path))} measures this one"
    prompt = min(PROMPT, reader.spec.max_positions - 1)
    missed, disk = 1 - share, BUFFERED_RATE
    if missed:
        with suppress(StoreError):
            largest = max(reader.manifest.files, key=lambda file: file.bytes)
            disk = disk_bandwidth(reader.path / largest.name, PROBE_BYTES)
        why += f", {disk / 1e9:.2g} GB/s of disk"
    chunks = -(-prompt // _chunk(reader.spec, reads=True))
    token = sizes.top_k * (sum(sizes.msb) + sum(sizes.lsb))
    reads = missed * token / disk, chunks * missed * sizes.all_experts / disk
    return Times(decode, reads[0], prompt, prompt * each, reads[1], why)


def _of_demo() -> Speeds:
    """Speeds of the embedded model, measured at once: nothing was kept."""
    with open_store("demo") as reader:
        return measure(reader, repeats=1, longest=DEMO_PROMPT)
