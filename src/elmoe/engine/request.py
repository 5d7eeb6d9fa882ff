"""What a caller asks for, what it gets back, and a sequence while it is being served."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from elmoe.bitslice import SamplingParameters
from elmoe.errors import RequestError

FinishReason = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Request:
    """One prompt. ``stop``: strings that end the text (not included in it)."""

    prompt: tuple[int, ...]
    max_tokens: int = 128
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def check(self, vocabulary: int, max_positions: int) -> None:
        """Raise RequestError where the request cannot be served."""
        sampling = self.sampling
        if not self.prompt:
            raise RequestError("the prompt is empty", "give at least one token of text")
        if len(self.prompt) >= max_positions:
            raise RequestError(
                f"the prompt has {len(self.prompt)} tokens, the context is {max_positions}, of which one is to answer",
                "shorten the prompt",
            )
        if not all(0 <= token < vocabulary for token in self.prompt):
            raise RequestError(f"the prompt has a token id outside 0..{vocabulary - 1}")
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}", "ask for at least 1")
        for name, value, low, high in (
            ("temperature", sampling.temperature, 0.0, 100.0),
            ("top_p", sampling.top_p, 1e-9, 1.0),
            ("min_p", sampling.min_p, 0.0, 1.0),
        ):
            if not low <= value <= high:
                raise RequestError(f"{name} is {value}, allowed is {low:g}..{high:g}")
        if 0 < sampling.temperature < 1e-3:
            raise RequestError(f"temperature is {sampling.temperature}", "use 0 for greedy decoding, or at least 0.001")
        if sampling.top_k < 0:
            raise RequestError(f"top_k is {sampling.top_k}", "use 0 to switch it off")
        if any(not text for text in self.stop):
            raise RequestError("a stop string is empty")


@dataclass(frozen=True)
class Result:
    """A finished request: generated ids (an end-of-sequence token included), the target's log-probabilities of them,
    why it ended, and a hash of the KV bytes at its committed positions."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    kv_digest: str | None = None


@dataclass(eq=False)
class Sequence:
    """A request being served in a cache slot. ``tokens``: prompt and committed output; keys and values are computed for all
    of them but the last."""

    index: int
    request: Request
    slot: int
    limit: int
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    finish: FinishReason | None = None
    draft: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        """Committed output ids."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def room(self) -> int:
        """Tokens that may still be committed."""
        return self.limit - len(self.tokens)

    def commit(self, token: int, logprob: float, eos: tuple[int, ...], decode: Callable[[list[int]], str] | None) -> None:
        """Append one token of the target and see whether the sequence ends with it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if token in eos and not self.request.ignore_eos:
            self.finish = "eos"
        elif self.request.stop and decode is not None and self._stopped(decode):
            self.finish = "stop"
        elif self.room <= 0:
            self.finish = "length"

    def _stopped(self, decode: Callable[[list[int]], str]) -> bool:
        # A token gives at least one byte of text, so a stop string cannot begin further back than its bytes.
        longest = max(len(text.encode()) for text in self.request.stop)
        tail = decode(self.output[-(longest + 8) :])
        return any(text in tail for text in self.request.stop)
