"""Chrome trace files, which Perfetto shows: spans on named tracks. The engine and the simulator both write this format."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from elmoe.errors import ElmoeError
from elmoe.files import json_text, write_whole


class Span(NamedTuple):
    """Something that happens on a track from ``began`` to ``ended``, seconds on any clock."""

    track: str
    name: str
    began: float
    ended: float


def write_chrome_trace(spans: Iterable[Span], path: Path, order: Callable[[str], Any] = str) -> None:
    """Write complete events in microseconds from the first span on, and the names of their tracks.

    :param order: the sort key of tracks, by their names.
    :raises ElmoeError: the file cannot be written.
    """
    spans = list(spans)
    first = min((span.began for span in spans), default=0.0)
    tracks = {name: index for index, name in enumerate(sorted({span.track for span in spans}, key=order))}
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": index, "name": "thread_name", "args": {"name": name}} for name, index in tracks.items()
    ]
    events += [
        {
            "ph": "X", "pid": 1, "tid": tracks[span.track], "name": span.name, "ts": 1e6 * (span.began - first),
            "dur": 1e6 * (span.ended - span.began),
        }
        for span in spans
    ]  # fmt: skip
    write_whole(path, json_text({"traceEvents": events, "displayTimeUnit": "ms"}).encode(), ElmoeError)
