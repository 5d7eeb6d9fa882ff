"""Byte-level ceilings of `offload.py`: what would still have to be read if everything else were free.

Whatever a system does, its target passes use the experts that the replayed traces say. Belady's rule (keep what is used
again soonest) reads the least, whatever slices lie where, because a target pass needs both slices of an expert. Drafts are
taken to be free, as good as the budget's share of resident MSB slices allows, and of the length that reads least. The
engine's own policy, which knows the past only, is run on the same passes: what lies between the two cannot be known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import Residency, ResidencyParameters, ResidentSet
from elmoe.trace.replacement import belady_misses
from elmoe.trace.replay import ReplayFacts

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 15)
"""Draft lengths tried."""
TOKENS = 96
"""Committed tokens per sequence that a ceiling looks at, behind the prompt."""


class Pass(NamedTuple):
    """A target pass: (layers, experts) uses, (layers, tokens, k) routing of the rows that were sure to stay and of those
    that stayed."""

    uses: NDArray[np.bool_]
    sure: NDArray[np.int32]
    committed: NDArray[np.int32]


Misses = Callable[[list[Pass], int], int]
"""Experts that a cache of so many experts per layer misses in passes, over all layers."""


def clairvoyant_misses(passes: list[Pass], slots: int) -> int:
    """Of the best cache there could be, its first content included; the first pass, a prompt, is not counted."""
    uses = np.stack([step.uses for step in passes[1:]])
    return sum(belady_misses(uses[:, layer], slots, warm=True) for layer in range(uses.shape[1]))


def policy_misses(passes: list[Pass], slots: int) -> int:
    """Of the engine's policy on whole experts; the first pass, a prompt, is not counted."""
    layers, experts = passes[0].uses.shape
    residency, resident = Residency(layers, experts, ResidencyParameters()), ResidentSet.empty(layers, experts)
    plan, misses = SlotPlan((slots,) * layers, (slots,) * layers, 0), 0
    for index, step in enumerate(passes):
        misses += int((step.uses & ~resident.lsb).sum()) if index else 0
        resident = residency.end_step(resident, step.sure, step.committed, step.uses, plan)
    return misses


def least_misses(
    count: Misses, traces: Sequence[ReplayFacts], windows: Sequence[Sequence[int]], top_k: int, whole: float, share: float
) -> float:
    """Experts per layer and committed token that a cache reads, with drafts of the length that reads least.

    :param windows: the sequences of each batch. :param whole: experts per layer whose bytes fit, interpolated.
    :param share: the most of the MSB slices that fit; the trace with at least that share tells what drafts are accepted.
    """
    most = max(trace.resident for trace in traces)
    facts = min((trace for trace in traces if trace.resident >= min(share, most) - 1e-9), key=lambda trace: trace.resident)
    low = int(whole)

    def per_token(length: int) -> float:
        total = 0.0
        for window in windows:
            passes = target_passes(facts, window, top_k, length)
            few = count(passes, low)
            read = few + (whole - low) * (count(passes, low + 1) - few)
            total += read / len(passes[0].uses) / sum(step.committed.shape[1] for step in passes[1:])
        return total / len(windows)

    return min(per_token(length) for length in LENGTHS)


def target_passes(facts: ReplayFacts, window: Sequence[int], top_k: int, length: int) -> list[Pass]:
    """The prompts' pass and those behind it with drafts of ``length``, until a sequence has its tokens."""
    last = {sequence: int(facts.prompts[sequence]) - 1 for sequence in window}
    prompt = np.concatenate([facts.target_routes[sequence, :at, 0, :, :top_k] for sequence, at in last.items()])
    passes = [_pass(facts.experts, prompt, prompt, prompt)]
    ends = {sequence: min(at + TOKENS, facts.length(sequence) - 1 - length) for sequence, at in last.items()}
    while all(last[sequence] < ends[sequence] for sequence in window):
        rows, sure, committed = [], [], []
        for sequence in window:
            start = last[sequence]
            routes = facts.target_routes[sequence, start, : length + 1, :, :top_k]
            agreed = facts.draft_tokens[sequence, start, :length] == facts.target_tokens[sequence, start, :length]
            accepted = length if agreed.all() else int(agreed.argmin())
            last[sequence] += 1 + accepted
            rows.append(routes)
            sure.append(routes[:1])
            committed.append(routes[: 1 + accepted])
        passes.append(_pass(facts.experts, *(np.concatenate(part) for part in (rows, sure, committed))))
    return passes


def _pass(experts: int, rows: NDArray, sure: NDArray, committed: NDArray) -> Pass:
    """From (tokens, layers, k) routing."""
    by_layer = rows.transpose(1, 0, 2).reshape(rows.shape[1], -1)
    uses = np.zeros((len(by_layer), experts), bool)
    uses[np.arange(len(by_layer))[:, None], by_layer] = True
    return Pass(uses, *(part.transpose(1, 0, 2).astype(np.int32) for part in (sure, committed)))
