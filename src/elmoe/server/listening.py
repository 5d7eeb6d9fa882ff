"""Sockets, signals and connections: uvicorn with the bounds that it leaves out."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import resource
import socket
import ssl
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from elmoe.errors import RequestError
from elmoe.server.app import STOP_SECONDS, Service
from elmoe.server.errors import ApiError
from elmoe.server.settings import Settings

BACKLOG = 256
"""Connections that may wait to be accepted."""
HEAD_BYTES = 64 << 10
"""Largest head of a request."""
CLOSING_TICKS = 100
"""Ticks of 0.1 s between looks at connections that are closing: what a client has not read by the second one is dropped."""
SWITCH_SECONDS = 0.0005
"""Longest time that the loop or the engine's thread keeps the interpreter while the other waits."""

log = logging.getLogger("elmoe.server")


class BoundedProtocol(HttpToolsProtocol):
    """Connections whose number, and the size and time of the heads of their requests, are bounded."""

    settings: Settings
    _timer: asyncio.TimerHandle | None = None
    _head = 0
    """Bytes of the head that is being received; -1 behind it."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See ``asyncio.Protocol``."""
        super().connection_made(transport)
        if len(self.connections) > self.settings.connections:
            told = f"{self.settings.connections} connections are open, the most: try again"
            self._refuse(ApiError(429, told, None, "too_many_connections"), b"retry-after: 1\r\n")
        else:
            self._expect_head()

    def data_received(self, data: bytes) -> None:
        """See ``asyncio.Protocol``."""
        if self._head >= 0:
            self._head += len(data)
            if self._head > HEAD_BYTES and len(data) < self._head:  # a body may come with all of a head
                self._refuse(ApiError(431, f"the head of the request is larger than {HEAD_BYTES} bytes"))
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self._expect_head()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._forget_timer()
        self._head = -1
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """See ``asyncio.Protocol``."""
        self._forget_timer()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._forget_timer()
        self._head = 0
        self._timer = self.loop.call_later(self.settings.body_seconds, self.transport.abort)

    def _forget_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, error: ApiError, headers: bytes = b"") -> None:
        body = json.dumps(error.body).encode()
        head = b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n"
        self.transport.write(head % (error.status_code, len(body)) + headers + b"\r\n" + body)
        self.transport.close()


class Server(uvicorn.Server):
    """Finishes what runs at the first signal, ends it at the second."""

    forced = False

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._serving_loop = asyncio.get_running_loop()
        self._closing: set[Any] = set()
        await super()._serve(sockets)
        if self.forced:
            await self.lifespan.shutdown()  # which uvicorn leaves out
        self._captured_signals.clear()  # uvicorn would raise them again

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        if self.should_exit:
            self.forced = self.force_exit = True
            for connection in list(self.server_state.connections):
                self._serving_loop.call_soon_threadsafe(connection.transport.abort)
        else:
            log.info("ending: finishing what runs; a second signal ends it at once", extra={"facts": {"signal": sig}})
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second."""
        if counter % CLOSING_TICKS == 0:
            closing = {one for one in self.server_state.connections if one.transport.is_closing()}
            for connection in closing & self._closing:
                connection.transport.abort()
            self._closing = closing
        return await super().on_tick(counter)


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at an address; RequestError where it is taken, or not of this machine."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        told = f"cannot listen on {host}, port {port}: {error.strerror}"
        raise RequestError(told, "give another --port or --host") from None
    return bound


def check_tls(certificate: Path | None, key: Path | None) -> None:
    """RequestError where the files of a certificate and its key do not fit."""
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise RequestError("a certificate and its key belong together", "give --tls-cert and --tls-key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        told = f"cannot use the certificate '{certificate}' with the key '{key}': {error.strerror or error}"
        raise RequestError(told, "give PEM files that belong together") from None


def serve(app: FastAPI, listener: socket.socket, certificate: Path | None = None, key: Path | None = None) -> bool:
    """Serve until a signal comes; whether everything ended in good order."""
    service: Service = app.state.service
    host, port = listener.getsockname()[:2]
    scheme = "https" if certificate else "http"
    shown = f"[{host}]" if ":" in host else host
    listener.listen(BACKLOG)  # clients wait from now on
    sys.setswitchinterval(SWITCH_SECONDS)
    with suppress(ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    protocol = type("Protocol", (BoundedProtocol,), {"settings": service.settings})
    config = uvicorn.Config(
        app, http=protocol, ws="none", loop="asyncio", log_config=None, access_log=False, lifespan="on", server_header=False,
        ssl_certfile=certificate, ssl_keyfile=key, timeout_keep_alive=30, backlog=BACKLOG,
    )  # fmt: skip
    server = Server(config)
    url = f"{scheme}://{shown}:{port}"
    chat = f"elmoe chat {url}" if service.model.reader.chat_template() is not None else None
    service.started = partial(log.info, "listening", extra={"facts": {"url": url, "try": chat}})
    asyncio.run(server.serve([listener]))
    if not service.engine.stop(STOP_SECONDS):
        log.error("the step under way does not end")
        os._exit(1)  # its kernels read memory that must not go away under them
    return not server.forced
