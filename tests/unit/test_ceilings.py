"""Ceilings of the offload bench where they can be told by hand."""

from __future__ import annotations

import numpy as np
import pytest
from bench.ceilings import LENGTHS, Ceilings

from elmoe.policy.budget import FastTierSizes
from elmoe.trace.draft_facts import DraftFacts

LAYERS, EXPERTS, TOP_K, MSB, LSB = 2, 16, 4, 100, 80
SLOW, FAST = 1e3, 1e5
SEQUENCES, POSITIONS, PROMPT, DEPTHS = 2, 140, 8, max(LENGTHS)


def facts(accepted: bool, seed: int | None = None) -> DraftFacts:
    """Experts 0..3 in every layer, or drawn with ``seed``; every draft token accepted, or none."""
    shape = (SEQUENCES, POSITIONS, DEPTHS + 1)
    routes = np.broadcast_to(np.arange(TOP_K, dtype=np.uint16), (*shape, LAYERS, TOP_K))
    if seed is not None:
        routes = np.argsort(np.random.default_rng(seed).random((*shape, LAYERS, EXPERTS)))[..., :TOP_K].astype(np.uint16)
    scores = np.ones_like(routes, np.float16)
    target = np.zeros(shape, np.int32)
    draft = np.full((SEQUENCES, POSITIONS, DEPTHS), 0 if accepted else 1, np.int32)
    return DraftFacts(
        np.zeros((SEQUENCES, POSITIONS), np.int32), np.full(SEQUENCES, PROMPT, np.int32), target, draft,
        np.ones(draft.shape, np.float32), routes, scores, routes[:, :, :-1], scores[:, :, :-1], EXPERTS, 1.0,
    )  # fmt: skip


def ceilings(trace: DraftFacts, slots: float) -> Ceilings:
    sizes = FastTierSizes(0, 0, 0, (MSB,) * LAYERS, (LSB,) * LAYERS, EXPERTS, TOP_K)
    return Ceilings([trace], [[0, 1]], sizes, int(slots * LAYERS * (MSB + LSB)))


def test_naive_reads_all_it_uses():
    step = LAYERS * TOP_K * (MSB + LSB)
    assert ceilings(facts(True), 8).naive_rate(SLOW, FAST) == pytest.approx(SEQUENCES * SLOW / step)


def test_what_is_resident_costs_the_fast_tier_only():
    step = LAYERS * TOP_K * (MSB + LSB)
    drafts = LAYERS * TOP_K * MSB * DEPTHS
    assert ceilings(facts(False), 8).policy_rate(SLOW, FAST) == pytest.approx(SEQUENCES * FAST / step)
    assert ceilings(facts(True), 8).policy_rate(SLOW, FAST) == pytest.approx(
        SEQUENCES * (1 + DEPTHS) * FAST / (step + drafts)
    )
    assert ceilings(facts(True), 8).clairvoyant_bytes() == 0


def test_more_memory_is_never_worse_and_the_future_helps():
    trace = facts(False, seed=1)
    rates = [ceilings(trace, slots).policy_rate(SLOW, FAST) for slots in (4, 8, 12, 16)]
    bytes_read = [ceilings(trace, slots).clairvoyant_bytes() for slots in (4, 8, 12, 16)]
    assert rates == sorted(rates) and rates[0] > ceilings(trace, 4).naive_rate(SLOW, FAST)
    assert bytes_read == sorted(bytes_read, reverse=True) and bytes_read[-1] == 0
    assert all(SLOW / needed >= rate for rate, needed in zip(rates[:-1], bytes_read[:-1], strict=True))
