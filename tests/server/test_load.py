"""Under load: the same text as alone, nobody lost, and clients that misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import random
import select
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from elmoe.server.app import create_app
from elmoe.server.settings import Settings
from tests.server.live import LiveServer
from tests.server.load import STREAM, WHOLE, answers, differing, random_case
from tests.server.waiting import PATIENCE, SCOPE, gated, reached, until


@pytest.mark.parametrize("budget", [(), ("--fast-memory", "24MiB", "--slow-bandwidth", "1GB/s")], ids=["memory", "disk"])
def test_same_text_as_alone(store, model, budget):
    rng = random.Random(len(budget))
    cases = [random_case(rng) for _ in range(40)]
    with LiveServer(str(store), "--model-name", "whale", "--queue", "256", *budget) as server:
        found = answers(server.url, cases)
    waited = [answer for case, answer in zip(cases, found, strict=True) if case.way in (WHOLE, STREAM)]
    assert len(waited) > 20 and None not in waited and any(answer is None for answer in found)
    assert not differing(model, cases, found)


SLOW = ("--mode", "plain", "--fast-memory", "24MiB", "--slow-bandwidth", "4MB/s")
"""A server whose steps take half a second: what it serves does not end by itself while a test looks."""


def healthy(url):
    """Whether a server answers; one that is full may close a connection under the request."""
    with suppress(httpx.HTTPError):
        return httpx.get(f"{url}/health", timeout=PATIENCE).status_code == 200
    return False


@pytest.mark.parametrize("tokens", [1, 30])
def test_what_comes_while_an_event_is_sent_is_not_lost(api, tokens):
    """The first event is on its way until the engine is done."""
    engine = api.app.state.service.engine
    body = {"model": "whale", "prompt": "The whale", "max_tokens": tokens, "temperature": 0}

    async def read_slowly():
        parts = [{"type": "http.request", "body": json.dumps(body | {"stream": True}).encode(), "more_body": False}]
        sent = []

        async def receive():
            if parts:
                return parts.pop()
            await asyncio.Event().wait()

        async def send(message):
            if message.get("body"):
                await reached(lambda: not engine.answers)
            sent.append(message.get("body", b""))

        await asyncio.wait_for(api.app(dict(SCOPE), receive, send), PATIENCE)
        return b"".join(sent).decode()

    events = [line[6:] for line in api.portal.call(read_slowly).split("\n\n") if line.startswith("data: {")]
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    whole = api.post("/v1/completions", json=body).json()["choices"][0]
    assert text == whole["text"] and json.loads(events[-1])["choices"][0]["finish_reason"] == "length"
    assert len(events) == min(tokens, 2)  # those that came together were sent together


@pytest.mark.parametrize("answers", [1, 2])
def test_tokens_gather_between_events(model, answers):
    """The first come at once, and the last ones with the end, however long the time between events is."""
    body = {"model": "whale", "prompt": "The whale", "max_tokens": 24, "temperature": 1, "seed": 3, "n": answers}
    with TestClient(create_app(model, Settings("whale", event_seconds=1e6))) as api:
        whole = api.post("/v1/completions", json=body).json()["choices"]
        lines = api.post("/v1/completions", json=body | {"stream": True}).text.split("\n\n")
    events = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert len(events) == 2 * answers
    for choice in whole:
        own = [event for event in events if event["index"] == choice["index"]]
        assert "".join(event["text"] for event in own) == choice["text"]
        assert [event["finish_reason"] for event in own] == [None, "length"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_before_the_next_step(api, stream):
    """With the engine of this process, whose steps can be let go one by one."""
    thread = api.app.state.service.engine
    engine = thread.engine
    body = {"model": "whale", "prompt": "The", "max_tokens": 1400, "ignore_eos": True, "temperature": 1.0, "stream": stream}

    async def leave(gate):
        left = asyncio.Event()
        parts = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive():
            if parts:
                return parts.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        task = asyncio.ensure_future(api.app(dict(SCOPE), receive, send))
        gate.release(3)
        await reached(lambda: gate.begun == 4)
        left.set()
        await asyncio.wait_for(task, PATIENCE)  # nobody waits for the step under way
        gate.release(2)  # that one, and the next, which reports the end
        await reached(lambda: not thread.answers)
        assert gate.begun == 5

    with gated(engine) as gate:
        api.portal.call(leave, gate)
        assert not engine.has_work and engine.cache.bytes_in_use == engine.cache.bytes_resting


def test_the_queue_is_bounded(store):
    """One runs and two wait for as long as it takes to refuse nine; there is room again once they have left."""
    body = {"model": "whale", "prompt": "The", "max_tokens": 500, "ignore_eos": True, "temperature": 0, "stream": True}

    async def main(url):
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as http:
            async with AsyncExitStack() as streams:
                asked = [http.stream("POST", "/v1/completions", json=body) for _ in range(3)]
                taken = [await streams.enter_async_context(one) for one in asked]
                assert [one.status_code for one in taken] == [200] * 3
                refused = await asyncio.gather(*(http.post("/v1/completions", json=body) for _ in range(9)))
            assert all(one.status_code == 429 and int(one.headers["retry-after"]) >= 1 for one in refused)
            assert all(one.json()["error"]["code"] == "queue_full" for one in refused)
            while (later := await http.post("/v1/completions", json=body | {"max_tokens": 1})).status_code == 429:
                await asyncio.sleep(0.05)
            assert later.status_code == 200 and later.text.endswith("data: [DONE]\n\n")

    with LiveServer(str(store), "--batch", "1", "--queue", "2", "--model-name", "whale", *SLOW) as server:
        asyncio.run(asyncio.wait_for(main(server.url), PATIENCE))


def connection(live):
    host, port = live.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def until_closed(one: socket.socket) -> bytes:
    """What a server sends on a connection before it closes it; head and body may come apart, and a close may be a reset."""
    parts = []
    with suppress(ConnectionResetError):
        while part := one.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def test_half_sent_heads_and_bodies_are_dropped(store):
    """The server waits a bounded time; meanwhile others are served."""
    with LiveServer(str(store), "--body-timeout", "1", "--max-body", "1MiB") as server:
        assert healthy(server.url)
        before = server.memory()
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 900000\r\n"
        halves = [connection(server) for _ in range(24)]
        for index, half in enumerate(halves):
            half.sendall((b"", head, head + b'\r\n{"model"', head + b'\r\n{"user": "' + b"x" * 800_000)[index % 4])
        assert healthy(server.url)
        for index, reply in enumerate([until_closed(half) for half in halves]):
            half_bodies = index % 4 > 1
            assert (b"408" in reply and b"did not arrive" in reply) if half_bodies else reply == b"", (index, reply)
        huge = connection(server)
        with pytest.raises(ConnectionError):
            huge.sendall(b"GET / HTTP/1.1\r\n")
            while True:  # what is not read fills the buffers of the connection, and nothing else
                huge.sendall(b"x-filler: " + b"a" * 5000 + b"\r\n")
        assert server.memory() - before < 32 << 20
        for one in (*halves, huge):
            one.close()


def test_a_flood_of_connections_is_refused(store):
    with LiveServer(str(store), "--max-connections", "40") as server:
        flood = [connection(server) for _ in range(60)]
        refused, open_ = 0, set(flood)
        end = time.monotonic() + PATIENCE
        while refused < 20:
            assert time.monotonic() < end
            for one in select.select(list(open_), [], [], 1)[0]:
                refused += b"429" in until_closed(one)
                open_.discard(one)
        assert refused == 20 and len(open_) == 40
        for one in flood:
            one.close()
        until(lambda: healthy(server.url))


def test_bodies_are_bounded_together(model):
    """Each of them is small enough."""
    settings = Settings("whale", body_bytes=1 << 20, all_body_bytes=2 << 20)
    body = json.dumps({"model": "whale", "prompt": "The", "max_tokens": 1, "user": "x" * 900_000}).encode()
    with TestClient(create_app(model, settings), raise_server_exceptions=False) as api:
        held = api.app.state.held

        async def main():
            arrived = asyncio.Event()

            async def send_half(sent):
                parts = [body[:800_000]]

                async def receive():
                    if parts:
                        return {"type": "http.request", "body": parts.pop(), "more_body": True}
                    await arrived.wait()
                    return {"type": "http.disconnect"}

                async def send(message):
                    sent.append(message)

                await api.app(dict(SCOPE), receive, send)

            replies = [[] for _ in range(3)]
            tasks = [asyncio.ensure_future(send_half(sent)) for sent in replies]
            await reached(lambda: any(replies))
            assert held.bytes == 1_600_000
            arrived.set()
            await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
            return replies

        (refused,) = [sent for sent in api.portal.call(main) if sent and sent[0]["status"] == 429]
        assert json.loads(refused[1]["body"])["error"]["code"] == "too_many_bodies"
        assert (b"retry-after", b"1") in refused[0]["headers"] and held.bytes == 0
        headers = {"content-type": "application/json"}
        assert [api.post("/v1/completions", content=body, headers=headers).status_code for _ in range(4)] == [200] * 4
        assert held.bytes == 0


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


def running(server):
    """Whether an answer runs."""
    return "elmoe_requests_running 1" in httpx.get(f"{server.url}/metrics", timeout=PATIENCE).text


def test_the_first_signal_lets_what_runs_end(store):
    body = {"model": "whale", "prompt": "The", "max_tokens": 6, "ignore_eos": True, "seed": 1}
    with LiveServer(str(store), "--model-name", "whale", *SLOW) as server, ThreadPoolExecutor() as threads:
        asked = threads.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
        until(lambda: running(server))
        os.kill(server.process.pid, signal.SIGINT)
        assert asked.result().json()["usage"]["completion_tokens"] == 6
        assert server.process.wait(PATIENCE) == 0


def test_the_second_signal_ends_what_runs(store):
    body = {"model": "whale", "prompt": "The", "max_tokens": 1500, "ignore_eos": True, "seed": 1}
    with LiveServer(str(store), "--model-name", "whale", *SLOW) as server, ThreadPoolExecutor() as threads:
        asked = threads.submit(httpx.post, f"{server.url}/v1/completions", json=body, timeout=PATIENCE)
        until(lambda: running(server))
        os.kill(server.process.pid, signal.SIGINT)
        until(lambda: any(line["message"].startswith("ending") for line in server.log()))
        os.kill(server.process.pid, signal.SIGINT)
        assert server.process.wait(PATIENCE) == 130
        assert isinstance(asked.exception(), httpx.HTTPError)
        assert "Traceback" not in server.text()


def test_a_server_that_was_killed_starts_again(store):
    """On the same port, with the same answers; ready in little time of the processor, whoever else uses it."""
    body = {"model": "whale", "prompt": "The whale", "max_tokens": 8, "temperature": 0}
    with LiveServer(str(store), "--model-name", "whale", *SLOW) as server, ThreadPoolExecutor() as threads:
        asked = threads.submit(
            httpx.post, f"{server.url}/v1/completions", json=body | {"max_tokens": 1500}, timeout=PATIENCE
        )
        until(lambda: running(server))
        server.process.kill()
        assert isinstance(asked.exception(), httpx.HTTPError)
        port = server.url.rpartition(":")[2]
    answers = []
    for _ in range(2):
        with LiveServer(str(store), "--model-name", "whale", "--port", port) as server:
            used = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
            assert (int(used[11]) + int(used[12])) / os.sysconf("SC_CLK_TCK") < 6
            answers.append(httpx.post(f"{server.url}/v1/completions", json=body, timeout=PATIENCE).json()["choices"])
            server.process.kill()
    assert answers[0] == answers[1]


def test_a_step_that_fails_ends_its_requests_and_no_others(model):
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
    """With steps that do not end before the time is up."""
    body = {"model": "whale", "prompt": "The", "max_tokens": 1900, "ignore_eos": True, "temperature": 1}
    settings = Settings("whale", request_seconds=1.0, ping_seconds=0.05)
    with TestClient(create_app(model, settings), raise_server_exceptions=False) as api, gated(model.engine) as gate:
        whole = api.post("/v1/completions", json=body)
        assert whole.status_code == 504 and whole.json()["error"]["code"] == "timeout"
        stream = api.post("/v1/completions", json=body | {"stream": True}).text
        assert ": 0 of" in stream and '"code":"timeout"' in stream
        gate.release(10)
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
