"""A chat with a server that fails, or with an answer that does: an error that says so, and no message half told."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest
from click.testing import CliRunner

from elmoe.cli.chat import command
from elmoe.cli.conversation import Conversation, Remote
from elmoe.errors import RequestError
from tests.templated import templated_store

MODELS = b'{"data": [{"id": "m"}]}'
DONE = b"data: [DONE]\n\n"


def answer(body: bytes, length: int | None = None) -> bytes:
    """Of a server, with a body of this length told."""
    return f"HTTP/1.1 200 OK\r\ncontent-length: {length or len(body)}\r\n\r\n".encode() + body


def event(**told: object) -> bytes:
    return b"data: " + json.dumps(told).encode() + b"\n\n"


HELLO = event(choices=[{"delta": {"content": "hello"}}])


@contextmanager
def server(*answers: bytes) -> Iterator[str]:
    """A server that gives one of these answers to each connection, whatever it is asked."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            for one in answers:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(1 << 16)
                    connection.sendall(one)
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(1 << 16):
                        pass

        thread = Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        thread.join(10)


@pytest.mark.parametrize(
    "told,named",
    [
        (b"SSH-2.0-x\r\n", "cannot reach .*: SSH"),
        (answer(b'{"data": null}'), "serves no model"),
        (answer(b'{"data": 5}'), "serves no model"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"a" * 70_000, "cannot reach .*: got more than"),
    ],
)
def test_what_is_no_server_is_told(told, named):
    with server(told) as url, pytest.raises(RequestError, match=named):
        Remote(url, None, None)
    with pytest.raises(RequestError, match="cannot reach http://a b/v1"):
        Remote("http://a b", None, None)


@pytest.mark.parametrize(
    "told,named",
    [
        (answer(HELLO), "broke off in its answer"),
        (answer(HELLO, 1000), "broke off"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nab", "broke off"),
        (answer(HELLO + event(error={"message": "no room"}) + DONE), "no room"),
    ],
)
def test_an_answer_that_fails_is_told_and_leaves_the_chat_as_it_was(told, named):
    with server(answer(MODELS), told) as url:
        chat = Conversation(Remote(url, None, None), system="be kind")
        with pytest.raises(RequestError, match=named):
            list(chat.say("hi"))
    assert chat.messages == [{"role": "system", "content": "be kind"}]


@pytest.mark.parametrize("count", [None, "12", 1e300, 7])
def test_counts_of_a_server_may_be_anything(count):
    with server(answer(MODELS), answer(HELLO + event(usage={"prompt_tokens": count}) + DONE)) as url:
        chat = Conversation(Remote(url, None, None))
        assert "".join(chat.say("hi")) == "hello"
    assert chat.last.prompt_tokens == (7 if count == 7 else 0) and chat.last.cached_tokens == 0
    assert [one["role"] for one in chat.messages] == ["user", "assistant"]


class Silent:
    """Says nothing: the model ended at once, or somebody pressed Ctrl-C before it began."""

    name = "silent"

    def __init__(self, error: BaseException | None = None) -> None:
        self._error = error

    def answer(self, messages, settings, told):
        yield ""
        if self._error is not None:
            raise self._error


def test_messages_and_answers_alternate_whatever_happens():
    chat = Conversation(Silent())
    assert list(chat.say("hi")) == [""]
    assert [one["role"] for one in chat.messages] == ["user", "assistant"]
    for error in (KeyboardInterrupt(), RequestError("refused"), ZeroDivisionError()):
        chat.answerer = Silent(error)
        with pytest.raises(type(error)):
            list(chat.say("again"))
        assert [one["role"] for one in chat.messages] == ["user", "assistant"]
    pieces = chat.say("again")
    next(pieces)
    pieces.close()
    assert [one["role"] for one in chat.messages] == ["user", "assistant"]


def test_a_turn_computes_what_is_new_alone(tmp_path):
    store, lines = str(templated_store(tmp_path)), "The whale and the sea. " * 12 + "\nWhy?\n/clear\nWhy?\n"
    done = CliRunner().invoke(command, [store, "--json", "--temperature", "0", "--max-tokens", "9"], input=lines)
    first, second, other = (json.loads(line)["statistics"] for line in done.stdout.splitlines())
    assert first["cached_tokens"] == other["cached_tokens"] == 0
    assert second["cached_tokens"] == (first["prompt_tokens"] + 8) // 64 * 64 > 0
