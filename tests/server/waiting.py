"""Waiting for what a server does, and holding it back until a test has looked: no test depends on how fast a machine is."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager
from threading import Semaphore

PATIENCE = 120.0
"""Seconds until something is taken never to come. No test waits so long where all is well, however loaded the machine."""
SCOPE = {
    "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
    "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http", "root_path": "",
    "server": ("test", 80), "client": ("test", 1),
}  # fmt: skip
"""Of a request that a test hands to the application itself."""


def until(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


async def reached(condition):
    """The same in a loop."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.005)


class Gate(Semaphore):
    """Released once for each step that may go on. ``begun``: steps, the one that waits included."""

    begun = 0


@contextmanager
def gated(engine):
    """An engine each of whose steps waits at a gate."""
    gate, whole = Gate(0), engine.step

    def step():
        gate.begun += 1
        assert gate.acquire(timeout=PATIENCE)
        return whole()

    engine.step = step
    try:
        yield gate
    finally:
        del engine.step
        gate.release()  # the step that waits
