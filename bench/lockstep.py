"""Two engines that serve the same work in turns, step by step: what drifts over seconds on a shared machine hits both alike,
so that per cents between them can be told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from elmoe.engine.engine import Engine
from elmoe.engine.request import Output, Request


@dataclass
class Lane:
    """One engine's run: the iterator of its steps, and what it committed in how many seconds since its first tokens."""

    steps: Iterator[list[Output]]
    began: bool = False
    ended: bool = False
    seconds: float = 0.0
    tokens: int = 0

    def step(self) -> None:
        """One step; the first that commits tokens starts the clock."""
        started = perf_counter()
        outputs = next(self.steps, [])
        taken, committed = perf_counter() - started, sum(len(output.tokens) for output in outputs)
        if self.began:
            self.seconds, self.tokens = self.seconds + taken, self.tokens + committed
        self.began = self.began or committed > 0
        self.ended = self.ended or any(output.result is not None for output in outputs) or not outputs


def lockstep_rates(engines: Sequence[Engine], requests: Sequence[list[Request]]) -> list[tuple[float, dict[str, Any]]]:
    """Tokens per second of each of two engines, and its statistics: from its first decoded tokens until a sequence of either
    ends, by its own time.

    Turns go one, two, two, one, one, ... steps: who computes a position right after the other finds its weights in the
    cache, up to 5 % of a step, so each is first at every other position.
    """
    lanes = [Lane(iter(engine.run(work))) for engine, work in zip(engines, requests, strict=True)]
    for lane in lanes:
        while not lane.began:
            lane.step()
    first = 0
    while not any(lane.ended for lane in lanes):
        lanes[first].step()
        lanes[1 - first].step()
        first = 1 - first
    for lane in lanes:
        for _ in lane.steps:
            pass
    if not all(lane.tokens for lane in lanes):
        raise SystemExit("a sequence ended in its first decode step: give runs more tokens than a draft has")
    return [(lane.tokens / lane.seconds, engine.statistics.as_dict()) for lane, engine in zip(lanes, engines, strict=True)]
