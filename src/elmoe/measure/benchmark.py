"""Throughput of modes and batch sizes on one store, with the time spent outside the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Backend, Routings, SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.observe import ObservedBackend
from elmoe.engine.request import Request, Result
from elmoe.kernels.slices import Refill, SlicesFeed
from elmoe.llm import Model
from elmoe.measure.replay import ReplayBackend
from elmoe.policy.planner import Mode


class TimedBackend(ObservedBackend):
    """A backend that adds up the seconds spent inside its calls, but for waits and decisions of an enforced tier."""

    def __init__(self, backend: Backend) -> None:
        self.seconds = 0.0
        super().__init__(backend, self._add)

    def forward(self, *arguments: Any, **named: Any) -> Routings:
        """See ``Backend``."""
        feed = named.get("feed")
        if not isinstance(feed, SlicesFeed):
            return super().forward(*arguments, **named)
        before, deciding = feed.slices.waited, 0.0

        def timed(row: int, experts: NDArray[np.int32]) -> Refill | None:
            nonlocal deciding
            began = perf_counter()
            change = feed.decide(row, experts)
            deciding += perf_counter() - began
            return change

        result = super().forward(*arguments, **{**named, "feed": SlicesFeed(feed.slices, timed)})
        self.seconds -= deciding + feed.slices.waited - before
        return result

    def _add(self, name: str, began: float, ended: float) -> None:
        self.seconds += ended - began


def benchmark(
    model: Model,
    requests: list[Request],
    modes: Iterable[Mode],
    batches: Iterable[int],
    repeats: int = 3,
    progress: Callable[[], None] | None = None,
    replay: ReplayBackend | None = None,
) -> list[dict[str, Any]]:
    """One row per mode and batch size: medians over ``repeats`` interleaved runs, the first of each row not counted.

    The requests are served ``batch`` at a time, the same for every row, so ``identical`` tells whether a row's tokens and
    log-probabilities equal those of the first; in a ``replay`` the tokens are the trace's, and what is compared are hashes
    of the logits at committed positions. An enforced tier starts cold in each run and is warmed up on the same requests.
    """
    cases = [(mode, batch) for mode in modes for batch in batches]
    runs: dict[tuple[Mode, int], list[dict[str, Any]]] = {case: [] for case in cases}
    reference: Any = None
    identical = dict.fromkeys(cases, True)
    for repeat in range(repeats + 1):
        for case in cases:
            mode, batch = case
            timed = TimedBackend(replay or model.backend)
            options = replace(model.engine.options, mode=mode, batch=batch)
            engine = Engine(model.reader, timed, options, replay)
            if model.reader.kind == "direct":
                engine.generate(requests)
            timed.seconds = 0.0
            results, statistics = engine.generate(requests)
            outcome = outcome_of(results, replay)
            reference = reference or outcome
            identical[case] &= outcome == reference
            row = statistics.as_dict()
            passes = sum(counters.steps for counters in statistics.phases.values())
            waited = sum(counters.waited_seconds for counters in statistics.phases.values())
            overhead = 1e3 * (statistics.engine_seconds - timed.seconds - waited)
            row["overhead_ms_per_token"] = overhead / max(1, statistics.committed)
            row["overhead_ms_per_pass"] = overhead / max(1, passes)
            if repeat:
                runs[case].append(row)
            if progress is not None:
                progress()
    rows = []
    for (mode, batch), samples in runs.items():
        row = dict(samples[-1])
        for key in ("tokens_per_second", "overhead_ms_per_token", "overhead_ms_per_pass"):
            row[key] = median(sample[key] for sample in samples)
        rows.append({"mode": mode, "batch": batch, "identical": identical[(mode, batch)], **row})
    return rows


def outcome_of(results: list[Result], replay: ReplayBackend | None) -> Any:
    """What must be equal between runs: the results; of a replay, the logits at committed positions."""
    return results if replay is None else replay.committed_digests()


def random_prompts(model: Model, count: int, length: int, max_tokens: int, sampling: SamplingParameters) -> list[Request]:
    """``count`` requests of random token ids; end-of-sequence tokens are ignored so that all rows do equal work."""
    rng = np.random.default_rng(sampling.seed)
    vocabulary = model.reader.spec.vocabulary
    return [
        Request(tuple(rng.integers(0, vocabulary, length).tolist()), max_tokens, sampling, ignore_eos=True)
        for _ in range(count)
    ]
