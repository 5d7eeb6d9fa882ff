"""A store opened for text: reader, tokenizer, chat template and engine in one object."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from elmoe.engine.engine import Engine, EngineOptions
from elmoe.engine.request import Request, Result
from elmoe.engine.statistics import Statistics
from elmoe.errors import RequestError, StoreError
from elmoe.store import available_memory, open_store, resolve_store
from elmoe.units import format_bytes

if TYPE_CHECKING:
    from elmoe.trace import TraceRecorder

Backend = Literal["native", "reference"]


def load_backend(name: Backend) -> ModuleType:
    """``native`` kernels, or ``reference``: the NumPy definition (same bits, slow). KernelError without native kernels."""
    return import_module("elmoe.kernels" if name == "native" else "elmoe.bitslice")


class Session:
    """An open store that answers with text. A context manager."""

    def __init__(self, store: str | Path, options: EngineOptions | None = None, backend: Backend = "native") -> None:
        module = load_backend(backend)
        self.path = resolve_store(store)
        self.reader = open_store(self.path)
        self.reader_note = _reader_note(sum(file.bytes for file in self.reader.manifest.files), available_memory())
        try:
            self.tokenizer = Tokenizer.from_file(str(self.reader.tokenizer_path))
        except Exception as error:  # tokenizers raises bare Exception
            raise StoreError(f"'{self.reader.tokenizer_path}' is not a readable tokenizer: {error}") from error
        self.backend = module
        self.engine = Engine(self.reader, module, options)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.reader.close()

    def with_options(self, options: EngineOptions) -> Session:
        """Continue with other options on the same open store."""
        self.engine = Engine(self.reader, self.backend, options)
        return self

    def encode(self, text: str) -> tuple[int, ...]:
        """Text to token ids; RequestError if there is none."""
        ids = tuple(self.tokenizer.encode(text).ids)
        if not ids:
            raise RequestError("the prompt is empty", "give some text")
        return ids

    def decode(self, ids: list[int] | tuple[int, ...]) -> str:
        """Token ids to text, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat_prompt(self, messages: list[dict[str, str]]) -> str:
        """Apply the store's chat template (sandboxed); RequestError if it has none or refuses the messages."""
        template = self.reader.chat_template()
        if template is None:
            raise RequestError(f"'{self.path.name}' has no chat template", "give a plain prompt")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            return environment.from_string(template).render(messages=messages, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses the messages: {error}") from error

    def text_of(self, request: Request, result: Result) -> str:
        """The generated text, cut before the stop string that ended it."""
        text = self.decode(result.tokens)
        if result.finish == "stop":
            cuts = [text.find(stop) for stop in request.stop if stop in text]
            text = text[: min(cuts)] if cuts else text
        return text

    def generate(
        self,
        requests: list[Request],
        recorder: TraceRecorder | None = None,
        on_commit: Callable[[int, list[int]], None] | None = None,
    ) -> tuple[list[Result], Statistics]:
        """Serve requests as ``Engine.generate`` does, with this store's tokenizer for stop strings."""
        return self.engine.generate(requests, self.decode, recorder, on_commit)


def _reader_note(store_bytes: int, available: int) -> str:
    """Which reader serves a store, and why, in words for a log."""
    sizes = f"{format_bytes(store_bytes)} store, {format_bytes(available)} of memory available"
    if store_bytes <= available:
        return f"reader: memory ({sizes})"
    return f"reader: memory ({sizes}: larger than memory, so reads go through the page cache and will be slow)"


def _refuse(message: Any) -> None:
    raise jinja2.TemplateError(str(message))
