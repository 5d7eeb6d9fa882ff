"""One exchange with a client: a call is served, and its answer sent whole or as a stream, while the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from time import perf_counter

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from elmoe.errors import BudgetError, ElmoeError, RequestError
from elmoe.server.answers import Answers
from elmoe.server.engine_thread import Call, EngineThread, Gone, TimeUp
from elmoe.server.errors import ApiError, with_hint
from elmoe.server.schemas import ChatCompletion, Completion

EVENT_SECONDS = 0.003
"""Time that an event may take of a processor, here and at a client on the same machine: with many answers they come less
often."""
SLOW_READER_SECONDS = 30.0
"""Time that a client has to read the last of an answer."""


def as_api_error(error: BaseException, seconds: float) -> ApiError:
    """What a client is told of the error that ended its call."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeUp):
        return ApiError(504, f"the answer took longer than {seconds:g} s: ask for fewer tokens", None, "timeout")
    if isinstance(error, RequestError | BudgetError):
        return ApiError(400, with_hint(str(error), error.hint), None, "invalid_value")
    if isinstance(error, ElmoeError):
        return ApiError(500, f"the model failed on this request: {error}", None, "model_error")
    return ApiError(500, "the server failed on this request; its log says more", None, "internal_error")


class Exchange:
    """Serves one call.

    :param gather: least seconds between events of a stream, but for the last. :param pings: seconds of silence after which
        a stream gets a comment. :param progress: whether a stream tells how much of
        its prompts is computed. :param ended: told once when the call is over, with what ended it before its time.
    """

    def __init__(
        self, engine: EngineThread, call: Call, answers: Answers, seconds: float, gather: float, pings: float,
        progress: bool, ended: Callable[[Call, Answers, BaseException | None], None],
    ) -> None:  # fmt: skip
        self._engine, self._call, self._answers, self._seconds = engine, call, answers, seconds
        self._gather, self._pings, self._progress, self._ended = gather, pings, progress, ended

    @asynccontextmanager
    async def _present(self, receive: Receive) -> AsyncIterator[None]:
        """Cancels the call when the client leaves, time is up, or the block is left before the end."""

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self._engine.cancel(self._call, Gone())

        watcher = asyncio.create_task(watch())
        timer = asyncio.get_running_loop().call_later(self._seconds, self._engine.cancel, self._call, TimeUp())
        error: BaseException | None = None
        try:
            yield
        except BaseException as reason:
            error = reason
            raise
        finally:
            timer.cancel()
            watcher.cancel()
            with suppress(asyncio.CancelledError):
                await watcher
            self._engine.cancel(self._call, Gone())
            self._ended(self._call, self._answers, error)

    async def whole(self, request: Request) -> ChatCompletion | Completion:
        """The whole answer. ApiError for what ended it; ClientDisconnect where nobody waits for it."""
        try:
            async with self._present(request.receive):
                while self._call.under_way:
                    for index, output in await self._call.take():
                        self._answers.add(index, output)
        except Gone:
            raise ClientDisconnect from None
        except Exception as error:
            raise as_api_error(error, self._seconds) from error
        return self._answers.whole()

    def stream(self, usage: bool, running_usage: bool) -> Response:
        """The answer as server-sent events."""
        return _Events(self, usage, running_usage)

    async def _send(self, receive: Receive, send: Send, usage: bool, running_usage: bool) -> None:
        call, answers = self._call, self._answers
        sent, loop = perf_counter(), asyncio.get_running_loop()
        timer = loop.call_later(self._pings, lambda: ping())

        async def write(data: bytes) -> None:
            nonlocal sent
            sent = perf_counter()
            await send({"type": "http.response.body", "body": data, "more_body": True})

        def ping() -> None:
            nonlocal timer
            timer = loop.call_later(self._pings, ping)
            call.wake()

        told = 0
        try:
            async with self._present(receive):
                while call.under_way:
                    outputs = await call.take()
                    data = answers.events(outputs, usage, running_usage) if outputs else b""
                    done = sum(job.prompt_done for job in call.jobs) if call.first_token is None else 0
                    if done > told and self._progress:
                        told, data = done, data + answers.progress_event(done, round(1000 * (perf_counter() - call.began)))
                    if not data and perf_counter() - sent > 0.9 * self._pings:
                        data = f": {done} of {answers.prompt_tokens} prompt tokens are computed\n\n".encode()
                    if data:
                        await write(data)
                        between = max(self._gather, EVENT_SECONDS * self._engine.answers)
                        await self._engine.gather(call, between - (perf_counter() - sent))
        except Gone:
            return
        except Exception as error:
            data = b"data: " + as_api_error(error, self._seconds).response.body + b"\n\n"
            if not isinstance(error, ElmoeError | TimeUp):
                await write(data)
                raise
        else:
            data = (answers.last_event() if usage else b"") + b"data: [DONE]\n\n"
        finally:
            timer.cancel()
        await send({"type": "http.response.body", "body": data, "more_body": False})


class _Events(Response):
    """Server-sent events of an exchange."""

    media_type = "text/event-stream"

    def __init__(self, exchange: Exchange, usage: bool, running_usage: bool) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._exchange, self._usage, self._running_usage = exchange, usage, running_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = self._exchange
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        # Until the client has read it: a client that does not read keeps its connection no longer than this.
        with suppress(TimeoutError):
            async with asyncio.timeout(exchange._seconds + SLOW_READER_SECONDS):
                await exchange._send(receive, send, self._usage, self._running_usage)
