"""Runs of ours and of peers in alternation, with medians, on a machine that others use too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bench.machine_load import observed, wait_for_calm
from bench.peer_llama import PeerError
from elmoe import kernels

READ_BYTES, READ_LEAST = 10 << 30, 1 << 30
"""Bytes that a probe of the memory reads, and the least that it goes over: less would come from a cache."""
Runner = Callable[[], float]


@dataclass
class Bench:
    """What all cells share: rounds, how long a run waits for calm, and whom to tell that a cell begins, which returns the
    seconds after which it begins no further round."""

    rounds: int
    patience: float
    tokens: int
    report: Callable[[], float]
    probe: list[np.ndarray] = field(default_factory=list)

    def go_over(self, store: Path) -> None:
        """Probe the pages of a store's files from now on: memory is not equally fast everywhere. A peer that copies its
        weights may have pushed some out of memory; this also brings them back."""
        self.probe = [np.memmap(path, np.uint8, "r") for path in store.iterdir() if path.stat().st_size >= 1 << 20]
        if sum(len(part) for part in self.probe) < READ_LEAST:
            self.probe = [np.ones(READ_LEAST, np.uint8)]

    def read(self) -> float:
        """Bytes per second of reading memory with our threads: the best of some passes, so that shares of it err low."""
        rates, size = [], sum(len(part) for part in self.probe)
        for _ in range(max(3, READ_BYTES // size)):
            began = perf_counter()
            for part in self.probe:
                kernels.stream_read(part)
            rates.append(size / (perf_counter() - began))
        return max(rates)

    def alternate(self, runners: dict[str, Runner], rounds: int | None = None) -> Cell:
        """Run all in turn, ``rounds`` times, every other time in reverse, ours once before that to warm up (peers are
        processes that warm up themselves); who fails is left out."""
        cell, began, seconds = Cell({}, {}, []), perf_counter(), self.report()
        for turn in range((self.rounds if rounds is None else rounds) + 1):
            if turn > 1 and perf_counter() - began > seconds:
                break
            for name, runner in list(runners.items())[:: -1 if turn % 2 else 1]:
                if not turn and name not in ("ours", "plain"):
                    continue
                wait_for_calm(min(self.patience, seconds / 20))
                try:
                    value, others = observed(runner)
                except PeerError as error:
                    cell.failures[name] = str(error)
                    del runners[name]
                    cell.values.pop(name, None)
                    continue
                if turn:
                    cell.values.setdefault(name, []).append(value)
                    cell.others.append(others)
        return cell


@dataclass
class Cell:
    """What alternating runs gave: values by runner, reasons of those that failed, cores that others used meanwhile."""

    values: dict[str, list[float]]
    failures: dict[str, str]
    others: list[float]

    def best(self, names: list[str], most: bool = True) -> str | None:
        """The runner among ``names`` with the best median."""
        ran = [name for name in names if name in self.values]
        return (max if most else min)(ran, key=lambda name: median(self.values[name])) if ran else None

    def over(self, one: str, other: str) -> float:
        """Median over rounds of the ratio of two runners: what drifts from round to round cancels."""
        return median(a / b for a, b in zip(self.values[one], self.values[other], strict=True))

    def row(self, work: str, unit: str, target: float, against: str, peers: list[str]) -> dict[str, Any]:
        """A row of rates: the ratio is the median over rounds of ours over the best peer's."""
        mine, peer = self.values["ours"], self.best(peers)
        ratio = None if peer is None else self.over("ours", peer)
        return {
            "work": work, "against": against, "variant": peer, "unit": unit, "ours": median(mine),
            "peer": None if peer is None else median(self.values[peer]), "ratio": ratio, "target": target,
            "met": None if ratio is None else ratio >= target, "share_of_bandwidth": None,
            "failed": {name: self.failures[name] for name in peers if name in self.failures} or None,
            "others_cores": median(self.others), "rounds": len(mine), "runs": self.values,
        }  # fmt: skip
