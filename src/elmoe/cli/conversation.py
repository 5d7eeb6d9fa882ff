"""A chat with a model: its messages, its settings, and who answers: a model of this process, or a server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

from elmoe.errors import RequestError
from elmoe.untrusted import load_object, short

if TYPE_CHECKING:
    from elmoe.llm import Model

SETTINGS: dict[str, type] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "seed": int, "max_tokens": int,
    "presence_penalty": float, "frequency_penalty": float, "repetition_penalty": float,
}  # fmt: skip
"""Settings of a chat and their types."""
LONGEST_LINE, LONGEST_ERROR = 4 << 20, 64 << 10
"""Bytes of the longest event of a server, and of the longest error that is read."""
SECONDS = 600
"""Longest silence of a server."""


@dataclass
class Statistics:
    """Of one answer. ``cached_tokens``: of the prompt, computed for the turns before."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    first_token_seconds: float = 0.0
    seconds: float = 0.0
    finish_reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the rate behind the first token."""
        rest = self.seconds - self.first_token_seconds
        rate = round((self.tokens - 1) / rest, 1) if self.tokens > 1 and rest > 0 else None
        times = {"first_token_seconds": round(self.first_token_seconds, 3), "seconds": round(self.seconds, 3)}
        return {"prompt_tokens": self.prompt_tokens, "cached_tokens": self.cached_tokens, "tokens": self.tokens, **times,
                "tokens_per_second": rate, "finish_reason": self.finish_reason}  # fmt: skip


class Answerer(Protocol):
    """Who answers. ``name``: of the model."""

    name: str

    def answer(self, messages: list[dict[str, str]], settings: dict[str, Any], told: Statistics) -> Generator[str]:
        """Pieces of the answer; ``told`` is filled in. ElmoeError where it is refused."""
        ...


class Local:
    """A model of this process."""

    def __init__(self, model: Model) -> None:
        self._model, self.name = model, model.path.name

    def answer(self, messages: list[dict[str, str]], settings: dict[str, Any], told: Statistics) -> Generator[str]:
        """See ``Answerer``."""
        prompt = self._model.chat_tokens(messages)
        told.prompt_tokens = len(prompt)
        with self._model.stream(prompt, **settings) as stream:
            for piece in stream:
                told.tokens += len(piece.token_ids)
                told.finish_reason, told.cached_tokens = piece.finish_reason, piece.cached_tokens
                yield piece.text


class Remote:
    """A server of OpenAI's API.

    :param url: with or without ``/v1``. :raises RequestError: it does not answer, or has no such model.
    """

    def __init__(self, url: str, key: str | None, model: str | None) -> None:
        self._url, self._key = url.rstrip("/").removesuffix("/v1") + "/v1", key
        self._broke_off = f"{self._url} broke off"
        with closing(self._open("/models", None)) as response, self._naming_failures(self._broke_off):
            found = load_object(response.read(LONGEST_LINE), self._url, RequestError)
        cards = found.get("data")
        names = [str(card.get("id")) for card in cards if isinstance(card, dict)] if isinstance(cards, list) else []
        if model is None and not names:
            raise RequestError(f"{self._url} serves no model", "give --model")
        self.name = model or names[0]

    def answer(self, messages: list[dict[str, str]], settings: dict[str, Any], told: Statistics) -> Generator[str]:
        """See ``Answerer``."""
        body = {"model": self.name, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        with closing(self._open("/chat/completions", body | settings)) as response, self._naming_failures(self._broke_off):
            while raw := response.readline(LONGEST_LINE):
                line = raw.decode("utf-8", "replace").strip()
                if line == "data: [DONE]":
                    return
                if not line.startswith("data:"):
                    continue
                event = load_object(line.removeprefix("data:"), "an event of the server", RequestError)
                if "error" in event:
                    raise _told(event)
                yield _text_of(event, told)
        if told.finish_reason is None:
            raise RequestError(f"{self._broke_off} in its answer")

    @contextmanager
    def _naming_failures(self, what: str) -> Iterator[None]:
        """Turns failures of the connection into a RequestError."""
        try:
            yield
        except (OSError, ValueError, HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise RequestError(f"{what}: {short(reason)}", "start it: elmoe serve STORE") from None

    def _open(self, path: str, body: dict[str, Any] | None) -> Any:
        """The answer to a request; with its own words where it is an error."""
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        with self._naming_failures(f"cannot reach {self._url}"):
            try:
                return urllib.request.urlopen(urllib.request.Request(self._url + path, data, headers), timeout=SECONDS)
            except urllib.error.HTTPError as error:
                with error:
                    raw = error.read(LONGEST_ERROR)
                try:
                    found = load_object(raw, "the answer", RequestError)
                except RequestError:
                    found = {}
                raise _told(found, f"{self._url} answers {error.code} {error.reason}") from None


def _text_of(event: dict[str, Any], told: Statistics) -> str:
    """The text of an event."""
    usage = event.get("usage")
    if isinstance(usage, dict):
        details = usage.get("prompt_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else None
        counts = usage.get("prompt_tokens"), cached, usage.get("completion_tokens")
        told.prompt_tokens, told.cached_tokens, told.tokens = (one if isinstance(one, int) else 0 for one in counts)
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    told.finish_reason = choice.get("finish_reason") or told.finish_reason
    delta = choice.get("delta")
    return str(delta.get("content") or "") if isinstance(delta, dict) else ""


def _told(answer: dict[str, Any], otherwise: str = "the server failed") -> RequestError:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return RequestError(short(message or otherwise))


@dataclass
class Conversation:
    """A chat under way."""

    answerer: Answerer
    system: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)
    last: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget what was said."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def set(self, name: str, value: str) -> None:
        """Change a setting; RequestError for one that does not exist."""
        if name not in SETTINGS:
            raise RequestError(f"there is no setting '{short(name, 40)}'", f"there are {', '.join(SETTINGS)}")
        if value == "default":
            self.settings.pop(name, None)
            return
        try:
            self.settings[name] = SETTINGS[name](value)
        except ValueError:
            raise RequestError(f"'{short(value, 40)}' is no {SETTINGS[name].__name__}", "give a number") from None

    def say(self, text: str) -> Generator[str]:
        """Pieces of the answer. What was written when the iterator is closed stays in the chat; a message that was refused,
        or whose answer did not begin, does not."""
        self.messages.append({"role": "user", "content": text})
        self.last, began, pieces, answered = Statistics(), perf_counter(), list[str](), False
        try:
            with closing(self.answerer.answer(self.messages, self.settings, self.last)) as answer:
                for piece in answer:
                    if piece and not pieces:
                        self.last.first_token_seconds = perf_counter() - began
                    pieces.append(piece)
                    yield piece
            answered = True
        except (GeneratorExit, KeyboardInterrupt):
            answered = any(pieces)
            raise
        finally:
            self.last.seconds = perf_counter() - began
            if answered:
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                del self.messages[-1]
