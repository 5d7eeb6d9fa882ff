"""What an expert cache of whole experts would have hit on a trace, policy by policy, with Belady's optimum as the bound."""

from __future__ import annotations

from typing import get_args

import numpy as np
from numpy.typing import NDArray

from elmoe.policy.budget import SlotPlan
from elmoe.policy.residency import Policy, ResidencyParameters
from elmoe.trace.format import Trace
from elmoe.trace.residents import ReplayedResidents, experts_used
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
    uses = np.zeros((len(chosen), chosen.shape[1], experts), bool)
    np.put_along_axis(uses, chosen.astype(np.int64), True, axis=2)
    misses = sum(belady_misses(uses[:, layer], slots) for layer in range(uses.shape[1]))
    rates["belady"] = 1 - misses / int(uses.sum())
    return rates


def policy_hit_rate(chosen: NDArray, experts: int, slots: int, parameters: ResidencyParameters) -> float:
    """Hit rate of one policy on (tokens, layers, k) uses."""
    tokens, layers, _ = chosen.shape
    residents = ReplayedResidents(layers, experts, SlotPlan((slots,) * layers, (slots,) * layers, 0), parameters)
    hits = 0
    for index in range(tokens):
        token = chosen[index : index + 1]
        used = experts_used(token, experts)
        hits += int((used & residents.resident.msb).sum())
        residents.end_pass(token, token, used)
    return hits / chosen.size


def belady_misses(uses: NDArray[np.bool_], slots: int, warm: bool = False) -> int:
    """Fewest misses of any cache of ``slots`` experts.

    :param uses: (steps, experts), the experts that each step uses. :param warm: start with the best experts instead of none.
    """
    steps, experts = uses.shape
    next_use = np.full((steps + 1, experts), UNUSED)
    for step in range(steps - 1, -1, -1):
        next_use[step] = np.where(uses[step], step, next_use[step + 1])

    def soonest(cached: NDArray[np.bool_], step: int) -> NDArray[np.bool_]:
        order = np.argsort(np.where(cached, next_use[step], UNUSED), kind="stable")[:slots]
        kept = np.zeros(experts, bool)
        kept[order] = True
        return kept & cached

    cached = soonest(np.full(experts, warm), 0)
    misses = 0
    for step in range(steps):
        misses += int((uses[step] & ~cached).sum())
        cached = soonest(cached | uses[step], step + 1)
    return misses
