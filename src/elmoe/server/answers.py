"""Outputs of the engine as OpenAI's API writes them: whole answers, and the events of a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from secrets import token_hex
from time import time
from typing import Any

from elmoe.engine.request import Alternatives, Output, Request
from elmoe.server.schemas import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from elmoe.server.token_texts import TokenTexts

_FINISH: dict[str, FinishReason] = {"eos": "stop", "stop": "stop", "length": "length"}
_text = json.JSONEncoder(ensure_ascii=False).encode


@dataclass
class Choice:
    """One answer while it comes, or what is new of it. ``offset``: characters of its tokens before; ``begun``: whether an
    event of it was sent."""

    texts: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    finish: FinishReason | None = None
    offset: int = 0
    begun: bool = False


class Answers:
    """The answers to one call.

    :param chat: whether the call is a chat; a completion otherwise. :param logprobs: whether they are wanted.
    """

    def __init__(
        self, requests: Sequence[Request], model: str, fingerprint: str, texts: TokenTexts, chat: bool, logprobs: bool
    ) -> None:  # fmt: skip
        self._requests, self._texts, self._chat, self._logprobs = requests, texts, chat, logprobs
        self.copies = requests[0].copies
        self.choices = [Choice() for _ in range(len(requests) * self.copies)]
        self.prompt_tokens = sum(len(request.prompt) for request in requests)
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.id = ("chatcmpl-" if chat else "cmpl-") + token_hex(12)
        self._common: dict[str, Any] = {
            "id": self.id, "created": int(time()), "model": model, "system_fingerprint": fingerprint,
            "seed": requests[0].sampling.seed,
        }  # fmt: skip
        kind = {"object": "chat.completion.chunk" if chat else "text_completion"}
        self._head = json.dumps({**self._common, **kind})[:-1] + ', "choices": ['

    @property
    def usage(self) -> Usage:
        """Tokens so far."""
        return Usage(
            prompt_tokens=self.prompt_tokens, completion_tokens=self.completion_tokens,
            total_tokens=self.prompt_tokens + self.completion_tokens,
            prompt_tokens_details=PromptDetails(cached_tokens=self.cached_tokens),
        )  # fmt: skip

    @property
    def finish_reasons(self) -> list[str]:
        """Why each answer ended; those under way are left out."""
        return [choice.finish for choice in self.choices if choice.finish is not None]

    def add(self, index: int, output: Output, keep: bool = True) -> tuple[int, Choice]:
        """Take an output to prompt ``index``; the number of its answer and what is new of it.

        :param keep: for :meth:`whole`.
        """
        number = index * self.copies + output.choice
        choice, request = self.choices[number], self._requests[index]
        self.completion_tokens += len(output.tokens)
        new = Choice([output.text], offset=choice.offset)
        if self._logprobs:
            new.tokens, new.logprobs = list(output.tokens), list(output.logprobs)
            new.alternatives = list(output.alternatives)
        if output.result is not None:
            self.cached_tokens += getattr(output.result, "cached_tokens", 0) if output.choice == 0 else 0
            choice.finish = new.finish = _FINISH.get(output.result.finish, "stop")
            if self._logprobs and len(output.result.shown(request)) < len(output.result.tokens):  # the last one is no text
                del new.tokens[-1:], new.logprobs[-1:], new.alternatives[-1:]
        if self._logprobs and not self._chat:
            choice.offset += sum(len(self._texts.of(token)[0]) for token in new.tokens)
        if keep:
            choice.texts.append(output.text)
            choice.tokens += new.tokens
            choice.logprobs += new.logprobs
            choice.alternatives += new.alternatives
        return number, new

    def whole(self) -> ChatCompletion | Completion:
        """All answers, once they have ended."""
        if self._chat:
            chats = [
                ChatChoice(
                    index=number, message=AnswerMessage(role="assistant", content="".join(choice.texts)),
                    logprobs=self._chat_logprobs(choice) if self._logprobs else None, finish_reason=choice.finish or "stop",
                )
                for number, choice in enumerate(self.choices)
            ]  # fmt: skip
            return ChatCompletion(object="chat.completion", choices=chats, usage=self.usage, **self._common)
        completions = [
            CompletionChoice(
                index=number, text="".join(choice.texts), finish_reason=choice.finish or "stop",
                logprobs=self._completion_logprobs(choice, 0) if self._logprobs else None,
            )
            for number, choice in enumerate(self.choices)
        ]  # fmt: skip
        return Completion(object="text_completion", choices=completions, usage=self.usage, **self._common)

    def events(self, outputs: Sequence[tuple[int, Output]], usage: bool, running: bool) -> bytes:
        """Events of a stream for what came; nothing where no text came.

        :param usage: whether a last event will tell the usage, so that the others have none; ``running``: whether they tell
            it, too.
        """
        return b"".join(self._event(number, new, usage, running) for number, new in self._merged(outputs))

    def _merged(self, outputs: Sequence[tuple[int, Output]]) -> Iterator[tuple[int, Choice]]:
        """What is new, answer by answer: a client that reads slowly gets fewer events."""
        if len(outputs) == 1:
            yield self.add(*outputs[0], keep=False)
            return
        news: dict[int, Choice] = {}
        for index, output in outputs:
            number, new = self.add(index, output, keep=False)
            if number not in news:
                news[number] = new
                continue
            merged = news[number]
            merged.texts += new.texts
            merged.tokens += new.tokens
            merged.logprobs += new.logprobs
            merged.alternatives += new.alternatives
            merged.finish = new.finish
        yield from news.items()

    def _event(self, number: int, new: Choice, usage: bool, running: bool) -> bytes:
        text = "".join(new.texts)
        if not text and new.finish is None and not (self._logprobs and new.tokens) and not running:
            return b""
        logprobs = "null"
        if self._logprobs and new.tokens:
            found = self._chat_logprobs(new) if self._chat else self._completion_logprobs(new, new.offset)
            logprobs = found.model_dump_json()
        finish = "null" if new.finish is None else f'"{new.finish}"'
        if self._chat:
            role = "" if self.choices[number].begun else '"role": "assistant", '
            self.choices[number].begun = True
            told = f'"delta": {{{role}"content": {_text(text)}}}'
        else:
            told = f'"text": {_text(text)}'
        counted = f', "usage": {self.usage.model_dump_json() if running else "null"}' if usage or running else ""
        told += f', "logprobs": {logprobs}, "finish_reason": {finish}'
        return f'data: {self._head}{{"index": {number}, {told}}}]{counted}}}\n\n'.encode()

    def last_event(self) -> bytes:
        """The event that tells the usage."""
        return f'data: {self._head}], "usage": {self.usage.model_dump_json()}}}\n\n'.encode()

    def progress_event(self, done: int, milliseconds: int) -> bytes:
        """How much of the prompts is computed, as llama-server tells it."""
        told = {"total": self.prompt_tokens, "cache": self.cached_tokens, "processed": done, "time_ms": milliseconds}
        return f'data: {self._head}], "prompt_progress": {json.dumps(told)}}}\n\n'.encode()

    def _chat_logprobs(self, choice: Choice) -> ChatLogprobs:
        entries = []
        for index, token in enumerate(choice.tokens):
            top = choice.alternatives[index] if choice.alternatives else ()
            entries.append(
                TokenLogprob(
                    **self._token(token, choice.logprobs[index]),
                    top_logprobs=[TopLogprob(**self._token(other, value)) for other, value in top],
                )
            )
        return ChatLogprobs(content=entries)

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, raw = self._texts.of(token)
        return {"token": text, "logprob": logprob, "bytes": list(raw)}

    def _completion_logprobs(self, choice: Choice, offset: int) -> CompletionLogprobs:
        texts = [self._texts.of(token)[0] for token in choice.tokens]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        top = [{self._texts.of(other)[0]: value for other, value in found} for found in choice.alternatives]
        return CompletionLogprobs(
            tokens=texts, token_logprobs=choice.logprobs, top_logprobs=top or None, text_offset=offsets
        )
