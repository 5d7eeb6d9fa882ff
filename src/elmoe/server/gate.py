"""In front of all routes: keys are checked, and one line of the log is written for each request."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Callable, Iterable
from time import perf_counter
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elmoe.server.errors import ApiError
from elmoe.untrusted import short

OPEN_PATHS = {"/health"}
"""Paths that need no key."""

log = logging.getLogger("elmoe.server")


class Gate:
    """An ASGI application in front of another. ``scope["facts"]`` is what the log line of a request tells.

    :param count: told the path and the status of each request.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[str], count: Callable[[str, int], None]) -> None:
        self._app, self._count = app, count
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = perf_counter(), 0
        facts: dict[str, Any] = {"method": scope["method"], "path": short(scope["path"], 120)}
        scope["facts"] = facts

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if self._allowed(scope):
                await self._app(scope, receive, noting)
            else:
                error = ApiError(
                    401, "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'", None, "invalid_api_key",
                    {"www-authenticate": "Bearer"},
                )  # fmt: skip
                await error.response(scope, receive, noting)
        finally:
            self._count(scope["path"], status)
            facts |= {"status": status, "seconds": round(perf_counter() - began, 4)}
            level = logging.DEBUG if scope["path"] in ("/health", "/metrics") else logging.INFO
            log.log(level, "request", extra={"facts": facts})

    def _allowed(self, scope: Scope) -> bool:
        if not self._keys or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        kind, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # All are compared, in the same time each.
        found = [hmac.compare_digest(digest, one) for one in self._keys]
        return kind.lower() == b"bearer" and any(found)
