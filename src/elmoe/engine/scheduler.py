"""Which sequences a step computes: requests come, wait for room, run, and leave; and whose the KV cache's pages are.

A request waits while no row or page is free. When pages run out under running sequences, the youngest gives its own back and
is computed again later: a token depends on the tokens before it alone, so nothing changes but the time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from elmoe.engine.kv_cache import PAGE_POSITIONS, PagedCache
from elmoe.engine.request import Output, Request
from elmoe.engine.sequence import DECODING, FINISHED, PREFILL, WAITING, Sequence
from elmoe.engine.statistics import Statistics
from elmoe.errors import BudgetError, ElmoeError, RequestError
from elmoe.models.spec import ModelSpec
from elmoe.text import TextStream
from elmoe.units import format_bytes

TextFactory = Callable[[tuple[int, ...], tuple[str, ...]], TextStream]
"""Makes the text of a sequence from its prompt and its stop strings."""


class Chunk(NamedTuple):
    """Positions [first, last) of a sequence that are computed without drawing a token."""

    sequence: Sequence
    first: int
    last: int


class Batch(NamedTuple):
    """What a step computes: the next tokens of sequences that decode, and beside them chunks of prompts."""

    decoding: list[Sequence]
    chunks: list[Chunk]


class Scheduler:
    """The sequences of an engine. ``running``: those with a row of the cache, oldest first.

    :param batch: sequences that run at once. :param chunk: prompt positions of one step.
    """

    def __init__(
        self, spec: ModelSpec, cache: PagedCache, batch: int, chunk: int, text: TextFactory | None, digests: bool
    ) -> None:
        self._spec, self._cache, self._batch, self._text, self._digests = spec, cache, batch, text, digests
        self.chunk = chunk
        self.together = False
        """Whether sequences that start together wait for each other's prompts: a closed set of requests then decodes as one
        batch. Otherwise the first token of each comes as soon as its own prompt is computed."""
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._next_request = self._next_index = self._preempted = 0
        self._ended: list[Output] = []
        self.adopts = True
        """Whether prompts begin with what the prefix cache knows; a recording wants all of them computed."""
        self.statistics = Statistics()
        self.first_request = 0
        """Id of the first of a closed set of requests; outputs number requests from it."""

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.running or self._ended)

    def restart_indices(self) -> None:
        """Number the next sequence 0, as traces and replays of a closed set of requests expect; only without work."""
        assert not self.waiting and not self.running
        self._next_index = 0

    def check(self, request: Request) -> None:
        """Refuse what cannot be served.

        :raises RequestError: it asks for what cannot be. :raises BudgetError: it needs more pages than there are.
        """
        request.check(self._spec.vocabulary, self._spec.max_positions)
        if (request.stop or request.text) and self._text is None:
            raise RequestError("stop strings and text need a tokenizer to decode with")
        limit = self._limit(request)
        pages = self._cache.layout.pages(limit, self.chunk)
        if pages > self._cache.pages:
            held, needed = self._cache.pages * self._cache.page_bytes, pages * self._cache.page_bytes
            raise BudgetError(
                f"{limit} positions need {format_bytes(needed)} of KV cache, its ceiling is {format_bytes(held)}",
                "raise --kv-memory or --fast-memory, or ask for fewer tokens",
            )

    def _limit(self, request: Request) -> int:
        """Positions that it may come to."""
        return min(len(request.prompt) + request.max_tokens, self._spec.max_positions)

    def add(self, request: Request) -> int:
        """Take in a request that was checked, all of it or nothing; returns its id."""
        number, self._next_request = self._next_request, self._next_request + 1
        limit, taken = self._limit(request), list[Sequence]()
        leader: Sequence | None = None
        for choice in range(request.copies):
            wanted = self._text is not None and (request.stop or request.text)
            text = self._text(request.prompt, request.stop) if wanted and self._text is not None else None
            sequence = Sequence(number, choice, self._next_index, request, limit, list(request.prompt), text, leader)
            self._next_index += 1
            leader = leader or sequence
            taken.append(sequence)
        self.waiting.extend(taken)
        return number

    def abort(self, request: int) -> None:
        """End a request; what it wrote so far is its result. RequestError if no such request is being served."""
        found = [one for one in (*self.waiting, *self.running) if one.request_id == request]
        if not found:
            raise RequestError(f"there is no request {request}", "it has ended, or was never added")
        for sequence in found:
            sequence.finish = "aborted"
            self._ended.append(self._retire(sequence))

    def forget_ended(self) -> None:
        """Drop the reports of requests that were aborted since the last step."""
        self._ended.clear()

    def fail(self, sequence: Sequence, error: ElmoeError) -> None:
        """End one sequence with an error."""
        sequence.finish, sequence.error = "failed", error

    def schedule(self) -> Batch:
        """The next step's work: admits what there is room for, then gives every running sequence the pages it needs."""
        if self.waiting:
            self._admit()
        decoding: list[Sequence] = []
        chunks: list[Chunk] = []
        left, preempted = self.chunk, self._preempted
        for sequence in self.running[:]:
            if sequence.state is WAITING:
                continue  # preempted by an older one
            ready = len(sequence.tokens) - 1 == sequence.computed
            if not ready and left > 0 and self._cache.keeps_prefixes:
                found = self._adopt(sequence)  # an older one may have computed what comes next
                self.statistics.cached_tokens += found if sequence.choice == 0 else 0
                ready = not sequence.uncomputed
            if ready:
                if self._reserve(sequence, len(sequence.tokens)):
                    decoding.append(sequence)
            elif left > 0:
                last = sequence.computed + min(left, sequence.uncomputed)
                if self._reserve(sequence, last):
                    chunks.append(Chunk(sequence, sequence.computed, last))
                    left -= last - sequence.computed
        if self._preempted != preempted:
            decoding = [one for one in decoding if one.state is not WAITING]
            chunks = [chunk for chunk in chunks if chunk.sequence.state is not WAITING]
        if chunks and self.together and not any(one.state is DECODING for one in self.running):
            return Batch([], chunks)
        for sequence in decoding:
            sequence.state = DECODING
        return Batch(decoding, chunks)

    def _admit(self) -> None:
        """Start waiting sequences, oldest first, while there are rows, and pages for their next chunk."""
        for sequence in list(self.waiting):
            if len(self.running) >= self._batch or not self._cache.free_rows:
                return
            leader = sequence.leader
            if leader is not None and leader.finish is None and leader.computed < len(sequence.request.prompt) - 1:
                continue  # its prompt is being computed
            self._adopt(sequence)
            wanted = min(len(sequence.tokens), sequence.computed + self.chunk)
            if self._cache.missing(sequence.entry, wanted) > self._cache.free_pages and self.running:
                return
            if sequence.choice == 0 and not sequence.gave_way:
                self.statistics.prompt_tokens += len(sequence.request.prompt)
                self.statistics.cached_tokens += sequence.cached_tokens
            self.waiting.remove(sequence)
            sequence.state, sequence.leader = PREFILL, None
            self._cache.bind(sequence.entry)
            self.running.append(sequence)

    def _adopt(self, sequence: Sequence) -> int:
        """Take over what the prefix cache knows of a text, but for its last position, which is computed to draw from;
        returns how many positions of a prompt that is computed for the first time."""
        if sequence.computed != len(sequence.entry.pages) * PAGE_POSITIONS or not self.adopts:
            return 0
        found = self._cache.adopt(sequence.entry, sequence.tokens, len(sequence.tokens) - 1)
        sequence.computed += found
        if sequence.gave_way:
            return 0
        sequence.cached_tokens += found
        return found

    def _reserve(self, sequence: Sequence, positions: int) -> bool:
        """Give a sequence pages, taking them from copies that wait and from younger sequences if there are none; False if it
        had to give way itself."""
        if positions <= self._cache.positions(sequence.entry):
            return True
        while self._cache.missing(sequence.entry, positions) > self._cache.free_pages:
            holder = next((one for one in reversed(self.waiting) if one.entry.pages), None) or self.running[-1]
            self._preempt(holder)
            if holder is sequence:
                return False
        self._cache.reserve(sequence.entry, positions)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take a sequence's pages; its positions are computed again when its turn comes."""
        self._cache.release(sequence.entry)
        sequence.computed, sequence.state = 0, WAITING
        self._preempted += 1
        if sequence in self.running:
            sequence.gave_way = True
            self.running.remove(sequence)
            self.waiting.appendleft(sequence)
        elif not sequence.gave_way:  # it has not begun
            sequence.cached_tokens = 0

    def grow(self, sequence: Sequence, positions: int) -> bool:
        """Pages for a draft, if there are free ones: nobody gives way to a draft."""
        if self._cache.missing(sequence.entry, positions) > self._cache.free_pages:
            return False
        self._cache.reserve(sequence.entry, positions)
        return True

    def commit(self, batch: Batch) -> list[Output]:
        """After the step's tokens were appended: move prompts on, trim caches, let the finished go."""
        for chunk in batch.chunks:
            if chunk.sequence.finish is None:
                chunk.sequence.computed = chunk.last
                self._cache.keep(chunk.sequence.entry, chunk.sequence.tokens, chunk.last)
                self._cache.forget(chunk.sequence.entry, chunk.last)
                self._share(chunk.sequence)
        outputs, self._ended = self._ended, []
        for sequence in batch.decoding:
            sequence.computed = len(sequence.tokens) - 1
            if self._cache.keeps_prefixes and sequence.finish != "failed":
                self._cache.keep(sequence.entry, sequence.tokens, sequence.computed)
            if sequence.finish is None:
                if self._cache.positions(sequence.entry) >= sequence.computed + PAGE_POSITIONS:
                    self._cache.trim(sequence.entry, sequence.computed)
                if self._cache.windowed:
                    self._cache.forget(sequence.entry, sequence.computed)
                outputs.append(sequence.report(self.first_request))
        outputs += [self._retire(one) for one in self.running[:] if one.finish is not None]
        return outputs

    def _share(self, leader: Sequence) -> None:
        """Give the copies of a prompt its pages once it is computed."""
        prompt = len(leader.request.prompt) - 1
        if leader.computed < prompt:
            return
        for copy in [one for one in self.waiting if one.leader is leader]:
            copy.leader = None
            with suppress(BudgetError):  # without a page it computes its prompt itself
                copy.entry, copy.computed = self._cache.fork(leader.entry, prompt), prompt
                copy.cached_tokens = leader.cached_tokens

    def _retire(self, sequence: Sequence) -> Output:
        """Take a finished sequence out; its pages and its row are free again."""
        digest = None
        if self._digests and sequence.entry.row >= 0 and sequence.finish not in ("aborted", "failed"):
            digest = self._cache.digest(sequence.entry, len(sequence.tokens) - 1)
        self._cache.release(sequence.entry)
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.state = FINISHED
        return sequence.report(self.first_request, digest)
