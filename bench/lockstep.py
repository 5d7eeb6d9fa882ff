"""Two engines that serve the same work in turns, step by step: what drifts over seconds on a shared machine hits both alike,
so that per cents between them can be told."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from time import perf_counter
from typing import Any

from elmoe.engine.engine import Engine
from elmoe.engine.request import Request


class Turns:
    """Two callers of which one runs at a time; who leaves no longer has a turn."""

    def __init__(self) -> None:
        self._condition = Condition()
        self._turn = 0
        self._left: set[int] = set()

    def take(self, caller: int) -> None:
        """Wait for the turn of ``caller``, 0 or 1."""
        with self._condition:
            self._condition.wait_for(lambda: self._turn == caller or 1 - caller in self._left)

    def give(self, caller: int) -> None:
        """It is the other's turn."""
        with self._condition:
            self._turn = 1 - caller
            self._condition.notify_all()

    def leave(self, caller: int) -> None:
        """No more turns for ``caller``."""
        with self._condition:
            self._left.add(caller)
            self._condition.notify_all()


def lockstep_rates(engines: Sequence[Engine], requests: Sequence[list[Request]]) -> list[tuple[float, dict[str, Any]]]:
    """Tokens per second of each of two engines, and its statistics: from its first decoded tokens until a sequence of either
    ends, by its own time.

    Turns go one, two, two, two, ... steps: who computes a position right after the other finds its weights in the cache, up
    to 5 % of a step, so each is first at every other position.
    """
    turns, ended = Turns(), False

    def serve(me: int) -> tuple[float, dict[str, Any]]:
        last, left = len(requests[me]) - 1, [request.max_tokens for request in requests[me]]
        seconds, tokens, step_tokens, began, steps = 0.0, 0, 0, 0.0, 0

        def committed(index: int, new: list[int]) -> None:
            nonlocal seconds, tokens, step_tokens, began, steps, ended
            left[index] -= len(new)
            step_tokens += len(new)
            if index != last:
                return
            if began and not ended:  # the first step starts the clock
                seconds, tokens = seconds + perf_counter() - began, tokens + step_tokens
            step_tokens, steps, ended = 0, steps + 1, ended or min(left) <= 0
            if steps % 2 != me:
                turns.give(me)
                turns.take(me)
            began = perf_counter()

        turns.take(me)
        try:
            _, statistics = engines[me].generate(requests[me], on_commit=committed)
        finally:
            turns.leave(me)
        if not tokens:
            raise SystemExit("a sequence ended in its first decode step: give runs more tokens than a draft has")
        return tokens / seconds, statistics.as_dict()

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(serve, (0, 1)))
