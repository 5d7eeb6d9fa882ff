"""What a caller asks for, what comes of each step, and what is left at the end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from elmoe.bitslice import SamplingParameters
from elmoe.errors import ElmoeError, RequestError
from elmoe.grammar import Grammar

FinishReason = Literal["eos", "stop", "length", "aborted", "failed"]
"""``eos``: an end-of-sequence token; ``stop``: a stop string or stop token, or the grammar is complete; ``length``:
``max_tokens`` or the context; ``aborted``: by the caller; ``failed``: an error of this request alone."""
MOST_COPIES, MOST_ALTERNATIVES = 64, 20
RANGES = {
    "temperature": (0.0, 100.0), "top_p": (1e-9, 1.0), "min_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0), "frequency_penalty": (-2.0, 2.0), "repetition_penalty": (0.001, 100.0),
}  # fmt: skip
"""Allowed values of sampling parameters; those of penalties and bias are OpenAI's, which has no repetition penalty."""
MOST_BIAS = 100.0
LEAST_TEMPERATURE = 0.001
"""Lowest temperature that is not greedy: logits are divided by it."""


@dataclass(frozen=True)
class Request:
    """One prompt.

    ``stop``: strings that end the text (not included in it); ``stop_tokens``: ids that end it, as an end-of-sequence token
    does. ``copies``: answers to draw, each with its index as the choice of its noise. ``text``: whether outputs carry text
    as it is made. ``alternatives``: most likely tokens whose log-probabilities are reported for each position. ``grammar``:
    what the answer may be; it ends where this is complete.
    """

    prompt: tuple[int, ...]
    max_tokens: int = 128
    sampling: SamplingParameters = field(default_factory=SamplingParameters)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    stop_tokens: tuple[int, ...] = ()
    copies: int = 1
    alternatives: int = 0
    text: bool = False
    grammar: Grammar | None = None

    def check(self, vocabulary: int, max_positions: int) -> None:
        """Raise RequestError where the request cannot be served."""
        if not self.prompt:
            raise RequestError("the prompt is empty", "give at least one token of text")
        if len(self.prompt) >= max_positions:
            raise RequestError(
                f"the prompt has {len(self.prompt)} tokens, the context is {max_positions}, of which one is to answer",
                "shorten the prompt",
            )
        if not all(0 <= token < vocabulary for token in self.prompt):
            raise RequestError(
                f"the prompt has a token id outside 0..{vocabulary - 1}",
                "its tokenizer is of another model, or has tokens of its own",
            )
        if self.max_tokens < 1:
            raise RequestError(f"max_tokens is {self.max_tokens}", "ask for at least 1")
        check_within("copies", self.copies, 1, MOST_COPIES)
        check_within("alternatives", self.alternatives, 0, min(MOST_ALTERNATIVES, vocabulary))
        check_sampling(self.sampling, vocabulary)
        if any(not text for text in self.stop):
            raise RequestError("a stop string is empty", "leave it out")


def check_within(name: str, value: float, low: float, high: float) -> None:
    """RequestError where a value is out of its range."""
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}, allowed is {low:g}..{high:g}")


def check_sampling(sampling: SamplingParameters, vocabulary: int) -> None:
    """RequestError naming the sampling parameter that is out of its range."""
    for name, (low, high) in RANGES.items():
        check_within(name, getattr(sampling, name), low, high)
    if 0 < sampling.temperature < LEAST_TEMPERATURE:
        told = f"use 0 for greedy decoding, or at least {LEAST_TEMPERATURE}"
        raise RequestError(f"temperature is {sampling.temperature}", told)
    if sampling.top_k < 0:
        raise RequestError(f"top_k is {sampling.top_k}", "use 0 to switch it off")
    seen: set[int] = set()
    for token, bias in sampling.logit_bias:
        if not 0 <= token < vocabulary:
            raise RequestError(f"logit_bias has the token id {token}", f"ids of this model are 0 to {vocabulary - 1}")
        check_within(f"logit_bias of token {token}", bias, -MOST_BIAS, MOST_BIAS)
        if token in seen:
            raise RequestError(f"logit_bias has the token id {token} twice")
        seen.add(token)


def numbered(requests: Iterable[Request]) -> list[Request]:
    """The requests of one call, so that equal prompts draw different answers: each draws by the number of answers to its
    prompt before it. Equal calls stay equal."""
    copies: Counter[tuple[int, ...]] = Counter()
    result = []
    for request in requests:
        sampling = replace(request.sampling, choice=request.sampling.choice + copies[request.prompt])
        copies[request.prompt] += request.copies
        result.append(replace(request, sampling=sampling))
    return result


Alternatives = tuple[tuple[int, float], ...]
"""The most likely tokens of a position and their log-probabilities, best first."""


@dataclass(frozen=True)
class Result:
    """A finished answer: generated ids (an end-of-sequence token included), the target's log-probabilities of them, why it
    ended, and a hash of the KV bytes at its committed positions. ``error``: of a request that failed. ``cached_tokens``: of
    the prompt, found in the prefix cache; equal results may differ in it."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    kv_digest: str | None = None
    alternatives: tuple[Alternatives, ...] = ()
    error: ElmoeError | None = None
    cached_tokens: int = field(default=0, compare=False)

    def shown(self, request: Request) -> tuple[int, ...]:
        """The tokens that are text: all but the one that ended the answer."""
        ended = self.finish == "eos" or (self.finish == "stop" and self.tokens[-1] in request.stop_tokens)
        return self.tokens[:-1] if ended else self.tokens


@dataclass(slots=True)
class Output:
    """What a step brought to one sequence: the tokens it committed, and the result once it has ended. ``text``: characters
    that no later token can change, where the engine has a decoder of text."""

    request: int
    choice: int
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str = ""
    alternatives: tuple[Alternatives, ...] = ()
    result: Result | None = None
