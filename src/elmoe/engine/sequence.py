"""A sequence while it is served, and the pure judgement of its drafts."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import History, Sample
from elmoe.engine.kv_cache import CacheEntry
from elmoe.engine.request import Alternatives, FinishReason, Output, Request, Result
from elmoe.errors import ElmoeError
from elmoe.grammar import GrammarState
from elmoe.text import TextStream


class State(Enum):
    """Where a sequence stands: not begun (or preempted), its prompt under way, drawing tokens, ended."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODING = "decoding"
    FINISHED = "finished"


WAITING, PREFILL, DECODING, FINISHED = State  # Python 3.11 takes long to find a member by its class


@dataclass(eq=False)
class Sequence:
    """One answer to a request. ``tokens``: prompt and committed output; ``computed``: positions whose keys and values are in
    the cache, all but the last while it decodes. ``limit``: tokens it may come to have. ``leader``: the copy that computes
    the prompt of all. ``cached_tokens``: of its prompt, found in the prefix cache; ``gave_way``: once had to give its pages
    back."""

    request_id: int
    choice: int
    index: int
    request: Request
    limit: int
    tokens: list[int]
    text: TextStream | None = None
    leader: Sequence | None = None
    entry: CacheEntry = field(default_factory=CacheEntry)
    state: State = State.WAITING
    computed: int = 0
    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    finish: FinishReason | None = None
    error: ElmoeError | None = None
    reported: int = 0
    cached_tokens: int = 0
    gave_way: bool = False

    def __post_init__(self) -> None:
        drawn = self.request.sampling
        self.sampling = replace(drawn, choice=drawn.choice + self.choice) if self.choice else drawn
        self.history = History.of(drawn, self.request.prompt)
        self.adjusts = self.history is not None or self.request.grammar is not None
        """Whether its tokens so far change what is drawn."""
        self.grammar: GrammarState | None = None  # from the first draw on: it takes room

    @property
    def output(self) -> list[int]:
        """Committed output ids."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def room(self) -> int:
        """Tokens that may still be committed."""
        return self.limit - len(self.tokens)

    @property
    def uncomputed(self) -> int:
        """Positions to compute before the next token can be drawn: of a prompt, or of a sequence that was preempted."""
        return len(self.tokens) - 1 - self.computed

    def adjust(self, logits: NDArray[np.float32], behind: Items[int]) -> NDArray[np.float32]:
        """What is drawn from in place of the logits (vocabulary,) behind its tokens and the drafted ones ``behind`` them.

        :raises RequestError: its grammar cannot be followed.
        """
        adjusted = logits.copy() if self.history is None else self.history.adjust(logits, behind)
        if self.request.grammar is not None:
            self.grammar = self.grammar or self.request.grammar.start()
            excluded = self.grammar.excluded(behind)
            if excluded is not None:
                adjusted[excluded] = -np.inf
        return adjusted

    def commit(self, sample: Sample, eos: Items[int], alternatives: Alternatives = ()) -> None:
        """Append one token of the target and see whether the sequence ends with it."""
        token = sample.token
        self.tokens.append(token)
        if self.history is not None:
            self.history.push(token)
        if self.grammar is not None and (error := self.grammar.push(token)) is not None:
            self.finish, self.error = "failed", error
            return
        self.logprobs.append(sample.logprob)
        if self.request.alternatives:
            self.alternatives.append(alternatives)
        ended = token in eos and (self.grammar is not None or not self.request.ignore_eos)
        stopped = token in self.request.stop_tokens
        if self.text is not None and not ended and not stopped:
            stopped = self.text.push(token)
        stopped = stopped or (self.grammar is not None and self.grammar.complete)
        if ended:
            self.finish = "eos"
        elif stopped:
            self.finish = "stop"
        elif self.room <= 0:
            self.finish = "length"

    def report(self, first_request: int = 0, digest: str | None = None) -> Output:
        """What came since the last report; with the result if the sequence has ended. Requests are numbered from
        ``first_request``."""
        start, self.reported = self.reported, len(self.logprobs)
        result = None
        if self.finish is not None:
            result = Result(
                tuple(self.output), tuple(self.logprobs), self.finish, digest, tuple(self.alternatives), self.error,
                self.cached_tokens,
            )  # fmt: skip
        return Output(
            self.request_id - first_request, self.choice, tuple(self.tokens[len(self.request.prompt) + start :]),
            tuple(self.logprobs[start:]), "" if self.text is None else self.text.take(last=result is not None),
            tuple(self.alternatives[start:]), result,
        )  # fmt: skip


@dataclass
class Proposal:
    """Draft tokens of a sequence, each the child of the one before, and the draft's probability of each."""

    tokens: list[int] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)


Proposals = dict[Sequence, Proposal]
"""What a step drafted, by sequence; empty where nothing was."""


def judge(draft: Items[int], samples: Items[int], limit: int | None = None) -> tuple[int, list[bool]]:
    """How many of the target's samples stand, and whether each draft token that was judged is accepted.

    ``samples[i]`` is the target's token behind the first ``i`` draft tokens, so there is one more of them. Those stand whose
    draft before them agrees with the target throughout; the first that disagrees is the target's own token and stands, too.

    :param limit: most samples that stand.
    """
    accepted: list[bool] = []
    for drafted, sampled in zip(draft, samples, strict=False):
        accepted.append(drafted == sampled)
        if not accepted[-1] or len(accepted) == limit:
            return len(accepted), accepted
    return len(samples) if limit is None else min(limit, len(samples)), accepted
