"""Requests of several callers on one engine: whoever waits steps it for all, and requests come and go between steps."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING

from elmoe.engine.engine import Engine
from elmoe.engine.request import Output, Request
from elmoe.errors import ElmoeError, RequestError

if TYPE_CHECKING:  # pyarrow loads only when a trace is wanted
    from elmoe.trace import TraceRecorder


@dataclass(eq=False)
class Ticket:
    """A request that was handed in. ``outputs``: what steps brought and nobody took yet. ``error``: why it was refused."""

    request: Request
    number: int = -1
    outputs: deque[Output] = field(default_factory=deque)
    running: int = 0
    error: ElmoeError | None = None
    dropped: bool = False

    @property
    def ready(self) -> bool:
        """Whether there is something to take, or nothing more will come."""
        return bool(self.outputs) or self.error is not None or self.running == 0


class Stepper:
    """Hands requests to an engine and outputs to those who wait. ``submit`` and ``drop`` may be called from any thread, also
    while another one steps: they take effect before the next step."""

    def __init__(self, engine: Engine, closed: str) -> None:
        self._engine, self._stepping, self._closed_error = engine, Lock(), closed
        self._changed: deque[Ticket] = deque()
        self._tickets: dict[int, Ticket] = {}
        self._process = os.getpid()
        self.closed = False

    @property
    def forked(self) -> bool:
        """Whether this is a copy of the process that made it: locks may be held there, and the threads that read experts do
        not exist here."""
        return os.getpid() != self._process

    def check_open(self) -> None:
        """RequestError once it is closed, or in another process."""
        if self.forked:
            raise RequestError(
                "the model was loaded by another process, of which this one is a copy",
                "load it in each process, or start processes by 'spawn'",
            )
        if self.closed:
            raise RequestError(self._closed_error, "load it again, and keep it open while it is used")

    def submit(self, request: Request) -> Ticket:
        """Hand a request in; ``ticket.error`` is set where it is refused, now or with the next step."""
        self.check_open()
        ticket = Ticket(request, running=request.copies)
        self._changed.append(ticket)
        self._apply_if_free()
        return ticket

    def drop(self, ticket: Ticket) -> None:
        """Cancel a request, at once where no step is under way; one that has ended is left."""
        ticket.dropped = True
        self._changed.append(ticket)
        if not self.forked:
            self._apply_if_free()

    def step(self, ticket: Ticket, wait: bool = False) -> None:
        """Step once for all, unless ``ticket`` is ready.

        :param wait: for the step of another thread; otherwise RequestError.
        """
        self.check_open()
        with self._turn(wait):
            self.check_open()
            if not ticket.ready:
                for output in self._engine.step():
                    self._deliver(output)
        self._apply_if_free()

    def serve(self, requests: Sequence[Request], recorder: TraceRecorder | None = None) -> Generator[tuple[int, Output]]:
        """Outputs of a closed set of requests, each with the index of its request. As one batch where nobody else is
        served; beside others otherwise. Closing the iterator cancels them.

        :raises RequestError: a trace is to be recorded while others are served.
        """
        self.check_open()
        with self._turn():
            self.check_open()
            if not self._tickets:
                with closing(self._engine.run(requests, recorder)) as steps:
                    for outputs in steps:
                        yield from ((output.request, output) for output in outputs)
                return
        if recorder is not None:
            raise RequestError("a trace is recorded of one call alone", "end or close the streams that are open")
        tickets = [self.submit(request) for request in requests]
        try:
            for index, ticket in enumerate(tickets):
                while (output := self.next_output(ticket)) is not None:
                    yield index, output
        finally:
            for ticket in tickets:
                self.drop(ticket)

    def next_output(self, ticket: Ticket) -> Output | None:
        """The next output of a request, stepping for it; None behind the last. Raises what refused the request."""
        while not ticket.ready:
            self.step(ticket)
        return self.taken(ticket)

    def taken(self, ticket: Ticket) -> Output | None:
        """Take an output of a ticket that is ready; None behind the last. Raises what refused the request."""
        if ticket.error is not None:
            raise ticket.error
        return ticket.outputs.popleft() if ticket.outputs else None

    def close(self) -> None:
        """Cancel everything, once the step under way has ended."""
        with self._turn(wait=True):
            self.closed = True
            for ticket in list(self._tickets.values()):
                self._abort(ticket, RequestError(self._closed_error, "keep it open while it is used"))

    @contextmanager
    def _turn(self, wait: bool = False) -> Iterator[None]:
        """Be the one who steps."""
        if not self._stepping.acquire(blocking=wait):
            raise RequestError(
                "the model is generating in another thread", "use it from one thread, or with agenerate and astream"
            )
        try:
            self._apply()
            yield
        finally:
            self._stepping.release()

    def _apply_if_free(self) -> None:
        """Let changes take effect unless a step is under way; who steps looks again afterwards, so that none is left."""
        while self._changed and self._stepping.acquire(blocking=False):
            try:
                self._apply()
            finally:
                self._stepping.release()

    def _apply(self) -> None:
        while self._changed:
            ticket = self._changed.popleft()
            if ticket.dropped:
                self._abort(ticket)
            elif self.closed:
                self._end(ticket, RequestError(self._closed_error, "keep it open while it is used"))
            else:
                try:
                    ticket.number = self._engine.add(ticket.request)
                except ElmoeError as error:
                    self._end(ticket, error)
                else:
                    self._tickets[ticket.number] = ticket
        if not self._tickets and self._engine.has_work:
            self._engine.step()  # reports what was aborted, to nobody

    def _abort(self, ticket: Ticket, error: ElmoeError | None = None) -> None:
        if self._tickets.pop(ticket.number, None) is not None:
            self._engine.abort(ticket.number)
        self._end(ticket, error)

    def _end(self, ticket: Ticket, error: ElmoeError | None) -> None:
        ticket.error, ticket.running = ticket.error or error, 0

    def _deliver(self, output: Output) -> None:
        ticket = self._tickets.get(output.request)
        if ticket is None:
            return
        ticket.outputs.append(output)
        if output.result is not None:
            ticket.running -= 1
            if not ticket.running:
                del self._tickets[output.request]
