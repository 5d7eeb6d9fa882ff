"""Reading bodies: bounded in size, time and depth, one by one and together; strict JSON alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from elmoe.errors import RequestError
from elmoe.server.errors import ApiError
from elmoe.server.settings import Settings
from elmoe.units import format_bytes
from elmoe.untrusted import load_object

_CLOSE = {"connection": "close"}


class Held:
    """Bytes of all bodies that an application holds."""

    bytes = 0


class BoundedRequest(Request):
    """A request whose body may not be larger, slower or deeper than the settings say."""

    _whole: bytes | None = None
    held = 0
    """Bytes of the body so far."""

    async def body(self) -> bytes:
        """The whole body."""
        if self._whole is None:
            settings: Settings = self.app.state.settings
            if self.method in ("POST", "PUT", "PATCH"):
                kind = self.headers.get("content-type", "").split(";")[0].strip().lower()
                if kind != "application/json":  # a form of another site's page could send anything else
                    raise ApiError(415, "the content type is not application/json", "content-type", "unsupported_media_type")
            length = self.headers.get("content-length", "")
            if length.isdigit() and int(length) > settings.body_bytes:
                raise _too_large(settings)
            try:
                async with asyncio.timeout(settings.body_seconds):
                    self._whole = await self._bounded(settings)
            except TimeoutError:
                told = f"the body did not arrive within {settings.body_seconds:g} s"
                raise ApiError(408, told, None, "timeout", _CLOSE) from None
        return self._whole

    async def _bounded(self, settings: Settings) -> bytes:
        parts: list[bytes] = []
        all_: Held = self.app.state.held
        async for part in self.stream():
            parts.append(part)
            self.held += len(part)
            all_.bytes += len(part)
            if self.held > settings.body_bytes:
                raise _too_large(settings)
            if all_.bytes > max(settings.all_body_bytes, settings.body_bytes):
                told = f"all bodies together are larger than {format_bytes(settings.all_body_bytes)}: try again"
                raise ApiError(429, told, None, "too_many_bodies", _CLOSE | {"retry-after": "1"})
        return b"".join(parts)

    def forget(self) -> None:
        """The body is not needed any more."""
        self.app.state.held.bytes -= self.held
        self.held = 0

    async def json(self) -> Any:
        """The body as an object."""
        raw = await self.body()
        try:
            return load_object(raw, "the body", RequestError, non_finite=False)
        except RequestError as error:
            raise ApiError(400, str(error).replace("'the body'", "the body"), None, "invalid_json") from None


def _too_large(settings: Settings) -> ApiError:
    told = f"the body is larger than {format_bytes(settings.body_bytes)}: shorten it"
    return ApiError(413, told, None, "body_too_large", _CLOSE)


class BoundedRoute(APIRoute):
    """A route that reads its bodies so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """See ``APIRoute``."""
        handler = super().get_route_handler()

        async def bounded(request: Request) -> Response:
            own = BoundedRequest(request.scope, request.receive)
            try:
                return await handler(own)
            finally:
                own.forget()

        return bounded
