"""``elmoe.load`` and ``Model``: a store, its tokenizer, its chat template and an engine in one object."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, overload
from weakref import WeakValueDictionary

import numpy as np

from elmoe.arguments import check_types, refuse_unknown, with_arguments, without_numpy
from elmoe.bitslice import Backend
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request, Result, numbered
from elmoe.errors import RequestError
from elmoe.extras import naming_extra
from elmoe.generation import Collector, Generation, Piece, SamplingParams
from elmoe.grammar import Grammars
from elmoe.models.spec import ModelSpec
from elmoe.opening import BackendName, Opened, Reader, load_backend, open_to_serve, use_threads
from elmoe.stepping import Stepper, Ticket
from elmoe.text import TextStream
from elmoe.tokenizer import encode
from elmoe.units import parse_bandwidth, parse_bytes, parse_fast_memory
from elmoe.untrusted import short

if TYPE_CHECKING:  # pyarrow loads only when a trace is wanted, asyncio only where tasks wait
    import asyncio

    from elmoe.trace import TraceRecorder

Prompt: TypeAlias = str | Sequence[int]
"""A text, or token ids."""
Messages: TypeAlias = Sequence[Mapping[str, Any]]
"""A chat: mappings with ``role`` and ``content``."""
BATCH = 16
"""Sequences that a model serves at once unless told otherwise."""
QUANTITIES: dict[str, Callable[[str], int | float]] = {
    "fast_memory": parse_fast_memory, "kv_memory": parse_bytes, "prefix_cache": parse_bytes,
    "slow_bandwidth": parse_bandwidth,
}  # fmt: skip
"""Options that are taken as text with a unit."""


def load(
    store: str | Path, options: EngineOptions | None = None, *, backend: BackendName = "native", reader: Reader = "auto",
    threads: int | None = None, store_dir: str | Path | None = None, **changes: Any,
) -> Model:  # fmt: skip
    """Open a store to generate text.

    :param store: a GGUF file (the first of a split one), a Hugging Face folder, the folder that ``elmoe convert`` wrote, or
        ``demo`` for the embedded model. The first two are converted once, which is told on standard error.
    :param options: how to serve; keywords change single fields of it. Without it 16 sequences are served at once.
    :param backend: ``native`` kernels, or ``reference``, their NumPy definition: the same bits, slowly.
    :param reader: ``memory`` maps the store and only accounts a budget; ``direct`` enforces the budget and reads experts
        from disk; ``auto`` is direct for a budget in bytes or a store larger than the memory available.
    :param threads: kernel threads of this process, 1 to 64; None is all its processors.
    :param store_dir: where converted models are kept; None is ``elmoe/stores`` in the user's cache folder.
    :param changes: fields of :class:`EngineOptions`: ``fast_memory`` (bytes, a share of the experts between 0.0 and 1.0, or
        text such as ``"4GiB"`` or ``"25%"``), ``kv_memory`` (bytes or text), ``prefix_cache`` (True, bytes or text),
        ``slow_bandwidth`` (bytes per second, or text
        such as ``"1.7GB/s"``), ``batch``, ``mode``, ``draft_length`` and others.
    :raises StoreError: there is no readable store.
    :raises ConvertError: a file or folder is damaged or not supported, or cannot be converted.
    :raises BudgetError: the budget is below the minimum.
    :raises RequestError: an unknown keyword, or a value that is out of range.
    """
    if not isinstance(store, (str, Path)):
        raise RequestError(f"the store is a {type(store).__name__}", "give the path of a store, or 'demo'")
    if store_dir is not None and not isinstance(store_dir, (str, Path)):
        raise RequestError(f"the option store_dir is a {type(store_dir).__name__}", "give the path of a folder")
    if options is not None and not isinstance(options, EngineOptions):
        raise RequestError(f"options is a {type(options).__name__}", "give elmoe.EngineOptions, or keywords")
    own = ("backend", "reader", "threads", "store_dir")
    refuse_unknown(changes, [*(field.name for field in fields(EngineOptions)), *own], "option")
    for name, allowed, value in (("backend", BackendName, backend), ("reader", Reader, reader)):
        if value not in get_args(allowed):
            raise RequestError(f"the option {name} is {short(repr(value), 60)}", f"use {', '.join(get_args(allowed))}")
    threads = without_numpy(threads)
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 64):
        raise RequestError(f"the option threads is {short(repr(threads), 60)}", "use 1 to 64, or None for all processors")
    parsed = {name: QUANTITIES[name](value) if name in QUANTITIES and isinstance(value, str) else value
              for name, value in changes.items()}  # fmt: skip
    chosen = with_arguments(options or EngineOptions(batch=BATCH), parsed, "option")
    check_types(chosen, "option")
    folder = None if store_dir is None else Path(store_dir)
    kernels, opened = load_backend(backend), open_to_serve(store, chosen, backend, reader, folder)
    try:
        model = Model(opened, kernels)
    except BaseException:
        opened.reader.close()
        raise
    use_threads(backend, threads)
    return model


class Stream(Iterator[Piece]):
    """Pieces of an answer as they are made; ``close`` (or the end of a ``with`` block) cancels the request at once."""

    def __init__(self, stepper: Stepper, request: Request) -> None:
        self._stepper = stepper
        self._ticket: Ticket | None = stepper.submit(request)
        if self._ticket.error is not None:
            raise self._ticket.error

    def __next__(self) -> Piece:
        """The next piece, stepping the engine for all open streams if there is none yet."""
        if self._ticket is None:
            raise StopIteration
        try:
            output = self._stepper.next_output(self._ticket)
            if output is not None:
                return Piece.of(output)
        except BaseException:
            self.close()
            raise
        self.close()
        raise StopIteration

    def close(self) -> None:
        """Cancel what is not finished; its memory is free for others."""
        ticket, self._ticket = self._ticket, None
        if ticket is not None:
            self._stepper.drop(ticket)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_ticket", None) is not None:
            self.close()


class Model:
    """An open model; made by :func:`load`, a context manager. Use it from one thread; ``agenerate`` and ``astream`` compute
    in worker threads and serve all that wait as one batch.

    What measures and benchmarks use beside text: ``path`` of the store, its ``reader`` and ``tokenizer``, the ``backend``,
    the ``engine`` that serves, the ``grammars`` of its tokens, ``reader_note`` (why this reader) and ``tier`` (what the fast
    tier is).
    """

    def __init__(self, opened: Opened, backend: Backend) -> None:
        self.path, self.reader, self.backend = opened.path, opened.reader, backend
        self.reader_note, self.tier = opened.note, opened.tier
        self.tokenizer = tokenizer = opened.reader.tokenizer()
        self._decode: Callable[[Sequence[int]], str] = lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)
        self.grammars = Grammars(tokenizer, self.spec.vocabulary, self.spec.eos_tokens)
        self.engine = self.new_engine(opened.options)
        self._stepper = Stepper(self.engine, f"the model '{self.path.name}' is closed")
        self._turns: WeakValueDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakValueDictionary()

    def __repr__(self) -> str:
        return f"<elmoe.Model '{self.path.name}'{', closed' if self._stepper.closed else ''}>"

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel all requests and let go of the store; waits for the step of another thread. Does nothing in a process that
        was forked."""
        if not self._stepper.closed and not self._stepper.forked:
            self._stepper.close()
            self.reader.close()

    @property
    def spec(self) -> ModelSpec:
        """What the model is: layers, experts, vocabulary, context (``max_positions`` tokens)."""
        return self.reader.spec

    @property
    def info(self) -> str:
        """How the store is read, and what the fast tier is."""
        return f"reader: {self.reader_note}; {self.tier}"

    @property
    def statistics(self) -> dict[str, Any]:
        """Counters of the engine: tokens, acceptance of drafts, hit rates and bytes of the tiers (see the JSON of
        ``elmoe generate``). Of the last call of :meth:`generate`, or since a stream began with nothing else under way."""
        return self.engine.statistics.as_dict()

    def encode(self, text: str, special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of a text; ``special_tokens``: with those that the tokenizer begins a text with."""
        if not isinstance(text, str):
            raise RequestError(f"the text is a {type(text).__name__}", "give a string")
        return encode(self.tokenizer, text, special_tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        return self._decode(self._checked_ids(token_ids, "token_ids"))

    def new_engine(self, options: EngineOptions) -> Engine:
        """Another engine on the open store, with a KV cache and a fast tier of its own: to compare options.

        :raises RequestError: an option is out of range. :raises BudgetError: the budget is below the minimum.
        """
        return Engine(self.reader, self.backend, options, text=partial(TextStream, self._decode))

    def text_of(self, request: Request, result: Result) -> str:
        """The text of an engine's result, cut before the stop string that ended it."""
        stream = TextStream(self._decode, request.prompt, request.stop)
        for token in result.shown(request):
            stream.push(token)
        return stream.take(last=True)

    def chat_tokens(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None, **template_variables: Any
    ) -> tuple[int, ...]:
        """The ids of :meth:`chat_prompt`: a prompt that an answer to the chat continues."""
        return self.encode(self.chat_prompt(messages, tools=tools, **template_variables), special_tokens=False)

    def chat_prompt(
        self, messages: Messages, *, tools: Sequence[Mapping[str, Any]] | None = None, **template_variables: Any
    ) -> str:
        """A chat as text: rendered by the model's template, in a process with limits, with the beginning of an answer. It
        has its own special tokens.

        :param template_variables: such as ``enable_thinking=False``.
        :raises RequestError: the model has no template, or the template refuses the messages.
        """
        self._stepper.check_open()
        from elmoe.chat import plain_messages, render  # here, because loading it delays a first token that needs no template

        template = self.reader.chat_template()
        if template is None:
            hint = "give a plain prompt: elmoe generate STORE --prompt TEXT"
            raise RequestError(f"'{self.path.name}' has no chat template", hint)
        return render(template, plain_messages(messages, template), self.reader.special_tokens, tools, **template_variables)

    @overload
    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None, *, trace: str | Path | None = None,
        **sampling: Any,
    ) -> Generation: ...  # fmt: skip
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, *, trace: str | Path | None = None,
        **sampling: Any,
    ) -> list[Generation]: ...  # fmt: skip
    def generate(
        self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None, *, trace: str | Path | None = None,
        **sampling: Any,
    ) -> Generation | list[Generation]:  # fmt: skip
        """Continue a prompt, or several as one batch.

        :param prompt: a text or a list of token ids gives a Generation; a list of them gives a list. Equal prompts of one
            call draw different answers.
        :param params: how answers are drawn; keywords change single fields of :class:`SamplingParams`. With ``n`` above 1
            the further answers to a prompt are ``others`` of its Generation.
        :param trace: a Parquet file to record routing, drafts and their acceptance in (see ``elmoe.trace``).
        :raises RequestError: a prompt is empty or too long, a parameter is unknown or out of range, the model is closed.
        :raises BudgetError: the request needs more of the KV cache than there is, or the budget is too small.
        """
        prompts, single = self._prompts(prompt)
        requests = self._requests(prompts, params, sampling)
        collectors = [Collector(request) for request in requests]
        with self._recorder(trace, requests) as recorder, closing(self._stepper.serve(requests, recorder)) as outputs:
            for index, output in outputs:
                collectors[index].take(output)
        answers = [collector.generation() for collector in collectors]
        return answers[0] if single else answers

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> Stream:
        """Continue a prompt, piece by piece. Several streams may be read in turns; a step brings all of them forward.

        :raises RequestError: as :meth:`generate`, at once.
        :raises BudgetError: as :meth:`generate`, at once.
        """
        return Stream(self._stepper, self._request(prompt, params, sampling))

    def chat(self, messages: Messages, params: SamplingParams | None = None, **sampling: Any) -> Generation:
        """The answer to a chat: :meth:`generate` behind :meth:`chat_tokens`, which also takes tools and variables."""
        return self.generate(self.chat_tokens(messages), params, **sampling)

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None, **sampling: Any) -> Stream:
        """The answer to a chat, piece by piece; see :meth:`chat` and :meth:`stream`."""
        return self.stream(self.chat_tokens(messages), params, **sampling)

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any
    ) -> AsyncGenerator[Piece, None]:
        """As :meth:`stream`, computed in a worker thread; closing the iterator, or cancelling the task, cancels the request.

        Many tasks may wait at once: they are served as one batch.
        """
        ticket = self._stepper.submit(self._request(prompt, params, sampling))
        try:
            while True:
                await self._until_ready(ticket)
                output = self._stepper.taken(ticket)
                if output is None:
                    return
                yield Piece.of(output)
        finally:
            self._stepper.drop(ticket)

    async def agenerate(self, prompt: Prompt, params: SamplingParams | None = None, **sampling: Any) -> Generation:
        """As :meth:`generate` for one prompt, computed in a worker thread; several at once are served as one batch."""
        request = self._request(prompt, params, sampling)
        collector, ticket = Collector(request), self._stepper.submit(request)
        try:
            while True:
                await self._until_ready(ticket)
                output = self._stepper.taken(ticket)
                if output is None:
                    return collector.generation()
                collector.take(output)
        finally:
            self._stepper.drop(ticket)

    async def _until_ready(self, ticket: Ticket) -> None:
        """Step in a worker thread, in turns with the other tasks of this loop, until a ticket is ready."""
        import asyncio

        turn = self._turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        while not ticket.ready:
            async with turn:
                if not ticket.ready:
                    await asyncio.to_thread(self._stepper.step, ticket, wait=True)

    def _recorder(
        self, path: str | Path | None, requests: Sequence[Request]
    ) -> AbstractContextManager[TraceRecorder | None]:  # fmt: skip
        """Writes a trace of the requests to ``path``, if there is one."""
        if path is None:
            return nullcontext()
        if not isinstance(path, (str, Path)):
            raise RequestError(f"the trace is a {type(path).__name__}", "give the path of a file to write")
        with naming_extra("a trace"):
            from elmoe.trace import TraceRecorder

        options = self.engine.options
        run = {
            "store": self.path.name, "mode": options.mode, "commit_limit": options.commit_limit,
            "fast_memory": options.fast_memory, "draft_length": options.draft_length,
            "ignore_eos": any(request.ignore_eos for request in requests),
        }  # fmt: skip
        return TraceRecorder(path, self.spec, run, options.all_ranks)

    def _prompts(self, prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
        """What :meth:`generate` was given as a list, and whether it was one prompt."""
        if isinstance(prompt, str) or (isinstance(prompt, Sequence) and prompt and _is_token(prompt[0])):
            return [prompt], True  # type: ignore[list-item]
        if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise _wrong_prompt(prompt)
        return list(prompt), False  # type: ignore[arg-type]

    def _request(self, prompt: Prompt, params: SamplingParams | None, sampling: Mapping[str, Any]) -> Request:
        return self._requests([prompt], params, sampling)[0]

    def _requests(
        self, prompts: Sequence[Prompt], params: SamplingParams | None, sampling: Mapping[str, Any]
    ) -> list[Request]:
        """Requests of one call; equal prompts draw apart."""
        self._stepper.check_open()
        if params is not None and not isinstance(params, SamplingParams):
            raise RequestError(f"params is a {type(params).__name__}", "give elmoe.SamplingParams, or keywords")
        chosen = with_arguments(params or SamplingParams(), sampling, "sampling parameter").seeded()
        return numbered(chosen.request(self._ids(prompt), self.tokenizer, self.grammars) for prompt in prompts)

    def _ids(self, prompt: object) -> tuple[int, ...]:
        if isinstance(prompt, str):
            return self.encode(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, (bytes, bytearray)):
            raise _wrong_prompt(prompt)
        return self._checked_ids(prompt, "the prompt")

    def _checked_ids(self, ids: Sequence[int], what: str) -> tuple[int, ...]:
        vocabulary = self.spec.vocabulary
        for token in ids:
            if not _is_token(token):
                raise RequestError(f"{what} holds a {type(token).__name__}", "give a text, or whole numbers as token ids")
            if not 0 <= token < vocabulary:
                raise RequestError(f"{what} has the token id {token}", f"ids of this model are 0 to {vocabulary - 1}")
        return tuple(int(token) for token in ids)


def _is_token(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _wrong_prompt(prompt: object) -> RequestError:
    return RequestError(f"the prompt is a {type(prompt).__name__}", "give a text, a list of token ids, or a list of these")
