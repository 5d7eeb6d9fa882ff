"""What goes wrong, in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from elmoe.untrusted import short

KINDS = {401: "authentication_error", 404: "not_found_error", 408: "timeout_error", 429: "rate_limit_error"}
"""Status -> type, where it is not told by the first digit alone."""
COMING = {
    "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "tool_calls", "audio", "modalities",
    "prediction", "web_search_options",
}  # fmt: skip
"""Parameters of OpenAI's API that are to come."""
COMING_VALUES = {"tool", "function", "image_url", "input_audio", "file", "refusal"}
"""Roles and kinds of content that are to come."""
WORDS = {"None": "null", "True": "true", "False": "false"}
"""Python's words and JSON's."""
WRONG_TYPE = {"string_type", "list_type", "dict_type", "int_type", "float_type", "bool_type", "none_required"}
"""Errors of an alternative that was not meant."""
SCALAR = bool | int | float | str
_PYTHON = re.compile("|".join(rf"\b{word}\b" for word in WORDS))
_ALTERNATIVE = re.compile(r"[^\w.-]|^(str|int|float|bool|list|dict|none|constrained-\w+)$")
"""Parts of an error's place that name an alternative of a union, or that no field is called."""
_SHOWN = 120
"""Characters of a value that a message repeats."""


class ApiError(HTTPException):
    """An answer that is an error.

    :param param: the field of the request that is wrong. :param code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, dict(headers or {}))
        self.message, self.param, self.code = message, param, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as JSON."""
        kind = KINDS.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The error as an answer."""
        return JSONResponse(self.body, self.status_code, self.headers or None)


def with_hint(message: str, hint: str | None) -> str:
    """An error of the engine in one line."""
    return f"{message}; {hint}" if hint else message


def not_yet(name: str, param: str | None = None) -> ApiError:
    """The refusal of a parameter that is to come."""
    return ApiError(400, f"'{name}' is not supported yet: leave it out", param or name, "unsupported_parameter")


def _fields(error: Mapping[str, Any]) -> list[str]:
    """The place of an error without alternatives of unions."""
    place = [str(part) for part in error["loc"] if part not in ("body", "path", "query")]
    return [part for part in place if not _ALTERNATIVE.search(part)]


def _alternative(error: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(part) for part in error["loc"] if _ALTERNATIVE.search(str(part)))


def invalid(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """What is wrong with a body, named by its field: of several errors the one that lies deepest, is of the type that was
    given, of the alternative with the fewest, and last in its list, because all alternatives of a union are reported."""
    wrong = Counter(map(_alternative, errors))

    def rank(error: Mapping[str, Any]) -> tuple[int, bool, int, int]:
        last = error["loc"][-1]
        meant = error["type"] not in WRONG_TYPE
        return len(_fields(error)), meant, -wrong[_alternative(error)], last if isinstance(last, int) else -1

    error = max(errors, key=rank)
    place = [str(part) for part in error["loc"] if part not in ("body", "path", "query")]
    param = ".".join(_fields(error)) or None
    if error["type"] == "extra_forbidden":
        name = short(place[-1], 60)
        if name in COMING:
            return not_yet(name, short(param, _SHOWN))
        return ApiError(400, f"there is no parameter '{name}'", short(param, _SHOWN), "unknown_parameter")
    if error["type"] == "missing":
        return ApiError(400, f"{param or 'the body'} is missing", param, "missing_required_parameter")
    if error["type"] == "none_required" and place[-1] in COMING:
        return not_yet(place[-1], short(param, _SHOWN))
    told = str(error["msg"]).removeprefix("Value error, ")
    told = _PYTHON.sub(lambda word: WORDS[word[0]], told[:1].lower() + told[1:])
    value = error.get("input")
    if value in COMING_VALUES if isinstance(value, str) else False:
        return ApiError(400, f"{param} is '{value}', which is not supported yet: send text", param, "unsupported_value")
    shown = f" is {short(WORDS.get(repr(value), repr(value)), _SHOWN)}" if value is None or isinstance(value, SCALAR) else ""
    return ApiError(400, f"{param or 'the body'}{shown}: {told}", param, "invalid_value")


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Errors of routes, and those that are raised on purpose."""
    assert isinstance(error, HTTPException)
    if not isinstance(error, ApiError):
        path = short(request.url.path, _SHOWN)
        told = {404: f"there is no {path}", 405: f"{path} does not take {request.method}"}
        error = ApiError(error.status_code, told.get(error.status_code, error.detail), headers=error.headers)
    return error.response


async def on_invalid(request: Request, error: Exception) -> JSONResponse:
    """Bodies that do not fit their description."""
    assert isinstance(error, RequestValidationError)
    return invalid(error.errors()).response
