"""A store opened for text: reader, tokenizer, chat template and engine in one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from elmoe.bitslice import Backend
from elmoe.convert.cache import stored
from elmoe.engine.direct_tier import DirectTier
from elmoe.engine.engine import Engine
from elmoe.engine.observe import Timeline
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request, Result
from elmoe.engine.statistics import Statistics
from elmoe.engine.tier import ExpertTier
from elmoe.errors import RequestError
from elmoe.processors import processors
from elmoe.store import available_memory, open_direct, open_store, read_manifest, resolve_store
from elmoe.text import TextStream
from elmoe.tokenizer import encode
from elmoe.units import format_bytes

if TYPE_CHECKING:
    from elmoe.trace import TraceRecorder

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


class Session:
    """An open store that answers with text; a GGUF file or a Hugging Face folder is converted into the cache ``store_dir``
    before (see ``convert.cache``). A context manager.

    ``reader``: ``memory`` maps the store, a budget is accounted only; ``direct`` enforces the budget and reads experts past
    the page cache; ``auto`` is direct for a budget in bytes, or for a store larger than the memory available, where no
    budget means what is available. ``reader_note`` tells the choice.
    """

    def __init__(
        self,
        store: str | Path,
        options: EngineOptions | None = None,
        backend: BackendName = "native",
        reader: Reader = "auto",
        store_dir: Path | None = None,
    ) -> None:
        self.backend, options = load_backend(backend), options or EngineOptions()
        self.path = resolve_store(stored(store, store_dir))
        store_bytes, available = sum(file.bytes for file in read_manifest(self.path).files), available_memory()
        kind = reader if reader != "auto" else _choose_reader(options, store_bytes, available)
        self.reader_note = (
            f"reader: {kind} ({format_bytes(store_bytes)} store, {format_bytes(available)} of memory available)"
        )
        if kind == "direct" and options.fast_memory is None and store_bytes > available - HEADROOM:
            options = replace(options, fast_memory=max(0, available - HEADROOM))
        if kind == "memory" and options.slow_bandwidth is not None:
            raise RequestError("the memory reader has no slow tier to throttle", "use --reader direct")
        self.reader = open_direct(self.path) if kind == "direct" else open_store(self.path)
        self.tier = DirectTier.label if kind == "direct" else ExpertTier.label
        if kind == "memory" and options.fast_memory is None:
            self.tier = "memory, no budget"
        if getattr(self.reader, "buffered", False):
            self.tier += " (through the page cache: this file system refuses O_DIRECT)"
        if options.slow_bandwidth is not None:
            self.tier += f", throttled to {options.slow_bandwidth / 1e9:g} GB/s"
        self.tokenizer = self.reader.tokenizer()
        if kind == "memory" and backend == "native":
            from elmoe.engine.prefetch_distance import choose_prefetch_distance  # needs the native kernels

            choose_prefetch_distance(self.reader)
        self.engine = Engine(self.reader, self.backend, options, text=self.text_stream)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.reader.close()

    def with_options(self, options: EngineOptions) -> Session:
        """Continue with other options on the same open store."""
        self.engine = Engine(self.reader, self.backend, options, text=self.text_stream)
        return self

    def encode(self, text: str, rendered: bool = False) -> tuple[int, ...]:
        """Text to token ids; RequestError if there is none. ``rendered``: a chat that holds its own special tokens."""
        return encode(self.tokenizer, text, special_tokens=not rendered)

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Token ids to text, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None, **variables: Any
    ) -> str:
        """Apply the store's chat template, in a process with limits; RequestError if it has none, or it fails. Encode the
        text as ``rendered``: it has its own special tokens."""
        from elmoe.chat import render  # here, because loading it delays a first token that needs no template

        template = self.reader.chat_template()
        if template is None:
            raise RequestError(f"'{self.path.name}' has no chat template", "give a plain prompt")
        return render(template, messages, self.reader.special_tokens, tools, **variables)

    def text_stream(self, prompt: tuple[int, ...], stop: tuple[str, ...]) -> TextStream:
        """The text of a sequence behind a prompt, as its tokens come."""
        return TextStream(lambda ids: self.decode(list(ids)), prompt, stop)

    def text_of(self, request: Request, result: Result) -> str:
        """The generated text, cut before the stop string that ended it."""
        stream = self.text_stream(request.prompt, request.stop)
        for token in result.shown(request):
            stream.push(token)
        return stream.take(last=True)

    def generate(
        self, requests: list[Request], recorder: TraceRecorder | None = None, timeline: Timeline | None = None
    ) -> tuple[list[Result], Statistics]:
        """Serve requests as ``Engine.generate`` does."""
        return self.engine.generate(requests, recorder, timeline)


def _choose_reader(options: EngineOptions, store_bytes: int, available: int) -> Reader:
    """``direct`` where a budget in bytes is to be kept, or memory does not hold the store."""
    return "direct" if isinstance(options.fast_memory, int) or store_bytes > available - HEADROOM else "memory"
