"""Watching a run: seconds in kernel calls, and a timeline of passes, kernels, waits and reads for Chrome or Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import ModuleType, SimpleNamespace
from typing import Any

from elmoe.chrome_trace import Span, write_chrome_trace

KERNELS = ("embed", "attention_block", "route", "expert_ffn", "rms_norm", "logits", "sample")


class ObservedBackend(SimpleNamespace):
    """A backend that reports each call as (kernel, begin, end). ``fused``: where the backend can compute all layers in one
    call, so be it; otherwise each kernel is seen."""

    def __init__(
        self, backend: ModuleType | SimpleNamespace, report: Callable[[str, float, float], None], fused: bool = False
    ) -> None:
        super().__init__(**{name: _observed(name, getattr(backend, name), report) for name in KERNELS})
        if fused and hasattr(backend, "forward"):
            self.forward, self.LayerStack = _observed("forward", backend.forward, report), backend.LayerStack


def _observed(name: str, function: Callable[..., Any], report: Callable[[str, float, float], None]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        began = perf_counter()
        result = function(*arguments, **named)
        report(name, began, perf_counter())
        return result

    return call


class Timeline:
    """Spans of a run. Tracks: ``passes``, ``kernels``, ``waits`` (compute waits for a read) and ``read n`` (in flight)."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, track: str, name: str, began: float, ended: float) -> None:
        """Note one span, seconds on the steady clock."""
        self.spans.append(Span(track, name, began, ended))

    def backend(self, backend: ModuleType | SimpleNamespace) -> ObservedBackend:
        """The backend to run with, so that its calls appear."""
        return ObservedBackend(backend, lambda name, began, ended: self.add("kernels", name, began, ended))

    def add_reads(self, events: list[tuple[float, float, float, int, int]]) -> None:
        """Events of the read pool, (submitted, started, finished, bytes, priority), on as few tracks as they need."""
        free: list[float] = []
        for _, started, finished, size, priority in sorted(events, key=lambda event: event[1]):
            track = next((i for i, end in enumerate(free) if end <= started), len(free))
            free[track : track + 1] = [finished]
            self.add(f"read {track}", f"{'read ahead' if priority else 'read'} {size / 1e6:.1f} MB", started, finished)

    def hidden_share(self) -> float | None:
        """Share of the time with reads in flight during which compute did not wait for them; None without reads."""
        reading = _union([(span.began, span.ended) for span in self.spans if span.track.startswith("read ")])
        waits = [(span.began, span.ended) for span in self.spans if span.track == "waits"]
        total = sum(end - begin for begin, end in reading)
        return 1 - sum(end - begin for begin, end in _union(waits)) / total if total else None

    def write(self, path: Path) -> None:
        """As a Chrome trace; nothing without spans."""
        if self.spans:
            write_chrome_trace(self.spans, path, _order)


def _order(track: str) -> tuple[int, str]:
    return (("passes", "kernels", "waits").index(track) if not track.startswith("read") else 3, track)


def _union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans merged where they overlap."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged
