"""Byte-level ceilings of `offload.py`: what would bound it if bytes over bandwidth were all that took time.

Whatever a system does, its target passes use the experts that the replayed traces say, and draft tokens are accepted as the
trace of that share of resident MSB slices says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import FastTierSizes, SlotPlan
from elmoe.policy.residency import ResidencyParameters
from elmoe.trace.draft_facts import DraftFacts
from elmoe.trace.replacement import belady_misses
from elmoe.trace.residents import ReplayedResidents, experts_used

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 10, 12, 15)
"""Draft lengths tried."""
MSB_STEP = 4
"""MSB slices per layer are tried in steps of so many."""
TOKENS = 96
"""Committed tokens per sequence that a ceiling looks at, behind the prompt."""


class Pass(NamedTuple):
    """A target pass: (layers, experts) uses, (tokens, layers, k) routing of the rows that were sure to stay and of those
    that stayed."""

    uses: NDArray[np.bool_]
    sure: NDArray[np.uint16]
    committed: NDArray[np.uint16]


@dataclass(frozen=True)
class Ceilings:
    """Of replayed ``traces`` over ``windows`` (sequences of each batch), in an engine's ``sizes`` and ``budget`` bytes."""

    traces: Sequence[DraftFacts]
    windows: Sequence[Sequence[int]]
    sizes: FastTierSizes
    budget: int

    def clairvoyant_bytes(self) -> float:
        """Slow bytes per token of a cache that knows the future.

        Belady's rule (keep what is used again soonest) on whole expert bytes reads the least, whatever slices lie where,
        because a target pass needs both slices of an expert. Drafts are free, as good as the trace of at least the share of
        MSB slices that would fit alone, and of the length that reads least.
        """
        whole = sum(self._slices)
        share = min(1.0, self._room / len(self.sizes.msb) / self.sizes.experts / self._slices[0])
        most = max(trace.resident for trace in self.traces)
        facts = min((t for t in self.traces if t.resident >= min(share, most) - 1e-9), key=lambda trace: trace.resident)
        slots = min(self.sizes.experts, self._room / len(self.sizes.msb) / whole)
        low = int(slots)

        def per_token(length: int) -> float:
            total = 0.0
            for window in self.windows:
                passes = target_passes(facts, window, self.sizes.top_k, length)
                few = clairvoyant_misses(passes, low)
                read = few + (slots - low) * (clairvoyant_misses(passes, low + 1) - few)
                total += read / len(passes[0].uses) / sum(len(step.committed) for step in passes[1:])
            return total / len(self.windows)

        return min(per_token(length) for length in LENGTHS) * len(self.sizes.msb) * whole

    def policy_rate(self, slow: float, fast: float) -> float:
        """Tokens/s of the engine's own policy if only bytes took time: the best of all splits and draft lengths, fixed.

        A draft reads the dense parts and its resident MSB slices at ``fast`` bytes per second, a target pass all it uses;
        reads of what is not resident, at ``slow`` bytes per second, hide behind both without a loss: behind drafts as far
        as there is room beside the residents.
        """
        msb, lsb = self._slices
        per_layer = self._room // len(self.sizes.msb)
        best = 0.0
        for length in LENGTHS:
            for msb_slots in range(self.sizes.top_k, min(self.sizes.experts, per_layer // msb) + 1, MSB_STEP):
                share = msb_slots / self.sizes.experts
                facts = min(self.traces, key=lambda trace: abs(trace.resident - share))
                passes = [target_passes(facts, window, self.sizes.top_k, length) for window in self.windows]
                most = min(msb_slots, (per_layer - msb_slots * msb) // lsb) if lsb else msb_slots
                for lsb_slots in {most, 0}:
                    best = max(best, self._rate(passes, msb_slots, lsb_slots, length, slow, fast))
        return best

    def naive_rate(self, slow: float, fast: float) -> float:
        """Tokens/s of plain decoding that keeps nothing, in the same terms."""
        passes = [target_passes(self.traces[0], window, self.sizes.top_k, 0) for window in self.windows]
        return self._rate(passes, 0, 0, 0, slow, fast)

    @property
    def _slices(self) -> tuple[int, int]:
        """Mean bytes of a layer's slices."""
        layers = len(self.sizes.msb)
        return sum(self.sizes.msb) // layers, sum(self.sizes.lsb) // layers

    @property
    def _room(self) -> int:
        """Bytes for slices, resident or in flight."""
        return self.budget - self.sizes.dense - self.sizes.kv

    def _rate(self, runs: list[list[Pass]], msb_slots: int, lsb_slots: int, length: int, slow: float, fast: float) -> float:
        msb, lsb = self._slices
        layers, experts = runs[0][0].uses.shape
        repeats = len(self.sizes.msb) / layers  # a layer of the trace stands for so many of the model
        ahead = self._room - len(self.sizes.msb) * (msb_slots * msb + lsb_slots * lsb)
        plan = SlotPlan((msb_slots,) * layers, (lsb_slots,) * layers, 0)
        seconds, tokens = 0.0, 0
        residents = ReplayedResidents(layers, experts, plan, ResidencyParameters())
        for passes in runs:  # each into a tier that is warm from those before
            for index, step in enumerate(passes):
                resident = residents.resident
                if index:  # the first, a prompt, is not counted
                    missing = int((step.uses & ~resident.msb).sum()) * msb + int((step.uses & ~resident.lsb).sum()) * lsb
                    drafted = int((experts_used(step.sure, experts) & resident.msb).sum()) * msb
                    draft = length * (self.sizes.dense + repeats * drafted) / fast
                    target = (self.sizes.dense + repeats * int(step.uses.sum()) * (msb + lsb)) / fast
                    reading = repeats * missing / slow
                    seconds += draft + max(target, reading - min(draft, ahead / slow))
                    tokens += len(step.committed)
                residents.end_pass(step.sure, step.committed, step.uses)
        return tokens / seconds


def clairvoyant_misses(passes: list[Pass], slots: int) -> int:
    """Of the best cache there could be, its first content included; the first pass, a prompt, is not counted."""
    uses = np.stack([step.uses for step in passes[1:]])
    return sum(belady_misses(uses[:, layer], slots, warm=True) for layer in range(uses.shape[1]))


def target_passes(facts: DraftFacts, window: Sequence[int], top_k: int, length: int) -> list[Pass]:
    """The prompts' pass and those behind it with drafts of ``length``, until a sequence has its tokens."""
    last = {sequence: int(facts.prompts[sequence]) - 1 for sequence in window}
    prompt = np.concatenate([facts.target_routes[sequence, :at, 0, :, :top_k] for sequence, at in last.items()])
    passes = [Pass(experts_used(prompt, facts.experts), prompt, prompt)]
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
        passes.append(
            Pass(experts_used(np.concatenate(rows), facts.experts), np.concatenate(sure), np.concatenate(committed))
        )
    return passes
