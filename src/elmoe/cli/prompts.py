"""Prompts of ``elmoe generate``: from the command line, standard input, a file, or a file of many."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elmoe.errors import RequestError
from elmoe.untrusted import load_json, read_text, short, text_of

if TYPE_CHECKING:
    from elmoe.llm import Model

PROMPT_LIMIT = 256 << 20
"""Largest file of prompts, bytes."""
UTF8 = "convert it, for example with iconv -t utf-8"
SHAPE = 'write a string, {"prompt": "..."} or {"messages": [...]}'


@dataclass(frozen=True)
class PromptLine:
    """One prompt. ``shown``: what is printed before its answer; ``messages``: of a chat, in place of a text."""

    shown: str
    messages: list[dict[str, Any]] | None = None

    def tokens(self, model: Model) -> tuple[int, ...]:
        """Its token ids."""
        if self.messages is None:
            return model.encode(self.shown)
        return model.chat_tokens(self.messages)


def collect_prompts(given: tuple[str, ...], path: Path | None, chat: bool, system: str | None) -> list[PromptLine]:
    """All prompts: those given (``-`` is standard input, ``@file`` a file, ``@@`` begins a text with @), then those of a
    file of JSON lines. RequestError where there is none, or one cannot be read."""
    if system is not None and not chat:
        raise RequestError("--system needs --chat", "a plain prompt has no system message: put its text into the prompt")
    if given.count("-") > 1:
        raise RequestError("standard input is given as two prompts", "give --prompt - once")
    lines = [_line(_text(text), chat, system) for text in given]
    lines += _json_lines(path, chat, system) if path is not None else []
    if not lines:
        raise RequestError("there is no prompt", "give --prompt TEXT, --prompt -, --prompt @FILE or --prompts FILE")
    return lines


def _text(given: str) -> str:
    """A prompt as it was given, or the text it stands for, without the line feed that ends a file."""
    if given == "-":
        return text_of(sys.stdin.buffer.read(PROMPT_LIMIT), "standard input", RequestError, UTF8).removesuffix("\n")
    if given == "@":
        raise RequestError("--prompt @ names no file", "give @FILE, or @@ for a text that begins with @")
    if given.startswith("@") and not given.startswith("@@"):
        return read_text(given[1:], RequestError, PROMPT_LIMIT, "prompt", UTF8).removesuffix("\n")
    return given[1:] if given.startswith("@@") else given


def _line(text: str, chat: bool, system: str | None) -> PromptLine:
    if not chat:
        return PromptLine(text)
    before = [] if system is None else [{"role": "system", "content": system}]
    return PromptLine(text, [*before, {"role": "user", "content": text}])


def _json_lines(path: Path, chat: bool, system: str | None) -> list[PromptLine]:
    result = []
    for number, raw in enumerate(read_text(path, RequestError, PROMPT_LIMIT, "file of prompts", UTF8).split("\n"), 1):
        if not raw.strip():
            continue
        where = f"{short(path)}, line {number}"
        value = load_json(raw, where, RequestError, SHAPE)
        fields = {"prompt": value} if isinstance(value, str) else value
        if not isinstance(fields, dict):
            raise RequestError(f"{where} is no prompt", SHAPE)
        unknown = sorted(fields.keys() - {"prompt", "messages"})
        if unknown:
            raise RequestError(f"{where} is no prompt: '{short(unknown[0], 40)}' is not read from a file of prompts", SHAPE)
        if len(fields) != 1 or fields.get("prompt") == "":
            raise RequestError(f"{where} {'is an empty prompt' if len(fields) == 1 else 'is no prompt'}", SHAPE)
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if isinstance(prompt, str):
            result.append(_line(prompt, chat, system))
        elif messages is not None:
            result.append(_conversation(messages, where, system))
        else:
            raise RequestError(f"{where} is no prompt", SHAPE)
    if not result:
        raise RequestError(f"'{short(path)}' holds no prompt", SHAPE)
    return result


def _conversation(messages: Any, where: str, system: str | None) -> PromptLine:
    from elmoe.chat import plain_messages  # here, because loading it delays a first token that needs no template

    try:
        plain = plain_messages(messages)
    except RequestError as error:
        raise RequestError(f"{where}: {error}", error.hint) from None
    if system is not None:
        if plain[0]["role"] == "system":
            raise RequestError(f"{where} has a system message of its own", "give it without --system")
        plain.insert(0, {"role": "system", "content": system})
    return PromptLine(plain[-1]["content"] or "", plain)
