"""The serving loop: schedule, plan, draft, verify, commit. Output is the target's, whatever the draft does."""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Items
from threading import Lock
from time import perf_counter
from typing import TYPE_CHECKING

from elmoe.bitslice import Backend
from elmoe.engine.decoder import Decoder
from elmoe.engine.drafting import Drafter, DraftRules
from elmoe.engine.fitting import Fitting, StoreReader
from elmoe.engine.kv_cache import PagedCache
from elmoe.engine.observe import Timeline
from elmoe.engine.observers import StatisticsObserver, TimelineObserver, TraceObserver
from elmoe.engine.options import EngineOptions
from elmoe.engine.passes import Passes, Script
from elmoe.engine.request import Output, Request, Result
from elmoe.engine.scheduler import Scheduler, TextFactory
from elmoe.engine.statistics import Statistics
from elmoe.engine.tier_manager import TierManager
from elmoe.engine.verifying import Verifier
from elmoe.errors import RequestError
from elmoe.policy.budget import FastTierSizes, TierShape
from elmoe.policy.planner import Planner
from elmoe.store.direct import DirectReader
from elmoe.store.reader import MemoryReader

if TYPE_CHECKING:  # pyarrow loads only when a trace is wanted
    from elmoe.trace import TraceRecorder


class Engine:
    """Serves requests on a store; keep one per model. ``add`` and ``abort`` requests, ``step`` while it ``has_work``.

    Requests come and go while others decode, and each gets what it would get alone. One thread at a time.

    :param script: overrides what passes compute, for a replay. :param text: makes the text of sequences.
    :raises RequestError: an option is out of range. :raises BudgetError: the budget is below the minimum.
    """

    def __init__(
        self,
        reader: StoreReader,
        backend: Backend,
        options: EngineOptions | None = None,
        script: Script | None = None,
        text: TextFactory | None = None,
    ) -> None:
        self.spec, self._reader = reader.spec, reader
        enforced = isinstance(reader, DirectReader)
        self.options = options = (options or EngineOptions()).checked(self.spec, enforced)
        self.fitting = Fitting(reader, options)
        self.decoder = Decoder(reader, backend, self.spec.experts if options.all_ranks else None)
        self.cache = PagedCache(
            self.spec, options.batch, self.spec.max_positions, self.fitting.cache_pages, self.fitting.prefix_pages
        )
        self.tier = self.fitting.make_tier()
        self.planner = Planner(
            TierShape.of(self.fitting.sizes_beside(0)), options.mode, options.split if enforced else options.fixed_split,
            options.draft_length, reads=enforced,
        )  # fmt: skip
        self.scheduler = Scheduler(self.spec, self.cache, options.batch, self.fitting.chunk, text, options.keep_kv_digest)
        self._passes = Passes(self.decoder, backend, self.cache, self.tier, script)
        rules = DraftRules(
            options.draft_top_k or self.spec.top_k, options.draft_rescale, options.draft_offset, options.draft_bits
        )
        self._drafter = Drafter(self._passes, self.scheduler, self.tier, self.planner, rules)
        self._verifier = Verifier(self._passes, self.scheduler, self.tier, self.spec.eos_tokens, options.commit_limit)
        self._manager = TierManager(self.planner, self.tier, self.cache)
        self._stepping, self._expected = Lock(), False
        self.statistics = Statistics(dense_bytes=reader.dense_bytes)

    def add(self, request: Request) -> int:
        """Take a request in; its id names it in outputs.

        :raises RequestError: it cannot be served. :raises BudgetError: it needs more of the KV cache than there is.
        """
        self.scheduler.check(request)
        self.decoder.reserve_positions(self.fitting.positions(request))  # before it is taken in: memory may be short
        return self.scheduler.add(request)

    def abort(self, request: int) -> None:
        """End a request; the next step reports what it wrote. RequestError if it is not being served."""
        self.scheduler.abort(request)

    def prompt_progress(self) -> dict[int, int]:
        """Positions that are computed of each request whose prompt is under way, by its id."""
        return {one.request_id: one.computed for one in self.scheduler.running if one.uncomputed}

    @property
    def has_work(self) -> bool:
        """Whether requests are being served, or have ended unreported."""
        return self.scheduler.has_work

    def step(self) -> list[Output]:
        """Compute what is scheduled; what it brought to each sequence."""
        if not self._stepping.acquire(blocking=False):
            raise RequestError("the engine is stepping in another thread", "only one thread steps an engine")
        try:
            if not self._expected:
                self._expect(self.fitting.sizes_beside(self.cache.pages * self.cache.page_bytes))
            batch = self.scheduler.schedule()
            if not batch.decoding and not batch.chunks:
                return self.scheduler.commit(batch)  # what was aborted
            self._check_files()
            plan = self._manager.plan(len(self.scheduler.running))
            began = perf_counter()
            proposals = self._drafter.draft(batch, plan) if plan.draft_length else {}
            outcome = self._verifier.run(batch, proposals)
            outputs = self.scheduler.commit(batch)
            self._manager.learn(outcome, perf_counter() - began)
            self._counting.on_outcome(outcome)
            self._passes.step += 1
            if not self.has_work:
                self._end_run()
            return outputs
        except BaseException:
            self.tier.abandon_pass()  # the tier is as after a pass that ended
            raise
        finally:
            self._stepping.release()

    def run(
        self, requests: Items[Request], recorder: TraceRecorder | None = None, timeline: Timeline | None = None
    ) -> Generator[list[Output]]:
        """Serve a closed set of requests, ``options.batch`` at a time, and yield what each step brought; ``request`` of an
        output is its index among them. Closing the iterator aborts what is left.

        :raises RequestError: a request cannot be served, or others are being served.
        """
        if self.has_work:
            raise RequestError("the engine serves other requests", "add this one to them, or wait for their end")
        sizes = self.fitting.sizes(requests)
        self.fitting.slots(sizes)  # refuses a budget that is too small
        self._expect(sizes, recorder, timeline)
        self.scheduler.restart_indices()
        numbers: list[int] = []
        self.scheduler.together, self.scheduler.adopts = True, recorder is None
        try:
            for request in requests:
                numbers.append(self.add(request))  # one by one: where one is refused, those before it are abandoned
            self.scheduler.first_request = numbers[0] if numbers else 0
            while self.has_work:
                yield self.step()
        finally:
            self._abandon(numbers)
            self.scheduler.together, self.scheduler.adopts, self.scheduler.first_request = False, True, 0
            self._end_run()

    def generate(
        self, requests: Items[Request], recorder: TraceRecorder | None = None, timeline: Timeline | None = None
    ) -> tuple[list[Result], Statistics]:
        """Serve requests to their end; results in the order of the requests, copies side by side.

        :raises ElmoeError: a request failed; the others end with it.
        """
        results: dict[tuple[int, int], Result] = {}
        for outputs in self.run(requests, recorder, timeline):
            for output in outputs:
                if output.result is not None:
                    if output.result.error is not None:
                        raise output.result.error
                    results[output.request, output.choice] = output.result
        return [results[key] for key in sorted(results)], self.statistics

    def _expect(self, sizes: FastTierSizes, recorder: TraceRecorder | None = None, timeline: Timeline | None = None) -> None:
        """Requests with these sizes are about to come: count into new statistics and tell those who watch."""
        self._check_files()
        self.statistics = self.scheduler.statistics = statistics = Statistics(dense_bytes=self._reader.dense_bytes)
        self._counting, self._began = StatisticsObserver(statistics), (perf_counter(), self.tier.bytes_read)
        traces = [] if recorder is None else [TraceObserver(recorder)]
        timelines = [] if timeline is None else [TimelineObserver(timeline)]
        self._passes.watch([self._counting, *traces, *timelines])
        self.tier.begin_run(statistics, timeline)
        self._manager.expect(sizes, self.fitting.budget(sizes))
        self._expected = True

    def _check_files(self) -> None:
        """StoreError where a mapped file was shortened: reading it would end the process. A few microseconds."""
        if isinstance(self._reader, MemoryReader) and not self.fitting.enforced:
            self._reader.check_sizes()

    def _end_run(self) -> None:
        """Nobody is served: complete the statistics."""
        if self._expected:
            self._expected = False
            self.tier.end_run()
            self.statistics.engine_seconds = perf_counter() - self._began[0]
            self.statistics.read_bytes = self.tier.bytes_read - self._began[1]

    def _abandon(self, numbers: list[int]) -> None:
        """End those of a run that are still being served."""
        serving = {one.request_id for one in (*self.scheduler.waiting, *self.scheduler.running)}
        for number in serving.intersection(numbers):
            self.scheduler.abort(number)
        self.scheduler.forget_ended()
