"""Counters of a run: what was drafted, accepted, found resident and read, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Phase = str
"""``prefill``, ``plain``, ``draft``, ``verify``, or ``mixed``: plain decoding beside a chunk of a prompt."""
PHASES = ("prefill", "plain", "draft", "verify", "mixed")


class SliceCounters:
    """Of one kind of slice, by layer: how many of active experts were resident, how many were not, and bytes of one."""

    def __init__(self, sizes: NDArray[np.int64]) -> None:
        self.sizes = sizes
        self.hits, self.misses = np.zeros_like(sizes), np.zeros_like(sizes)


@dataclass
class PhaseCounters:
    """Per phase. ``waited_seconds``: of ``seconds``, waiting for reads. Bytes are of expert slices: ``fast`` were resident,
    ``slow`` came from the slow tier. A hit is a slice of an expert active in a step and layer that was resident."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    slices: dict[str, SliceCounters] = field(default_factory=dict)

    def count(self, name: str, hits: NDArray[np.int64], misses: NDArray[np.int64], sizes: NDArray[np.int64]) -> None:
        """Add a step's hits and misses of the slices ``name``, ``msb`` or ``lsb``, by layer. Hot: what can wait is summed
        when it is asked for."""
        if name not in self.slices:
            self.slices[name] = SliceCounters(sizes)
        counters = self.slices[name]
        counters.hits += hits
        counters.misses += misses

    msb_hits = property(lambda self: self._sum("msb", "hits"))
    msb_misses = property(lambda self: self._sum("msb", "misses"))
    lsb_hits = property(lambda self: self._sum("lsb", "hits"))
    lsb_misses = property(lambda self: self._sum("lsb", "misses"))

    def _sum(self, name: str, kind: str) -> int:
        return int(getattr(self.slices[name], kind).sum()) if name in self.slices else 0

    def _kinds(self) -> list[SliceCounters]:
        """Those of now: another thread may read them while a step adds a kind."""
        return list(self.slices.values())

    @property
    def fast_bytes(self) -> int:
        """Bytes of hits."""
        return sum(int(counters.hits @ counters.sizes) for counters in self._kinds())

    @property
    def slow_bytes(self) -> int:
        """Bytes of misses."""
        return sum(int(counters.misses @ counters.sizes) for counters in self._kinds())

    def as_dict(self) -> dict[str, object]:
        """Plain numbers; hits and misses per layer as lists."""
        return {
            "steps": self.steps, "tokens": self.tokens, "seconds": self.seconds, "waited_seconds": self.waited_seconds,
            "fast_bytes": self.fast_bytes, "slow_bytes": self.slow_bytes,
            "msb_hits": self.msb_hits, "msb_misses": self.msb_misses,
            "lsb_hits": self.lsb_hits, "lsb_misses": self.lsb_misses,
            "layer_hits": {name: counters.hits.tolist() for name, counters in list(self.slices.items())},
            "layer_misses": {name: counters.misses.tolist() for name, counters in list(self.slices.items())},
        }  # fmt: skip


@dataclass
class Statistics:
    """A run. ``drafted``, ``accepted``, ``rejected``: draft tokens; those behind a rejection count as neither of the last
    two. ``prompt_tokens``: of requests, once for all copies; ``cached_tokens``: of those, found in the prefix cache.
    ``verifications``: drafts verified, one per sequence and step; ``verified``: tokens they committed."""

    phases: dict[Phase, PhaseCounters] = field(default_factory=lambda: {phase: PhaseCounters() for phase in PHASES})
    prompt_tokens: int = 0
    cached_tokens: int = 0
    committed: int = 0
    drafted: int = 0
    accepted: int = 0
    rejected: int = 0
    verifications: int = 0
    verified: int = 0
    draft_slow_reads: int = 0
    slow_reads: int = 0
    foreseen_hits: int = 0
    read_bytes: int = 0
    dense_bytes: int = 0
    engine_seconds: float = 0.0

    @property
    def decode_seconds(self) -> float:
        """Seconds of all phases but prefill."""
        return sum(self.phases[phase].seconds for phase in PHASES if phase != "prefill")

    @property
    def acceptance_rate(self) -> float | None:
        """Share of judged draft tokens that were accepted; None where none were judged."""
        return _ratio(self.accepted, self.accepted + self.rejected)

    def as_dict(self) -> dict[str, object]:
        """Rates and counters for ``--json`` and tables."""
        target = [self.phases["plain"], self.phases["verify"], self.phases["mixed"]]
        msb_hits, lsb_hits = sum(p.msb_hits for p in target), sum(p.lsb_hits for p in target)
        msb_all = msb_hits + sum(p.msb_misses for p in target)
        lsb_all = lsb_hits + sum(p.lsb_misses for p in target)
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "committed_tokens": self.committed,
            "tokens_per_second": _ratio(self.committed, self.decode_seconds),
            "acceptance_rate": self.acceptance_rate,
            "drafted_tokens": self.drafted,
            "accepted_tokens": self.accepted,
            "tokens_per_verification": _ratio(self.verified, self.verifications),
            "msb_hit_rate": _ratio(msb_hits, msb_all),
            "lsb_hit_rate": _ratio(lsb_hits, lsb_all),
            "fast_bytes": sum(self.phases[p].fast_bytes for p in PHASES if p != "prefill"),
            "slow_bytes": sum(self.phases[p].slow_bytes for p in PHASES if p != "prefill"),
            "slow_bytes_per_token": _ratio(sum(self.phases[p].slow_bytes for p in PHASES if p != "prefill"), self.committed),
            "draft_slow_reads": self.draft_slow_reads,
            "slow_reads": self.slow_reads,
            "foreseen_hits": self.foreseen_hits,
            "read_bytes": self.read_bytes,
            "phases": {phase: counters.as_dict() for phase, counters in self.phases.items()},
        }


def _ratio(value: float, base: float) -> float | None:
    """``value / base``, None where there is no base."""
    return value / base if base else None
