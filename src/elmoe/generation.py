"""What a caller of the Python API gives and gets: sampling parameters, pieces of a text, and the whole of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from secrets import randbits
from time import perf_counter
from typing import TYPE_CHECKING, Any

from elmoe.arguments import check_types
from elmoe.bitslice import SamplingParameters
from elmoe.engine.request import (
    MOST_ALTERNATIVES,
    MOST_COPIES,
    Alternatives,
    FinishReason,
    Output,
    Request,
    check_within,
)
from elmoe.errors import RequestError
from elmoe.grammar import Grammars
from elmoe.tokenizer import split_stops

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEED_BITS = 53
"""Bits of a seed that is drawn: every JSON reader keeps them."""


@dataclass(frozen=True)
class SamplingParams:
    """How answers are drawn.

    :param temperature: 0 is greedy, else 0.001 to 100. :param top_k: most likely tokens to draw from; 0 is off.
    :param top_p: smallest set of likely tokens with this probability together, 0 to 1; 1 is off.
    :param min_p: least probability as a share of the most likely token's, 0 to 1; 0 is off.
    :param seed: same seed, same text, whatever else is served; None draws one, which ``Generation.seed`` tells.
    :param max_tokens: most tokens of an answer. :param ignore_eos: go on behind the model's end.
    :param stop: a string, or several, that end the text and are not part of it; the text of a special token, such as
        ``<|im_end|>``, ends it as well.
    :param presence_penalty: subtracted from the logit of every token that the answer holds, -2 to 2.
    :param frequency_penalty: subtracted as often as the answer holds the token, -2 to 2.
    :param repetition_penalty: divides positive logits, and multiplies others, of tokens that prompt or answer hold, 0.001 to
        100; 1 is off.
    :param logit_bias: token id -> what is added to its logit before all else, -100 to 100.
    :param json_schema: the answer is JSON of this schema, as text or data; it ends where the JSON does. Needs the extra
        ``server``. :param json_object: the answer is any JSON object.
    :param n: answers to draw of each prompt, 1 to 64; the prompt is computed once.
    :param logprobs: most likely tokens, 0 to 20, whose log-probabilities are reported at every position. They, and
        those of the tokens drawn, are the model's own: before bias, penalties, grammar and temperature.
    :raises RequestError: a value is of the wrong type; one that is out of range is refused where it is used.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 128
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    n: int = 1
    logprobs: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    json_schema: Mapping[str, Any] | str | None = None
    json_object: bool = False

    def __post_init__(self) -> None:
        check_types(self, "sampling parameter")
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise RequestError(f"the seed is {self.seed}", "give 0 to 2^63 - 1, or None to draw one")
        if self.json_schema is not None and self.json_object:
            raise RequestError("json_schema and json_object are both given", "give one of them")

    def seeded(self) -> SamplingParams:
        """With a seed: one is drawn if there is none."""
        return self if self.seed is not None else replace(self, seed=randbits(SEED_BITS))

    def request(self, prompt: Sequence[int], tokenizer: Tokenizer, grammars: Grammars | None = None) -> Request:
        """A prompt of token ids as a request to the engine.

        :param grammars: of the model (``Model.grammars``); a schema needs them.
        :raises RequestError: the schema cannot be used, or ``n`` or ``logprobs`` is out of range.
        :raises MissingExtraError: llguidance is not installed.
        """
        check_within("n", self.n, 1, MOST_COPIES)
        check_within("logprobs", self.logprobs, 0, MOST_ALTERNATIVES)
        wanted = True if self.json_object else self.json_schema
        if wanted is not None and grammars is None:
            raise RequestError("JSON of a schema needs the grammars of the model", "give Model.grammars")
        grammar = None if wanted is None or grammars is None else grammars.json(wanted)
        strings, tokens = split_stops(tokenizer, [self.stop] if isinstance(self.stop, str) else self.stop)
        sampling = SamplingParameters(
            self.temperature, self.top_k, self.top_p, self.min_p, self.seed or 0,
            presence_penalty=self.presence_penalty, frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty, logit_bias=tuple((self.logit_bias or {}).items()),
        )  # fmt: skip
        return Request(
            tuple(prompt), self.max_tokens, sampling, strings, self.ignore_eos, tokens, self.n, self.logprobs, text=True,
            grammar=grammar,
        )  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """What a step brought to a streamed answer.

    ``text``: whole characters only, which no later token changes; may be empty while a character or a stop string is
    incomplete. ``token_ids``, ``logprobs``: of the tokens the step committed, several where a draft was accepted, natural
    logarithm. ``top_logprobs``: for each token the most likely ones as (id, log-probability). ``finish_reason``: None before
    the last piece. ``choice``: which of ``n`` answers. ``cached_tokens``: of the last piece, those of the prompt that were
    found in the prefix cache.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None = None
    top_logprobs: tuple[Alternatives, ...] = ()
    choice: int = 0
    cached_tokens: int = 0

    @classmethod
    def of(cls, output: Output) -> Piece:
        """An engine's output; the error of a request that failed is raised."""
        result = output.result
        if result is not None and result.error is not None:
            raise result.error
        finish = None if result is None else result.finish
        cached = 0 if result is None else result.cached_tokens
        return cls(output.text, output.tokens, output.logprobs, finish, output.alternatives, output.choice, cached)


@dataclass(frozen=True)
class RequestStatistics:
    """Of one answer. ``steps``: those that committed tokens to it, fewer than ``tokens`` where drafts were accepted.
    ``first_token_seconds``, ``seconds``: from the request to the first token and to the end, waiting included.
    ``cached_tokens``: of the prompt, found in the prefix cache."""

    prompt_tokens: int
    tokens: int
    steps: int
    first_token_seconds: float
    seconds: float
    cached_tokens: int = 0

    @property
    def tokens_per_second(self) -> float | None:
        """Rate behind the first step; None where one step brought all."""
        taken = self.seconds - self.first_token_seconds
        return self.tokens * (self.steps - 1) / self.steps / taken if self.steps > 1 and taken > 0 else None


@dataclass(frozen=True)
class Generation:
    """An answer.

    ``text``: without prompt, special tokens and stop string. ``token_ids``: an end-of-sequence token included.
    ``logprobs``: the target's natural logarithm of the probability of each, before temperature and the like.
    ``finish_reason``: ``eos`` (the model's end), ``stop`` (a stop string, or the JSON is complete) or ``length``
    (``max_tokens``, or the context is full). ``top_logprobs``: for each token the most likely ones as (id,
    log-probability), best first; empty unless asked.
    ``seed``: that it was drawn with. ``others``: the further answers to the prompt where ``n`` is more than 1.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    statistics: RequestStatistics
    prompt_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[Alternatives, ...] = ()
    seed: int = 0
    others: tuple[Generation, ...] = ()


@dataclass
class _Answer:
    """One answer while it is collected."""

    pieces: list[Piece] = field(default_factory=list)
    first: float = 0.0
    ended: float = 0.0


class Collector:
    """Puts the outputs of one request together."""

    def __init__(self, request: Request) -> None:
        self._request, self._began = request, perf_counter()
        self._answers = [_Answer() for _ in range(request.copies)]

    def take(self, output: Output) -> None:
        """Add what a step brought; the error of a request that failed is raised."""
        piece, answer, now = Piece.of(output), self._answers[output.choice], perf_counter()
        answer.first = answer.first if answer.pieces else now
        answer.ended = now
        answer.pieces.append(piece)

    def generation(self) -> Generation:
        """The first answer, with the others beside it; all must have ended."""
        first, *others = [self._generation(answer) for answer in self._answers]
        return replace(first, others=tuple(others)) if others else first

    def _generation(self, answer: _Answer) -> Generation:
        pieces, request = answer.pieces, self._request
        finish = pieces[-1].finish_reason
        assert finish is not None
        tokens = tuple(token for piece in pieces for token in piece.token_ids)
        statistics = RequestStatistics(
            len(request.prompt), len(tokens), sum(bool(piece.token_ids) for piece in pieces), answer.first - self._began,
            answer.ended - self._began, pieces[-1].cached_tokens,
        )  # fmt: skip
        return Generation(
            "".join(piece.text for piece in pieces), tokens, tuple(value for piece in pieces for value in piece.logprobs),
            finish, statistics, request.prompt, tuple(item for piece in pieces for item in piece.top_logprobs),
            request.sampling.seed,
        )  # fmt: skip
