"""The byte-level ceiling of `offload.py`: what a cache that knows the future would still have to read.

Whatever a system does, its target passes use the experts that the replayed traces say. Belady's rule (keep what is used
again soonest) reads the least, whatever slices lie where, because a target pass needs both slices of an expert. Drafts are
taken to be free, as good as the budget's share of resident MSB slices allows, and of the length that reads least.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from elmoe.trace.replacement import belady_misses
from elmoe.trace.replay import ReplayFacts

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 15)
"""Draft lengths tried."""
TOKENS = 96
"""Committed tokens per sequence that the ceiling looks at, behind the prompt."""


def least_misses(
    traces: Sequence[ReplayFacts], windows: Sequence[Sequence[int]], top_k: int, whole: float, msb_share: float
) -> float:
    """Fewest experts per layer and committed token that must be read.

    :param windows: the sequences of each batch. :param whole: experts per layer whose bytes fit; :param msb_share: the most
        of the MSB slices that fit, which bounds acceptance: the trace with at least that share is taken.
    """
    facts = min(
        (trace for trace in traces if trace.resident >= min(msb_share, max(t.resident for t in traces)) - 1e-9),
        key=lambda trace: trace.resident,
    )
    return min(sum(misses(facts, window, top_k, length, whole) for window in windows) / len(windows) for length in LENGTHS)


def misses(facts: ReplayFacts, window: Sequence[int], top_k: int, length: int, whole: float) -> float:
    """Experts per layer and committed token that Belady's rule reads at one draft length, slots interpolated."""
    steps, committed = zip(*passes(facts, window, top_k, length), strict=True)
    uses = np.stack(steps)
    low = int(whole)

    def total(slots: int) -> int:
        return sum(belady_misses(uses[:, layer], slots, warm=True) for layer in range(uses.shape[1]))

    few = total(low)
    read = few + (whole - low) * (total(low + 1) - few)
    return float(read / uses.shape[1] / sum(committed))


def passes(facts: ReplayFacts, window: Sequence[int], top_k: int, length: int) -> Iterator[tuple[NDArray[np.bool_], int]]:
    """Target passes behind the prompts: (layers, experts) uses and tokens committed, until a sequence has its tokens."""
    layers = facts.target_routes.shape[3]
    last = {sequence: int(facts.prompts[sequence]) - 1 for sequence in window}
    ends = {sequence: min(at + TOKENS, facts.length(sequence) - 1 - length) for sequence, at in last.items()}
    while all(last[sequence] < ends[sequence] for sequence in window):
        uses, committed = np.zeros((layers, facts.experts), bool), 0
        for sequence in window:
            start = last[sequence]
            routes = facts.target_routes[sequence, start, : length + 1, :, :top_k]
            uses[np.arange(layers)[:, None], routes.transpose(1, 0, 2).reshape(layers, -1)] = True
            agreed = facts.draft_tokens[sequence, start, :length] == facts.target_tokens[sequence, start, :length]
            accepted = length if agreed.all() else int(agreed.argmin())
            last[sequence] += 1 + accepted
            committed += 1 + accepted
        yield uses, committed
