"""One thread steps the engine; the loop of asyncio hands it requests and gets what each step brought, all at once.

All methods are called from the loop. What they ask of the engine takes effect between two steps.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Thread
from time import perf_counter

from elmoe.engine.engine import Engine
from elmoe.engine.request import Output, Request
from elmoe.engine.statistics import Statistics
from elmoe.errors import ElmoeError, RequestError

log = logging.getLogger("elmoe.server")


class Full(Exception):
    """No room in the queue."""


class Gone(Exception):
    """The client has left, or the server is ending: nobody wants the answer."""


class TimeUp(Exception):
    """The request took longer than it may."""


@dataclass(eq=False)
class Job:
    """One prompt of a call. ``number``: the engine's. ``unreported``: answers that have not ended. ``held``: outputs that
    the loop has not been told of. Of the thread alone, but for ``prompt_done``, the computed positions of the prompt."""

    call: Call
    index: int
    request: Request
    number: int = -1
    unreported: int = 0
    prompt_done: int = 0
    held: list[Output] = field(default_factory=list)


class Call:
    """What a client asked for while it is served: one prompt, or several. Of the loop alone.

    ``running``: answers that have not ended. ``error``: what ended it before its time. ``streams``: whether the loop is told
    of every step, or of answers that have ended alone; ``follows``: whether :meth:`take` returns when more of a prompt is
    computed. ``gathering``: the loop looks again by itself, and need not be woken for tokens. Times are of ``perf_counter``;
    the thread sets those of tokens.
    """

    def __init__(self, requests: Sequence[Request], streams: bool, follows: bool) -> None:
        self.streams, self.follows = streams, follows
        self.jobs = [Job(self, index, request, unreported=request.copies) for index, request in enumerate(requests)]
        self.running = sum(request.copies for request in requests)
        self.error: BaseException | None = None
        self.cancelled = self.gathering = False
        self.began = perf_counter()
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._outputs: list[tuple[int, Output]] = []
        self._changed, self.over = asyncio.Event(), asyncio.Event()

    @property
    def under_way(self) -> bool:
        """Whether there is something to take, or will be."""
        return self.running > 0 or bool(self._outputs)

    async def take(self) -> list[tuple[int, Output]]:
        """Outputs since the last call, each with the index of its prompt, once there are some; none after :meth:`wake`.

        :raises BaseException: what ended it.
        """
        if not self._outputs and self.error is None:
            await self._changed.wait()
        self._changed.clear()
        if self.error is not None:
            raise self.error
        outputs, self._outputs = self._outputs, []
        return outputs

    def wake(self) -> None:
        """Let :meth:`take` return."""
        self._changed.set()

    def add(self, index: int, output: Output) -> None:
        """What a step brought."""
        if output.result is not None:
            self.running -= 1
            if output.result.error is not None:
                self.end(output.result.error)
            elif not self.running:
                self.over.set()
        self._outputs.append((index, output))
        self._changed.set()

    def end(self, error: BaseException) -> None:
        """End it with an error; the first one counts."""
        self.error = self.error or error
        self._changed.set()
        self.over.set()


class EngineThread:
    """Serves jobs on an engine.

    :param most: answers that may be served or wait at once. :param count: what to add up of the statistics of runs.
    """

    def __init__(self, engine: Engine, most: int, count: Callable[[Statistics], dict[str, float]]) -> None:
        self.engine, self._most, self._count = engine, most, count
        # Of this run, and the sums of those before it: one value, which another thread reads at once.
        self._counted = engine.statistics, count(Statistics())
        self._loop: asyncio.AbstractEventLoop | None = None
        self._inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._posted: deque[Callable[[], None]] = deque()
        self._waking = False
        self._jobs: dict[int, Job] = {}
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self.answers = 0
        """Answers that are served or wait."""
        self.failure: str | None = None
        """Why the last step failed; None while steps succeed."""

    def start(self) -> None:
        """Start the thread; outputs go to the loop that calls this."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self, seconds: float) -> bool:
        """End the thread behind the step under way, and with it what is served; whether it ended in time."""
        self._inbox.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def room(self, answers: int) -> bool:
        """Whether so many more answers may wait."""
        return self.answers + answers <= self._most

    def submit(self, requests: Sequence[Request], streams: bool = False, follows: bool = False) -> Call:
        """Serve requests. Full where there is no room."""
        call = Call(requests, streams, follows)
        if not self.room(call.running):
            raise Full
        self.answers += call.running
        for job in call.jobs:
            self._inbox.put(partial(self._begin, job))
        return call

    def cancel(self, call: Call, error: BaseException) -> None:
        """End a call with an error; the engine lets go of it before its next step."""
        call.end(error)
        if call.running and not call.cancelled:
            call.cancelled = True
            for job in call.jobs:
                self._inbox.put(partial(self._abort, job))

    async def gather(self, call: Call, seconds: float) -> None:
        """Let outputs of a call gather for so long, or until all its answers have ended."""
        if seconds > 0 and call.running:
            call.gathering = True
            try:
                with suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await call.over.wait()
            finally:
                call.gathering = False  # before looking: what is posted from now on wakes the loop
                self._receive()

    def totals(self) -> dict[str, float]:
        """Sums over all runs; may be called from any thread."""
        statistics, ended = self._counted
        now = self._count(statistics)
        return {name: value + now[name] for name, value in ended.items()}

    # The rest runs in the thread, but for what it posts.

    def _run(self) -> None:
        while True:
            wait = not self.engine.has_work
            while wait or not self._inbox.empty():
                act = self._inbox.get()
                if act is None:
                    return
                self._guarded(act)
                wait = False
            if self.engine.has_work:
                self._guarded(self._step)

    def _guarded(self, act: Callable[[], None]) -> None:
        """Whatever fails ends what is served, and never the thread."""
        try:
            act()
        except BaseException as error:
            self._fail(error)

    def _step(self) -> None:
        outputs = self.engine.step()
        self.failure = None
        if self.engine.statistics is not self._counted[0]:
            self._counted = self.engine.statistics, self.totals()
        brought: list[tuple[Job, list[Output]]] = []
        now = perf_counter()
        for output in outputs:
            job = self._jobs.get(output.request)
            if job is None:
                continue
            call = job.call
            if output.tokens:
                call.last_token = now
                call.first_token = call.first_token or now
            job.held.append(output)
            if output.result is not None or call.streams:
                brought.append((job, job.held))
                job.held = []
            if output.result is not None:
                job.unreported -= 1
                if not job.unreported:
                    del self._jobs[output.request]
        for number, done in self.engine.prompt_progress().items():
            if number in self._jobs:
                job = self._jobs[number]
                job.prompt_done = done
                if job.call.follows:
                    self._post(job.call.wake)
        if brought:
            self._posted.append(partial(self._deliver, brought))  # before looking, see `gather`
            if any(output.result is not None for _, outputs in brought for output in outputs) or not all(
                job.call.gathering for job, _ in brought
            ):
                self._wake()

    def _begin(self, job: Job) -> None:
        if job.call.error is not None:
            self._post(partial(self._forget, job, job.unreported))
            return
        try:
            job.number = self.engine.add(job.request)
        except ElmoeError as error:
            self._post(partial(self._refuse, job, job.unreported, error))
        else:
            self._jobs[job.number] = job

    def _abort(self, job: Job) -> None:
        if job.number in self._jobs:
            self.engine.abort(job.number)

    def _fail(self, error: BaseException) -> None:
        """A step failed as a whole: end everything that is served, so that what comes next finds an engine without work."""
        self.failure = f"{type(error).__name__}: {error}"
        log.error("the engine failed", extra={"facts": {"error": self.failure}}, exc_info=error)
        jobs, self._jobs = list(self._jobs.values()), {}
        for job in jobs:
            with suppress(RequestError):
                self.engine.abort(job.number)
            self._post(partial(self._refuse, job, job.unreported, error))
        self.engine.scheduler.forget_ended()  # a step that reports them may fail as well

    def _post(self, act: Callable[[], None]) -> None:
        """Let the loop do something."""
        self._posted.append(act)
        self._wake()

    def _wake(self) -> None:
        """Have the loop look at what was posted; it is woken once, however much waits."""
        if not self._waking and self._loop is not None:
            self._waking = True
            with suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._receive)

    # The rest runs in the loop again.

    def _receive(self) -> None:
        self._waking = False
        while self._posted:
            self._posted.popleft()()

    def _deliver(self, brought: list[tuple[Job, list[Output]]]) -> None:
        for job, outputs in brought:
            for output in outputs:
                if output.result is not None:
                    self.answers -= 1
                job.call.add(job.index, output)

    def _refuse(self, job: Job, answers: int, error: BaseException) -> None:
        job.call.end(error)
        self._forget(job, answers)

    def _forget(self, job: Job, answers: int) -> None:
        self.answers -= answers
        job.call.running -= answers
