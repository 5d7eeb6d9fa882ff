"""The serving loop: admit and prefill, draft, verify, commit. Output is the target's, whatever the draft does."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from elmoe.bitslice import Backend, Sample
from elmoe.engine.decoder import Decoder, Draft, Routings, Tokens, WeightReader
from elmoe.engine.direct_tier import DirectTier
from elmoe.engine.kv import KVPool, pages_for
from elmoe.engine.observe import Timeline
from elmoe.engine.request import Request, Result, Sequence
from elmoe.engine.statistics import Phase, Statistics
from elmoe.engine.tier import ExpertTier, tier_sizes
from elmoe.engine.tier_manager import TierManager
from elmoe.errors import RequestError
from elmoe.kernels.reads import ReadPool
from elmoe.policy.budget import FastTierSizes, SlotPlan, Split, TierShape, check_budget, plan_slots, prefill_chunk
from elmoe.policy.planner import Mode as Mode
from elmoe.policy.planner import Plan, Planner
from elmoe.policy.residency import ResidencyParameters
from elmoe.store.direct import DirectReader

if TYPE_CHECKING:  # pyarrow loads only when a trace is wanted
    from elmoe.trace import TraceRecorder

MAX_BATCH = 64
READ_THREADS = 4
"""Reads in flight: 1 or 2 saturate an NVMe disk with slices of megabytes; small slices want more."""


class StoreReader(WeightReader, Protocol):
    """A weight reader that also tells how many bytes its dense parts take."""

    @property
    def dense_bytes(self) -> int:
        """Bytes of everything but routed experts."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """How to serve.

    ``fast_memory``: budget in bytes, a share of the expert bytes (float in 0..1), or None for all of them. ``split``: how
    slices share the budget; ``auto`` is chosen and changed by modelled tokens/s where the tier is enforced, else all MSB
    slices first. ``draft_length``: tokens to draft, None lets the planner choose. ``draft_bits`` 8 is an ablation (expert
    axis alone): it reads LSB slices whether resident or not. ``batch``: sequences served at once. ``staging_experts``:
    experts in flight or waiting to be computed. ``slow_bandwidth``: throttle of the slow tier, bytes per second.
    ``commit_limit``: tokens kept per sequence and step; 1 records a draft from every position, for a replay. ``all_ranks``:
    routings rank every expert, so that a trace tells what a draft runs whatever is resident.
    """

    mode: Mode = "elastic"
    fast_memory: int | float | None = None
    split: Split | Literal["auto"] = "auto"
    draft_length: int | None = None
    draft_top_k: int | None = None
    draft_rescale: bool = True
    draft_offset: float = 8.0
    draft_bits: Literal[4, 8] = 4
    batch: int = 1
    residency: ResidencyParameters = field(default_factory=ResidencyParameters)
    keep_kv_digest: bool = False
    staging_experts: int = 16
    prefetch: bool = True
    slow_bandwidth: float | None = None
    commit_limit: int | None = None
    all_ranks: bool = False


class Script(Protocol):
    """Told what each pass computes before it runs (a replay overrides routing and samples by it)."""

    def begin(self, phase: Phase, rows: list[tuple[int, int, int]], resident: float) -> None:
        """A pass of (request index, position of the last committed token, position computed) rows begins; the share
        ``resident`` of MSB slices is in the fast tier."""
        ...


class Engine:
    """Serves requests on a store; keep one per model. Not for use from several threads at once."""

    def __init__(
        self,
        reader: StoreReader,
        backend: Backend,
        options: EngineOptions | None = None,
        script: Script | None = None,
    ) -> None:
        self.options = options = options or EngineOptions()
        if not 1 <= options.batch <= MAX_BATCH:
            raise RequestError(f"batch is {options.batch}, allowed is 1..{MAX_BATCH}")
        if options.draft_length is not None and not 0 <= options.draft_length <= 64:
            raise RequestError(f"draft_length is {options.draft_length}, allowed is 0..64")
        self.spec = reader.spec
        if options.draft_top_k is not None and not 1 <= options.draft_top_k <= self.spec.top_k:
            raise RequestError(f"draft_top_k is {options.draft_top_k}, allowed is 1..{self.spec.top_k}")
        if options.draft_bits == 8 and isinstance(reader, DirectReader):
            raise RequestError("drafts of 8 bits need every LSB slice in memory", "use --reader memory")
        self._reader = reader
        self._backend = backend
        self._script = script
        self._decoder = Decoder(reader, backend, self.spec.experts if options.all_ranks else None)
        self._tier: ExpertTier | None = None
        enforced = isinstance(reader, DirectReader)
        self.planner = Planner(
            TierShape.of(tier_sizes(reader, reader.dense_bytes, 0)), options.mode,
            options.split if enforced else self._fixed_split, options.draft_length, reads=enforced,
        )  # fmt: skip

    def sizes(self, requests: Items[Request]) -> FastTierSizes:
        """What competes for the fast tier while these requests are served."""
        needs = sorted((pages_for(self._positions(request)) for request in requests), reverse=True)
        page = KVPool(self.spec, 1, 1, 0).page_bytes
        return tier_sizes(
            self._reader, self._reader.dense_bytes, sum(needs[: self.options.batch]) * page, self.options.staging_experts
        )

    def budget(self, sizes: FastTierSizes) -> int:
        """The fast tier's bytes."""
        share = 1.0 if self.options.fast_memory is None else self.options.fast_memory
        return sizes.budget_of_share(share) if isinstance(share, float) else share

    def slots(self, sizes: FastTierSizes) -> SlotPlan | None:
        """The slot plan beside these sizes; None in plain mode. Raises BudgetError below the minimum."""
        if self.options.mode == "plain":
            if isinstance(self._reader, DirectReader):
                check_budget(self.budget(sizes), sizes, sizes.fixed)
            return None
        return plan_slots(self.budget(sizes), sizes, self._fixed_split)

    @property
    def _fixed_split(self) -> Split:
        """The split of a budget whose slices are not chosen by rate."""
        return self.options.split if self.options.split != "auto" else "msb_first"

    @property
    def tier(self) -> ExpertTier:
        """The fast tier: enforced over a ``direct`` reader, accounted over a ``memory`` one. Warm from run to run."""
        if self._tier is None:
            options = self.options
            if isinstance(self._reader, DirectReader):
                pool = ReadPool(READ_THREADS)
                pool.set_bandwidth(options.slow_bandwidth or 0.0)
                self._tier = DirectTier(self._reader, options.residency, pool, options.prefetch)
            else:
                self._tier = ExpertTier(self._reader, options.residency, everything=options.fast_memory is None)
        return self._tier

    def _positions(self, request: Request) -> int:
        """Cache positions a request can come to need: all its tokens, and none beyond the context."""
        return min(len(request.prompt) + request.max_tokens, self.spec.max_positions)

    def generate(
        self,
        requests: Items[Request],
        decode: Callable[[list[int]], str] | None = None,
        recorder: TraceRecorder | None = None,
        on_commit: Callable[[int, list[int]], None] | None = None,
        timeline: Timeline | None = None,
    ) -> tuple[list[Result], Statistics]:
        """Serve requests, ``options.batch`` at a time; results come in the order of the requests.

        :param decode: output ids to text, needed where a request has stop strings.
        :param on_commit: called with (request index, new token ids) after every step.
        :param timeline: takes the spans of passes, kernels, waits and reads.
        :raises RequestError: a request cannot be served. :raises BudgetError: the budget is below the minimum.
        """
        for request in requests:
            request.check(self.spec.vocabulary, self.spec.max_positions)
            if request.stop and decode is None:
                raise RequestError("stop strings need a tokenizer to decode with")
        run = _Run(self, requests, decode, recorder, on_commit, timeline)
        try:
            return run.serve(), run.statistics
        except BaseException:
            self._tier = None  # the next run starts with a tier that saw no failure
            raise


class _Run:
    """One call of ``generate``: the state of its sequences, tier and cache."""

    def __init__(
        self,
        engine: Engine,
        requests: Items[Request],
        decode: Callable[[list[int]], str] | None,
        recorder: TraceRecorder | None,
        on_commit: Callable[[int, list[int]], None] | None,
        timeline: Timeline | None,
    ) -> None:
        self.timeline = timeline
        self.options, self.spec = engine.options, engine.spec
        self.decoder, self.backend, self.script = engine._decoder, engine._backend, engine._script
        self.widest = max(self.spec.moe(layer).width for layer in self.spec.moe_layers)
        self.requests, self.decode, self.recorder, self.on_commit = requests, decode, recorder, on_commit
        self.statistics = Statistics(dense_bytes=engine._reader.dense_bytes)
        self.planner = engine.planner
        longest = max((engine._positions(request) for request in requests), default=1)
        self.decoder.reserve_positions(longest)
        self.pool = KVPool(self.spec, min(self.options.batch, max(1, len(requests))), longest)
        sizes = engine.sizes(requests)
        engine.slots(sizes)  # refuses a budget that is too small
        self.tier = engine.tier
        self.tier.begin_run(self.statistics, timeline)
        self.manager = TierManager(self.planner, self.tier, sizes, engine.budget(sizes), self.pool.page_bytes)
        self.free_slots = list(range(self.pool.cache.table.shape[0]))
        self.waiting = deque(enumerate(requests))
        self.running: list[Sequence] = []
        self.results: dict[int, Result] = {}
        self.step_index = 0
        self._routings: Routings  # of the last pass

    def serve(self) -> list[Result]:
        started, read = perf_counter(), self.tier.bytes_read
        try:
            while self.waiting or self.running:
                self.admit()
                self.step()
                self.retire()
        finally:
            self.tier.end_run()
            self.statistics.read_bytes = self.tier.bytes_read - read
        self.statistics.engine_seconds = perf_counter() - started
        return [self.results[index] for index in range(len(self.requests))]

    def step(self) -> None:
        """Draft, verify, commit."""
        plan = self.manager.plan(len(self.running), self.pool.bytes_touched)
        began = perf_counter()
        self.draft(plan)
        drafted = sum(len(sequence.draft) for sequence in self.running)
        self.verify("verify" if drafted else "plain")
        self.manager.observe_step(len(self.running), drafted, perf_counter() - began)
        self.step_index += 1

    def admit(self) -> None:
        """Fill free slots with waiting requests and compute their prompts, together, but for each one's last token."""
        rows = []
        while self.waiting and self.free_slots:
            index, request = self.waiting.popleft()
            limit = min(len(request.prompt) + request.max_tokens, self.spec.max_positions)
            sequence = Sequence(index, request, self.free_slots.pop(0), limit, list(request.prompt))
            self.pool.reserve(sequence.slot, len(request.prompt))
            rows += [(sequence, position, token) for position, token in enumerate(request.prompt[:-1])]
            self.running.append(sequence)
        size = prefill_chunk(self.spec.top_k, self.widest, reads=self.tier.enforced)
        for start in range(0, len(rows), size):
            chunk = rows[start : start + size]
            self.manager.plan(len(self.running), self.pool.bytes_touched)
            everything = list(range(len(chunk)))
            self.tier.begin_step(everything)
            self.compute("prefill", [row[0] for row in chunk], _tokens(chunk), committed=everything, rows=[])

    def draft(self, plan: Plan) -> None:
        """Draft as many tokens for each running sequence as the plan says, with resident MSB slices only."""
        for sequence in self.running:
            sequence.draft, sequence.confidences = [], []
        limit = plan.draft_length
        if limit == 0 or not self.tier.can_draft:
            return
        options = self.options
        means = Draft(
            self.tier.allowed,
            options.draft_top_k or self.spec.top_k,
            options.draft_rescale,
            options.draft_offset,
            options.draft_bits,
        )
        # The last committed token always comes from the target, so a draft of room - 1 tokens can fill the room.
        active = [sequence for sequence in self.running if min(limit, sequence.room - 1) > 0]
        while active:
            rows = []
            for sequence in active:
                position = len(sequence.tokens) - 1 + len(sequence.draft)
                self.pool.reserve(sequence.slot, position + 1)
                rows.append((sequence, position, sequence.draft[-1] if sequence.draft else sequence.tokens[-1]))
            samples = self.compute("draft", active, _tokens(rows), draft=means)
            for sequence, sample in zip(active, samples, strict=True):
                sequence.draft.append(sample.token)
                sequence.confidences.append(sample.confidence)
            self.statistics.drafted += len(active)
            more = self.planner.proceed([sequence.confidences for sequence in active], plan)
            active = [
                sequence
                for sequence, proceed in zip(active, more, strict=True)
                if proceed and len(sequence.draft) < min(limit, sequence.room - 1)
            ]

    def verify(self, phase: Phase) -> None:
        """Compute every drafted position and one more with the target; commit the agreeing prefix and its successor."""
        rows = []
        for sequence in self.running:
            first = len(sequence.tokens) - 1
            self.pool.reserve(sequence.slot, first + 1 + len(sequence.draft))
            rows += [(sequence, first + i, token) for i, token in enumerate([sequence.tokens[-1], *sequence.draft])]
        self.tier.begin_step(
            [row for row, (sequence, position, _) in enumerate(rows) if position == len(sequence.tokens) - 1]
        )
        samples = iter(enumerate(self.compute(phase, [row[0] for row in rows], _tokens(rows), end=False)))
        kept: list[int] = []
        committed: dict[int, int] = {}
        for sequence in self.running:
            before, judged = len(sequence.tokens), False
            for draft_token in [*sequence.draft, None]:
                row, sample = next(samples)
                if judged or sequence.finish is not None:
                    continue  # behind the first disagreement, or behind the end of the sequence
                kept.append(row)
                sequence.commit(sample.token, sample.logprob, self.spec.eos_tokens, self.decode)
                if draft_token is not None:
                    accepted = sample.token == draft_token
                    confidence = sequence.confidences[len(sequence.tokens) - 1 - before]
                    self.planner.observe_judged(confidence, accepted)
                    self.statistics.accepted += accepted
                    self.statistics.rejected += not accepted
                    judged = not accepted or len(sequence.tokens) - before == self.options.commit_limit
            committed[sequence.index] = len(sequence.tokens) - before
            if sequence.draft:
                self.statistics.verifications += 1
                self.statistics.verified += committed[sequence.index]
            if self.on_commit is not None:
                self.on_commit(sequence.index, sequence.tokens[before:])
        self.statistics.committed += sum(committed.values())
        routing = self._routings.of(kept) if self.tier.learns else None
        if routing is not None:
            self.manager.observe_routing(committed, routing)
        self.tier.end_step(phase, routing)

    def compute(
        self,
        phase: Phase,
        sequences: list[Sequence],
        tokens: Tokens,
        draft: Draft | None = None,
        rows: list[int] | None = None,
        committed: list[int] | None = None,
        end: bool = True,
    ) -> list[Sample]:
        """One pass: forward, sample each wanted row for the position after it, count and record."""
        began, waited = perf_counter(), self.tier.waited
        wanted = None if rows is None else np.array(rows, np.int64)
        if self.script is not None:
            positions = tokens.positions.tolist()
            script_rows = [(s.index, len(s.tokens) - 1, at) for s, at in zip(sequences, positions, strict=True)]
            self.script.begin(phase, script_rows, float(self.tier.resident.msb.mean()))
        report = None if self.timeline is None else self.timeline.kernel
        logits, self._routings = self.decoder.forward(tokens, self.pool.cache, self.tier, draft, wanted, report)
        owners = sequences if rows is None else [sequences[row] for row in rows]
        samples = [
            self.backend.sample(logits[i], owner.request.sampling, int(tokens.positions[i]) + 1)
            for i, owner in enumerate(owners)
        ]
        seconds = perf_counter() - began
        counters = self.statistics.phases[phase]
        counters.steps += 1
        counters.tokens += len(sequences)
        if self.timeline is not None:
            self.timeline.add("passes", f"{phase}, {len(sequences)} tokens", began, began + seconds)
        counters.seconds += seconds
        counters.waited_seconds += self.tier.waited - waited
        if phase == "draft":
            self.planner.observe_draft(len(sequences), seconds)
        else:
            self.manager.observe_target(len(sequences), seconds, self.tier.waited - waited)
        if self.recorder is not None:
            self.record(self.recorder, phase, sequences, tokens, samples)
        if end:
            routing = None if committed is None or not self.tier.learns else self._routings.of(committed)
            self.tier.end_step(phase, routing)
        return samples

    def record(
        self, recorder: TraceRecorder, phase: Phase, sequences: list[Sequence], tokens: Tokens, samples: list[Sample]
    ) -> None:
        """Hand the facts of a pass to the recorder."""
        count = len(sequences)
        targets: list[int | None] = [None] * count
        drafts: list[int | None] = [None] * count
        confidences: list[float | None] = [None] * count
        if phase == "draft":
            drafts, confidences = [sample.token for sample in samples], [sample.confidence for sample in samples]
        elif phase != "prefill":
            targets = [sample.token for sample in samples]
            for row, sequence in enumerate(sequences):
                depth = int(tokens.positions[row]) + 1 - len(sequence.tokens)
                if depth < len(sequence.draft):
                    drafts[row], confidences[row] = sequence.draft[depth], sequence.confidences[depth]
        recorder.record(
            phase=phase,
            step=self.step_index,
            sequences=np.array([sequence.index for sequence in sequences], np.int32),
            positions=tokens.positions,
            tokens=tokens.ids,
            targets=targets,
            drafts=drafts,
            confidences=confidences,
            draft_lengths=[len(sequence.draft) for sequence in sequences],
            ranked=list(self._routings.ranked),
            scores=list(self._routings.scores),
            resident=self.tier.resident.msb,
        )

    def retire(self) -> None:
        """Turn finished sequences into results and free their slots."""
        for sequence in [s for s in self.running if s.finish is not None]:
            digest = self.pool.digest(sequence.slot, len(sequence.tokens) - 1) if self.options.keep_kv_digest else None
            finish = sequence.finish or "length"
            self.results[sequence.index] = Result(tuple(sequence.output), tuple(sequence.logprobs), finish, digest)
            self.pool.release(sequence.slot)
            self.free_slots.append(sequence.slot)
            self.running.remove(sequence)


def _tokens(rows: list[tuple[Sequence, int, int]]) -> Tokens:
    """(sequence, position, token id) rows as arrays."""
    return Tokens(
        np.array([token for _, _, token in rows], np.int32),
        np.array([sequence.slot for sequence, _, _ in rows], np.int32),
        np.array([position for _, position, _ in rows], np.int32),
    )
