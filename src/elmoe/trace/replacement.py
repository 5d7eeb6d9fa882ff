"""What an expert cache of whole experts would have hit on a trace, policy by policy, with Belady's optimum as the bound."""

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import Policy, Residency, ResidencyParameters, ResidentSet, refill
from elmoe.trace.format import Trace
from elmoe.trace.summary import committed_experts

UNUSED = np.iinfo(np.int64).max


def hit_rates(trace: Trace, slots: int) -> dict[str, float]:
    """Share of expert uses found among ``slots`` experts per layer, one token at a time over all sequences in turn.

    The policies are the engine's own. ``belady`` keeps the experts used again soonest, newcomers included: no policy that
    knows the past only can do better.
    """
    return hit_rates_of(committed_experts(trace), trace.header.model.experts, slots)


def hit_rates_of(chosen: NDArray, experts: int, slots: int) -> dict[str, float]:
    """See :func:`hit_rates`; ``chosen``: (tokens, layers, k) uses."""
    rates = {policy: policy_hit_rate(chosen, experts, slots, ResidencyParameters(policy)) for policy in get_args(Policy)}
    rates["belady"] = float(np.mean([_belady_hits(chosen[:, layer], experts, slots) for layer in range(chosen.shape[1])]))
    return rates


def policy_hit_rate(chosen: NDArray, experts: int, slots: int, parameters: ResidencyParameters) -> float:
    """Hit rate of one policy on (tokens, layers, k) uses."""
    tokens, layers, _ = chosen.shape
    plan = SlotPlan((slots,) * layers, (slots,) * layers, 0)
    residency, resident = Residency(layers, experts, parameters), ResidentSet.empty(layers, experts)
    rows = np.arange(layers)[:, None]
    hits = 0
    for token in range(tokens):
        used = chosen[token].astype(np.int32)
        hits += int(resident.msb[rows, used].sum())
        streamed = np.zeros((layers, experts), bool)
        streamed[rows, used] = True
        resident = refill(resident, residency.scores(used[:, None]), streamed, plan, parameters)
        residency.learn(used[:, None])
    return hits / chosen.size


def _belady_hits(chosen: NDArray, experts: int, slots: int) -> float:
    """One layer's (tokens, k) uses."""
    tokens = len(chosen)
    next_use = np.full((tokens + 1, experts), UNUSED)
    for token in range(tokens - 1, -1, -1):
        next_use[token] = next_use[token + 1]
        next_use[token, chosen[token]] = token
    cached = np.zeros(experts, bool)
    hits = 0
    for token in range(tokens):
        hits += int(cached[chosen[token]].sum())
        cached[chosen[token]] = True
        if cached.sum() > slots:
            soonest = np.argsort(np.where(cached, next_use[token + 1], UNUSED), kind="stable")[:slots]
            kept = np.zeros(experts, bool)
            kept[soonest] = True
            cached &= kept
    return hits / chosen.size
