"""One condition (system, form, model, prompts, batch) to tokens per second, joules per token and where both go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from elmoe.errors import BudgetError, HardwareError
from elmoe.hw.cost import Cost
from elmoe.hw.machine import Machine
from elmoe.models.sizes import ModelSizes
from elmoe.policy.budget import FastTierSizes, SlotPlan, plan_slots
from elmoe.policy.residency import ResidencyParameters
from elmoe.schema.drafters import Drafters
from elmoe.sim.workload import Acceptance, DraftKind, Plan, RoutingReplay, TierPlan, Workload
from elmoe.systems.forms import (
    COPY,
    DraftShape,
    FormName,
    draft_cost,
    draft_model_bytes,
    rival_shapes,
    target_cost,
)  # fmt: skip
from elmoe.systems.operations import resample
from elmoe.units import format_bytes

DRAFT_LENGTHS = (1, 2, 4, 8)
"""Each speculative form takes the best of these per condition, rivals too."""
DRAFTS: dict[FormName, DraftKind] = {
    "ar": "none", "eagle": "external", "small_lm": "external", "quant": "natural", "elastic": "resident",
    "bit_axis": "natural",
}  # fmt: skip


@dataclass(frozen=True)
class Priced:
    """A workload priced on a machine; costs are (steps,)."""

    workload: Workload
    draft: Cost | None
    target: Cost
    shape: DraftShape

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return float(self.whole.latency.sum())

    @property
    def whole(self) -> Cost:
        """Drafts, then the target."""
        return self.target if self.draft is None else self.draft.then(self.target)

    @property
    def tokens(self) -> int:
        """Committed."""
        return int(self.workload.committed.sum())


class Simulation:
    """A model and its routing facts on machines; workloads are kept, since many machines share them. ``workloads``: those of
    another simulation of the same replay, to share."""

    def __init__(
        self, model: ModelSizes, replay: RoutingReplay, drafters: Drafters, context: int = 1024, steps: int = 24,
        workloads: dict[Any, Workload] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.replay, self.drafters = model, replay, drafters
        self.context, self.steps = context, steps
        self._workloads: dict[Any, Workload] = {} if workloads is None else workloads
        self.sampled = replay.facts.ranked.shape[2]
        facts = replay.facts
        spec = model.spec
        if (facts.experts, facts.top_k) != (spec.experts, spec.top_k):
            raise HardwareError(
                f"the trace routes to {facts.top_k} of {facts.experts} experts, '{model.name}' to {spec.top_k} of "
                f"{spec.experts}",
                "synthesise a trace for this model: `elmoe trace synthesise`",
            )

    def price(
        self, machine: Machine, form: FormName, batch: int, acceptance: Acceptance | None = None,
        lengths: tuple[int, ...] = DRAFT_LENGTHS,
    ) -> Priced:  # fmt: skip
        """The best of the draft lengths by tokens per second.

        :raises HardwareError: the model does not fit. :raises BudgetError: the fast memory is too small to draft from.
        """
        self._check_fits(machine, form, batch)
        if form == "ar":
            return self._priced(machine, form, batch, 0, None)
        candidates = [self._priced(machine, form, batch, length, acceptance) for length in lengths]
        for shape, odds in rival_shapes(form, self.drafters):
            candidates.append(self._priced(machine, form, batch, shape.levels, odds, shape))
        return max(candidates, key=lambda priced: priced.tokens / priced.seconds)

    def _priced(
        self, machine: Machine, form: FormName, batch: int, length: int, acceptance: Acceptance | None,
        shape: DraftShape | None = None,
    ) -> Priced:  # fmt: skip
        tier, shape = self._tier(machine, form, batch), shape or DraftShape(length)
        plan = Plan(batch, DRAFTS[form], length, self.context, machine.token_rows, self.steps, tier, shape.siblings)
        key = (plan, acceptance)
        if key not in self._workloads:
            self._workloads[key] = self.replay.run(plan, acceptance)
        workload = self._workloads[key]
        passes = workload.target
        if form == "quant":  # the fast memory holds experts of the copy, of no use to the target
            passes = replace(passes, msb_hits=np.zeros_like(passes.active), lsb_hits=np.zeros_like(passes.active))
        target = target_cost(machine, self.model, passes)
        if form == "ar":
            return Priced(workload, None, target, shape)
        if workload.draft is not None:
            draft = draft_cost(form, machine, self.model, self.drafters, workload.draft, workload.draft.tokens)
            draft = _per_step(draft, workload.steps)
        else:
            draft = self._other_network(machine, form, batch, shape, workload.steps)
        return Priced(workload, draft, target, shape)

    def _other_network(self, machine: Machine, form: FormName, batch: int, shape: DraftShape, steps: int) -> Cost:
        """(steps,) drafts by a network of their own: one token per sequence, then ``width`` tokens a level."""

        def level(width: int) -> Cost:
            tokens = np.full(steps, float(batch * width))
            return draft_cost(form, machine, self.model, self.drafters, None, tokens, batch, self.context)

        if shape.width == 1:
            return level(1).times(shape.levels)
        return level(1).then(level(shape.width).times(shape.levels - 1))

    def _tier(self, machine: Machine, form: FormName, batch: int) -> TierPlan | None:
        """What of the fast memory is left for experts, and how it is managed."""
        hardware, model = machine.hardware, self.model
        if hardware.fast is None or not hardware.features.expert_cache or not model.moe_layers:
            return None
        sizes = self._sizes(machine, form, batch)
        slices = hardware.features.bit_slices or form == "quant"
        capacity = int(hardware.fast.capacity.value)
        if form != "elastic" and sizes.fixed <= capacity < sizes.minimum:
            return None  # KV first: what is left would not make a draft, and is left unused
        slots = plan_slots(capacity, sizes, "msb_first" if slices else "whole_experts")
        picked = np.linspace(0, len(model.moe_layers) - 1, self.sampled).round().astype(int)
        sampled = SlotPlan(tuple(slots.msb[i] for i in picked), tuple(slots.lsb[i] for i in picked), slots.bytes)
        policy = (
            ResidencyParameters("static")
            if not hardware.features.refill
            else (ResidencyParameters() if slices else ResidencyParameters("lru"))
        )
        msb, lsb = (tuple(resample(one, self.sampled).tolist()) for one in (sizes.msb, sizes.lsb))
        return TierPlan(sampled, policy, msb, lsb)

    def _sizes(self, machine: Machine, form: FormName, batch: int) -> FastTierSizes:
        model, layers, spec = self.model, self.model.moe_layers, self.model.spec
        kv = batch * self.context * spec.kv_bytes_per_position
        dense = model.dense_bytes + draft_model_bytes(form, model, self.drafters, batch * self.context)
        if not machine.hardware.features.fast_dense:
            dense = kv = 0
        if form == "quant":
            layers = tuple(
                msgspec.structs.replace(one, expert_precision=one.expert_precision.at_most(COPY)) for one in layers
            )
        msb, lsb = tuple(int(layer.msb_bytes) for layer in layers), tuple(int(layer.lsb_bytes) for layer in layers)
        return FastTierSizes(int(dense), kv, 0, msb, lsb, spec.experts, spec.top_k)

    def _check_fits(self, machine: Machine, form: FormName, batch: int) -> None:
        hardware, model = machine.hardware, self.model
        kv = batch * self.context * model.spec.kv_bytes_per_position
        needed = model.total_bytes + kv + draft_model_bytes(form, model, self.drafters, batch * self.context)
        if form == "quant":
            needed += COPY.bytes_of(model.parameters)
        room = hardware.main.capacity.value + (
            hardware.fast.capacity.value if hardware.features.fast_dense and hardware.fast else 0
        )
        if needed > room:
            raise HardwareError(
                f"'{model.name}' needs {format_bytes(needed)} at batch {batch}, '{hardware.name}' has {format_bytes(room)}",
                "choose a smaller model, or raise main.capacity",
            )
        if hardware.fast is not None and hardware.features.fast_dense and not hardware.features.expert_cache:
            fixed, capacity = self._sizes(machine, form, batch).fixed, int(hardware.fast.capacity.value)
            if fixed > capacity:
                raise BudgetError(
                    f"dense parts and KV cache of '{model.name}' need {format_bytes(fixed)} at batch {batch}, the fast "
                    f"memory of '{hardware.name}' has {format_bytes(capacity)}",
                    "use smaller batches, or raise fast.capacity",
                )


def _per_step(cost: Cost, steps: int) -> Cost:
    """(steps x drafts,) to (steps,)."""

    def folded(values: Any) -> Any:
        return values.reshape(steps, -1).sum(axis=1)

    return Cost(
        folded(cost.latency), {k: folded(v) for k, v in cost.energy.items()}, {k: folded(v) for k, v in cost.busy.items()},
        {k: folded(v) for k, v in cost.traffic.items()},
    )  # fmt: skip


__all__ = ["BudgetError", "DRAFT_LENGTHS", "Priced", "Simulation"]
