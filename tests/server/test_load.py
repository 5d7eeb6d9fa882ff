"""Under load: the same text as alone, nobody lost, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest

from tests.server.live import LiveServer
from tests.server.load import answers, differing, random_case


@pytest.mark.parametrize("budget", [(), ("--fast-memory", "24MiB", "--slow-bandwidth", "1GB/s")], ids=["memory", "disk"])
def test_same_text_as_alone(store, model, budget):
    rng = random.Random(len(budget))
    cases = [random_case(rng) for _ in range(40)]
    with LiveServer(str(store), "--model-name", "whale", "--queue", "256", *budget) as server:
        found = answers(server.url, cases)
    assert sum(answer is not None for answer in found) > 25 and any(answer is None for answer in found)
    assert not differing(model, cases, found)


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


SCOPE = {
    "type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions", "query_string": b"",
    "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http", "root_path": "",
    "server": ("test", 80), "client": ("test", 1),
}  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 30])
def test_what_comes_while_an_event_is_sent_is_not_lost(api, tokens):
    """A connection that takes each event slowly, so that the engine is done before."""
    body = {"model": "whale", "prompt": "The whale", "max_tokens": tokens, "temperature": 0}

    async def read_slowly():
        parts = [{"type": "http.request", "body": json.dumps(body | {"stream": True}).encode(), "more_body": False}]
        sent = []

        async def receive():
            if parts:
                return parts.pop()
            await asyncio.sleep(60)

        async def send(message):
            await asyncio.sleep(0.1)
            sent.append(message.get("body", b""))

        await asyncio.wait_for(api.app(dict(SCOPE), receive, send), 20)
        return b"".join(sent).decode()

    events = [line[6:] for line in api.portal.call(read_slowly).split("\n\n") if line.startswith("data: {")]
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    whole = api.post("/v1/completions", json=body).json()["choices"][0]
    assert text == whole["text"] and json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
    assert len(events) < max(tokens, 2)  # those that came together were sent together


def test_a_client_that_leaves_ends_its_request_at_once(api, model):
    """With the engine of this process, whose requests can be counted."""
    engine = api.app.state.service.engine
    body = {"model": "whale", "prompt": "The", "max_tokens": 1400, "ignore_eos": True, "temperature": 1.0}

    async def leave(stream):
        left, first = asyncio.Event(), asyncio.Event()
        parts = [{"type": "http.request", "body": json.dumps(body | {"stream": stream}).encode(), "more_body": False}]

        async def receive():
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            first.set()

        task = asyncio.ensure_future(api.app(dict(SCOPE), receive, send))
        while not engine.engine.scheduler.running:
            await asyncio.sleep(0.01)
        left.set()
        await asyncio.wait_for(task, 20)
        while engine.answers:
            await asyncio.sleep(0.01)
        return engine.engine.scheduler.has_work

    for stream in (False, True):
        began = engine.engine.statistics.committed
        assert api.portal.call(leave, stream) is False
        assert engine.engine.statistics.committed - began < 1400
    assert engine.answers == 0 and engine.engine.cache.bytes_in_use == 0


def test_the_queue_is_bounded(store):
    with LiveServer(str(store), "--batch", "1", "--queue", "2", "--model-name", "whale") as server:
        body = {"model": "whale", "prompt": "The", "max_tokens": 300, "ignore_eos": True, "temperature": 0, "stream": True}

        async def main():
            async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
                responses = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(12)))
                return responses, await http.post("/v1/completions", json=body)

        responses, later = asyncio.run(main())
        served = [one for one in responses if one.status_code == 200]
        refused = [one for one in responses if one.status_code == 429]
        assert len(served) >= 3 and len(refused) >= 5 and len(served) + len(refused) == 12
        assert all(int(one.headers["retry-after"]) >= 1 and one.json()["error"]["code"] == "queue_full" for one in refused)
        assert later.status_code == 200 and all(one.text.endswith("data: [DONE]\n\n") for one in served)


def connection(live):
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def until_closed(one: socket.socket) -> bytes:
    """What a server sends on a connection before it closes it; head and body may come apart."""
    parts = []
    while part := one.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def test_half_sent_heads_and_bodies_are_dropped(store):
    """The server waits a bounded time; meanwhile others are served."""
    from elmoe.server import listening

    with LiveServer(str(store), "--max-connections", "40", "--body-timeout", "1") as server:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n"
        halves = [connection(server) for _ in range(12)]
        for index, half in enumerate(halves):
            half.sendall((b"", head, head + b'\r\n{"model"')[index % 3])
        assert httpx.get(f"{server.url}/health").status_code == 200
        for index, reply in enumerate([until_closed(half) for half in halves]):
            assert (b"408" in reply and b"did not arrive" in reply) if index % 3 == 2 else reply == b""
        huge = connection(server)
        with pytest.raises(OSError):
            huge.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(1000):
                huge.sendall(b"x-filler: " + b"a" * 5000 + b"\r\n")
                time.sleep(0.002)
        assert listening.HEAD_BYTES < 5_000_000
        flood = [connection(server) for _ in range(60)]
        time.sleep(0.3)
        refused = 0
        for one in flood:
            one.setblocking(False)
            with suppress(BlockingIOError):
                refused += b"429" in one.recv(4096)
        assert refused >= 15
        for one in (*halves, *flood, huge):
            one.close()
        until(lambda: httpx.get(f"{server.url}/health").status_code == 200)


def test_a_reader_that_is_slow_gets_everything(live):
    body = {"model": "whale", "prompt": "The", "max_tokens": 1500, "ignore_eos": True, "temperature": 1, "stream": True}
    raw = json.dumps(body).encode()
    with connection(live) as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(raw)}\r\n"
        )
        slow.sendall(head.encode() + b"connection: close\r\n\r\n" + raw)
        quick = httpx.post(f"{live.url}/v1/completions", json=body | {"max_tokens": 5, "stream": False}, timeout=60)
        assert quick.status_code == 200
        received = b""
        while part := slow.recv(1 << 16):
            received += part
    assert b"data: [DONE]" in received and b'"finish_reason": "length"' in received


@pytest.mark.parametrize("signals", [1, 2])
def test_signals(store, signals):
    """The first lets what runs end, the second does not."""
    server = LiveServer(str(store), "--model-name", "whale")
    try:
        body = {"model": "whale", "prompt": "The", "max_tokens": 1500, "ignore_eos": True, "seed": 1}
        found = {}

        def ask():
            try:
                found["answer"] = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
            except httpx.HTTPError as error:
                found["error"] = error

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.5)
        for _ in range(signals):
            os.kill(server.process.pid, signal.SIGINT)
            time.sleep(0.2)
        status = server.process.wait(60)
        asking.join()
        if signals == 1:
            assert status == 0 and found["answer"].json()["usage"]["completion_tokens"] == 1500
        else:
            assert status == 130 and "error" in found
            assert "Traceback" not in server.text()
    finally:
        server.close()


def test_a_step_that_fails_ends_its_requests_and_no_others(model):
    from fastapi.testclient import TestClient

    from elmoe.server.app import create_app
    from elmoe.server.settings import Settings

    body = {"model": "whale", "prompt": "The", "max_tokens": 20, "temperature": 0}
    with TestClient(create_app(model, Settings("whale")), raise_server_exceptions=False) as api:
        expected = api.post("/v1/completions", json=body).json()["choices"]
        whole = model.engine.scheduler.schedule

        def fail():
            raise OSError("the disk is gone")

        model.engine.scheduler.schedule = fail
        try:
            failed = api.post("/v1/completions", json=body)
            assert failed.status_code == 500 and "disk" not in failed.text
            assert api.get("/health").status_code == 503
            streamed = api.post("/v1/completions", json=body | {"stream": True})
            assert '"internal_error"' in streamed.text and "[DONE]" not in streamed.text
        finally:
            model.engine.scheduler.schedule = whole
        assert api.post("/v1/completions", json=body).json()["choices"] == expected
        assert api.get("/health").status_code == 200 and api.app.state.service.engine.answers == 0


def test_time_is_bounded_and_silence_is_filled(model):
    from fastapi.testclient import TestClient

    from elmoe.server.app import create_app
    from elmoe.server.settings import Settings

    body = {"model": "whale", "prompt": "The", "max_tokens": 1900, "ignore_eos": True, "temperature": 1}
    settings = Settings("whale", request_seconds=0.2, ping_seconds=0.05)
    with TestClient(create_app(model, settings), raise_server_exceptions=False) as api:
        whole = api.post("/v1/completions", json=body)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        real = model.engine.step

        def slow():
            time.sleep(0.15)
            return real()

        model.engine.step = slow
        try:
            stream = api.post("/v1/completions", json=body | {"stream": True}).text
        finally:
            del model.engine.step
        assert ": 0 of" in stream and '"code":"timeout"' in stream
        until(lambda: api.app.state.service.engine.answers == 0)


def test_what_is_cancelled_at_the_end_is_no_news():
    import asyncio
    import logging

    from elmoe.server.logs import _worth_telling

    def worth(message: str, error: BaseException | None = None) -> bool:
        info = None if error is None else (type(error), error, None)
        return _worth_telling(logging.LogRecord("uvicorn.error", logging.ERROR, "", 0, message, None, info))

    assert not worth("Exception in ASGI application", asyncio.CancelledError())
    assert not worth("Traceback (most recent call last):\nasyncio.exceptions.CancelledError\n")
    assert worth("Exception in ASGI application", ValueError()) and worth("listening")
