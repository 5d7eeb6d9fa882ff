"""Metrics for Prometheus, with the suffixes of llama-server and vLLM. What the engine counts is read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from mmap import PAGESIZE
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from elmoe import __version__
from elmoe.engine.statistics import PHASES, Statistics
from elmoe.llm import Model
from elmoe.server.answers import Answers
from elmoe.server.engine_thread import Call, EngineThread

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800)
"""Buckets of times, seconds."""
COUNTED: dict[str, tuple[str, Callable[[Statistics], float]]] = {
    "spec_decode_num_drafts": ("Drafts that the target verified.", lambda s: s.verifications),
    "spec_decode_num_draft_tokens": ("Tokens drafted.", lambda s: s.drafted),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that the target drew as well.", lambda s: s.accepted),
    "decode_steps": ("Steps of the target that drew tokens.", lambda s: sum(
        s.phases[phase].steps for phase in ("plain", "verify", "mixed"))),
    "engine_seconds": ("Seconds of passes.", lambda s: sum(s.phases[phase].seconds for phase in PHASES)),
    "slow_tier_wait_seconds": ("Seconds of passes that waited for reads.", lambda s: sum(
        s.phases[phase].waited_seconds for phase in PHASES)),
    "msb_hits": ("MSB slices of active experts that were in the fast tier.", lambda s: _decoding(s, "msb_hits")),
    "msb_misses": ("MSB slices of active experts that were not.", lambda s: _decoding(s, "msb_misses")),
    "lsb_hits": ("LSB slices of active experts that were in the fast tier.", lambda s: _decoding(s, "lsb_hits")),
    "lsb_misses": ("LSB slices of active experts that were not.", lambda s: _decoding(s, "lsb_misses")),
}  # fmt: skip
"""Counters of the engine: help, and the value in the statistics of a run."""

TIERS: dict[str, Callable[[Statistics], float]] = {
    "fast": lambda s: sum(s.phases[phase].fast_bytes for phase in PHASES),
    "slow": lambda s: sum(s.phases[phase].slow_bytes for phase in PHASES),
}
"""Bytes of slices that steps used, by tier."""


def counted(statistics: Statistics) -> dict[str, float]:
    """What a run counted."""
    return {name: value(statistics) for name, (_, value) in COUNTED.items()} | {
        tier: value(statistics) for tier, value in TIERS.items()
    }


def _decoding(statistics: Statistics, name: str) -> float:
    return float(sum(getattr(statistics.phases[phase], name) for phase in ("plain", "verify", "mixed")))


class Metrics:
    """All metrics of one server."""

    def __init__(self, model: Model, engine: EngineThread) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each that nobody asks for
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model, engine))

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"elmoe_{name}", text, labels, registry=self._registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"elmoe_{name}", text, registry=self._registry, buckets=SECONDS)

        self.requests = counter("http_requests", "Requests by status.", "path", "status")
        self._ended = counter("request_success", "Answers by the reason of their end.", "finished_reason")
        self._failed = counter("request_failure", "Calls that ended before their time, by what ended them.", "reason")
        for reason in ("Gone", "TimeUp"):  # they are there from the start, so that a first one shows
            self._failed.labels(reason)
        self._prompt = counter("prompt_tokens", "Tokens of prompts.")
        self._cached = counter("prefix_cache_hits", "Tokens of prompts that the prefix cache had.")
        self._generated = counter("generation_tokens", "Tokens of answers.")
        self._first = histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._each = histogram("time_per_output_token_seconds", "Between tokens of an answer, the mean of each call.")
        self._whole = histogram("e2e_request_latency_seconds", "From the request to its end.")

    def ended(self, call: Call, answers: Answers, error: BaseException | None, seconds: float) -> None:
        """A call has ended."""
        for reason in answers.finish_reasons:
            self._ended.labels(reason).inc()
        if error is not None:
            self._failed.labels(type(error).__name__).inc()
        self._prompt.inc(answers.prompt_tokens)
        self._cached.inc(answers.cached_tokens)
        self._generated.inc(answers.completion_tokens)
        self._whole.observe(seconds)
        if call.first_token is not None and call.last_token is not None:
            self._first.observe(call.first_token - call.began)
            further = answers.completion_tokens / len(answers.choices) - 1
            if further > 0:
                self._each.observe((call.last_token - call.first_token) / further)

    def text(self) -> bytes:
        """All of them, in the format of Prometheus."""
        return generate_latest(self._registry)


class _EngineCollector:
    """What the engine counts and holds, read at each scrape."""

    def __init__(self, model: Model, engine: EngineThread) -> None:
        self._model, self._engine = model, engine

    def collect(self) -> Iterator[Metric]:
        """See ``CollectorRegistry``."""
        engine, thread = self._model.engine, self._engine
        yield InfoMetricFamily(
            "elmoe_server", "What is served.", value={"version": __version__, "mode": engine.options.mode,
            "reader": self._model.reader.kind, "slots": str(engine.options.batch)},
        )  # fmt: skip
        running, waiting = len(engine.scheduler.running), len(engine.scheduler.waiting)
        yield _gauge("requests_running", "Answers that run.", running)
        yield _gauge("requests_waiting", "Answers that wait.", max(waiting, thread.answers - running))
        totals = thread.totals()
        for name, (text, _) in COUNTED.items():
            family = CounterMetricFamily(f"elmoe_{name}", text)
            family.add_metric([], totals[name])
            yield family
        used = CounterMetricFamily(
            "elmoe_slice_bytes", "Bytes of expert slices used, by the tier that had them.", labels=["tier"]
        )
        for tier in TIERS:
            used.add_metric([tier], totals[tier])
        yield used
        read = CounterMetricFamily("elmoe_read_bytes", "Bytes read from the store by the enforced tier.")
        read.add_metric([], engine.tier.bytes_read)
        yield read
        yield from self._memory()

    def _memory(self) -> Iterator[Metric]:
        engine = self._model.engine
        cache, sizes = engine.cache, engine.fitting.sizes_beside(0)
        kept = engine.tier.resident
        slices = int(kept.msb.sum(axis=1) @ np.array(sizes.msb) + kept.lsb.sum(axis=1) @ np.array(sizes.lsb))
        if engine.options.fast_memory is None and not engine.tier.enforced:
            slices = sizes.all_experts
        use = GaugeMetricFamily("elmoe_fast_memory_bytes", "Bytes of the fast tier, by use.", labels=["use"])
        for name, value in {
            "dense": sizes.dense, "kv_cache": cache.bytes_touched - cache.bytes_resting,
            "prefix_cache": cache.bytes_resting, "staging": sizes.staging, "expert_slices": slices,
        }.items():  # fmt: skip
            use.add_metric([name], value)
        yield use
        budget = engine.fitting.budget(engine.fitting.sizes_beside(cache.bytes_touched))
        yield _gauge("fast_memory_budget_bytes", "Budget of the fast tier.", budget)
        yield _gauge("kv_cache_ceiling_bytes", "Largest size of the KV cache.", cache.pages * cache.page_bytes)
        used = (cache.bytes_in_use - cache.bytes_resting) / cache.page_bytes / cache.pages
        yield _gauge("kv_cache_usage_ratio", "Share of the KV cache that answers use.", used)
        yield _gauge("process_resident_memory_bytes", "Resident memory of the server, mapped files included.", resident())


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"elmoe_{name}", text, value=value)


def resident(proc: Path = Path("/proc/self/statm")) -> int:
    """Resident bytes of this process."""
    return int(proc.read_text().split()[1]) * PAGESIZE
