"""``elmoe chat``: with a model of its own and with a server, from a pipe and in a terminal."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time

import pytest

from elmoe.cli.conversation import Conversation, Local, Remote
from elmoe.errors import RequestError
from tests.server.live import LiveServer
from tests.templated import untemplated_store

CHAT = [sys.executable, "-m", "elmoe", "chat"]


def run(*arguments, text):
    return subprocess.run([*CHAT, *arguments], input=text, capture_output=True, text=True, timeout=120)


def expected(model, *lines, system=None, **settings):
    """Answers of the Python API to a chat."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    texts = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        texts.append(model.chat(messages, **settings).text)
        messages.append({"role": "assistant", "content": texts[-1]})
    return texts


def test_lines_of_a_pipe_are_messages_of_one_chat(store, model):
    done = run(
        str(store), "--temperature", "0", "--max-tokens", "12", "--system", "Be a whale.", "--json", text="Who?\nWhy?\n"
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    texts = expected(model, "Who?", "Why?", system="Be a whale.", max_tokens=12)
    assert [one["content"] for one in answers] == texts, done.stderr
    assert answers[0]["statistics"]["tokens"] == 12 and answers[0]["statistics"]["finish_reason"] == "length"


def test_a_server_answers_the_same(live, model):
    commands = "Who?\n/clear\n/settings temperature 0\n/settings max_tokens 9\nWho?\n/stats\n/exit\nnever\n"
    done = run(live.url, "--seed", "4", "--max-tokens", "12", text=commands)
    first = expected(model, "Who?", temperature=0.7, seed=4, max_tokens=12)[0]
    second = expected(model, "Who?", max_tokens=9)[0]
    assert done.stdout.startswith(f"{first}\n{second}\nprompt_tokens ") and "tokens 9\n" in done.stdout, done.stderr
    assert "never" not in done.stdout


def test_what_goes_wrong_is_told(live, tmp_path):
    for url, arguments, message in (
        ("http://127.0.0.1:9", (), "cannot reach http://127.0.0.1:9/v1"),
        (live.url, ("--model", "other"), "there is no model 'other'"),
        (live.url, ("--temperature", "0.0005"), "temperature is 0.0005"),
    ):
        done = run(url, *arguments, text="Who?\n")
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    with LiveServer(str(untemplated_store(tmp_path)), "--api-key", "k") as server:
        with pytest.raises(RequestError, match="API key"):
            Remote(server.url, None, None)
        chat = Conversation(Remote(server.url + "/v1/", "k", None))
        with pytest.raises(RequestError, match="no chat template"):
            list(chat.say("Who?"))
        assert chat.messages == []


def test_an_answer_that_is_broken_off_stays_in_the_chat(model):
    chat = Conversation(Local(model), settings={"max_tokens": 50, "temperature": 0})
    answer = chat.say("Who?")
    pieces = [next(answer), next(answer)]
    answer.close()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == "".join(pieces) and not model.engine.has_work
    with pytest.raises(RequestError, match="no setting 'temprature'"):
        chat.set("temprature", "1")
    with pytest.raises(RequestError, match="is no float"):
        chat.set("temperature", "hot")


def test_in_a_terminal(store, model, tmp_path):
    here, there = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "XDG_STATE_HOME": str(tmp_path)}
    chat = subprocess.Popen(
        [*CHAT, str(store), "--temperature", "0", "--max-tokens", "8"], env=environment,
        stdin=there, stdout=there, stderr=there,
    )  # fmt: skip
    os.close(there)
    seen, end = "", time.monotonic() + 60

    def until(text):
        nonlocal seen
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([here], [], [], 0.2)[0]:
                seen += os.read(here, 4096).decode(errors="replace").replace("\r", "")

    until("/help lists commands")
    for line, answer in (
        ("Who?", expected(model, "Who?", max_tokens=8)[0].split("\n")[0]),
        ("/stats", "finish_reason length"),
    ):
        os.write(here, line.encode() + b"\r")
        until(answer)
    os.write(here, b"/exit\r")
    assert chat.wait(30) == 0
    os.close(here)
    assert "Who?" in (tmp_path / "elmoe" / "chat_history").read_text()
