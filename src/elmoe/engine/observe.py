"""Watching a run: seconds in a backend's calls; a timeline of passes, kernels, waits and reads for Chrome or Perfetto."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from numpy.typing import NDArray

from elmoe.bitslice import Backend, Report, Routings, Sample
from elmoe.chrome_trace import Span, write_chrome_trace


class ObservedBackend:
    """A backend that reports each call as (name, begin, end)."""

    def __init__(self, backend: Backend, report: Report) -> None:
        self._backend, self._report = backend, report

    def _call(self, name: str, *arguments: Any, **named: Any) -> Any:
        began = perf_counter()
        result = getattr(self._backend, name)(*arguments, **named)
        self._report(name, began, perf_counter())
        return result

    def embed(self, *arguments: Any, **named: Any) -> NDArray:
        """See ``Backend``."""
        return self._call("embed", *arguments, **named)

    def forward(self, *arguments: Any, **named: Any) -> Routings:
        """See ``Backend``."""
        return self._call("forward", *arguments, **named)

    def logits(self, *arguments: Any, **named: Any) -> NDArray:
        """See ``Backend``."""
        return self._call("logits", *arguments, **named)

    def sample(self, *arguments: Any, **named: Any) -> Sample:
        """See ``Backend``."""
        return self._call("sample", *arguments, **named)


class Timeline:
    """Spans of a run. Tracks: ``passes``, ``kernels``, ``waits`` (compute waits for a read) and ``read n`` (in flight)."""

    def __init__(self) -> None:
        self.spans: list[Span] = []

    def add(self, track: str, name: str, began: float, ended: float) -> None:
        """Note one span, seconds on the steady clock."""
        self.spans.append(Span(track, name, began, ended))

    def kernel(self, name: str, began: float, ended: float) -> None:
        """Note a span of computation."""
        self.add("kernels", name, began, ended)

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
        if not total:
            return None
        return max(0.0, 1 - sum(end - begin for begin, end in _union(waits)) / total)  # a wait may outlast its read a little

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
