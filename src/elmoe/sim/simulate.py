"""One condition (system, form, model, prompts, batch) to tokens per second, joules per token and where both go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from elmoe.errors import BudgetError, HardwareError
from elmoe.hw.cost import Array, Cost
from elmoe.hw.machine import Machine
from elmoe.models.sizes import ModelSizes
from elmoe.policy.budget import FastTierSizes, SlotPlan, TierShape, check_budget, plan_slots
from elmoe.policy.planner import splits
from elmoe.policy.residency import ResidencyParameters
from elmoe.schema.drafters import Drafters
from elmoe.sim.modelling import STAGING_EXPERTS, TODAY, Draft, Modelling, without_windows
from elmoe.sim.planned import PlannedRun
from elmoe.sim.splitting import ExpectedPasses, interleaved
from elmoe.sim.trees import expected_depth
from elmoe.sim.workload import Acceptance, DraftKind, Plan, RoutingReplay, TierPlan, Workload
from elmoe.systems import elmoe3d
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
from elmoe.systems.passes import Passes
from elmoe.units import format_bytes

DRAFT_LENGTHS = TODAY.lengths
"""Each speculative form takes the best of these per condition, rivals too."""
DRAFTS: dict[FormName, DraftKind] = {
    "ar": "none", "eagle": "external", "small_lm": "external", "quant": "natural", "elastic": "resident",
    "bit_axis": "natural", "planned": "resident",
}  # fmt: skip


@dataclass(frozen=True)
class Priced:
    """A workload priced on a machine; costs are (steps,). ``shape``: of the drafts, for people."""

    workload: Workload
    draft: Cost | None
    target: Cost
    shape: str | None = None

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
    """A model and its routing facts on machines. The replay keeps workloads and prices, which many machines and modellings
    share."""

    def __init__(
        self, model: ModelSizes, replay: RoutingReplay, drafters: Drafters, context: int = 1024, steps: int = 24,
        modelling: Modelling = TODAY,
    ) -> None:  # fmt: skip
        self._full = model
        self.model = model if modelling.windows else without_windows(model)
        self.replay, self.drafters, self.modelling = replay, drafters, modelling
        self.context, self.steps = context, steps
        self.sampled = replay.facts.ranked.shape[2]
        self.picked = np.linspace(0, len(model.moe_layers) - 1, self.sampled).round().astype(int)
        """The MoE layers that the facts' layers stand for."""
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
        lengths: tuple[int, ...] | None = None,
    ) -> Priced:  # fmt: skip
        """The best of the draft lengths (those of the modelling, and its trees, unless given) by tokens per second.

        :raises HardwareError: the model does not fit. :raises BudgetError: the fast memory is too small to draft from.
        """
        model = self._full
        relevant = self.modelling.relevant(model, machine.hardware, form)
        key = (
            model.spec, tuple(sorted(model.formats.items())), relevant, machine.hardware, form, batch, acceptance, lengths,
            self.drafters, self.context, self.steps,
        )  # fmt: skip
        if key not in self.replay.prices:
            self.replay.prices[key] = self._best(machine, form, batch, acceptance, lengths)
        found: Priced = self.replay.prices[key]
        return found

    def _best(
        self, machine: Machine, form: FormName, batch: int, acceptance: Acceptance | None, lengths: tuple[int, ...] | None
    ) -> Priced:
        self.replay.check_batch(batch)
        self._check_fits(machine, form, batch)
        if form == "ar":
            return self._priced(machine, form, batch, Draft(), None)
        if form == "planned":
            assert acceptance is not None
            return Priced(*PlannedRun(self, machine, batch, acceptance).serve())
        drafts = [(Draft(length), acceptance) for length in (self.modelling.lengths if lengths is None else lengths)]
        if lengths is None and form == "elastic":
            drafts += [(Draft(tree.depth, tree), acceptance) for tree in self.modelling.trees]
        drafts += [(Draft(shape.levels, other=shape), odds) for shape, odds in rival_shapes(form, self.drafters)]
        longest = self.replay.longest_draft(batch)  # a short trace has no step of the longest drafts
        drafts = [one for one in drafts if one[0].length <= longest] or drafts
        candidates = [self._priced(machine, form, batch, draft, odds) for draft, odds in drafts]
        return max(candidates, key=lambda priced: priced.tokens / priced.seconds)

    def _priced(self, machine: Machine, form: FormName, batch: int, draft: Draft, acceptance: Acceptance | None) -> Priced:
        tier = self._tier(machine, form, batch, draft, acceptance)
        plan = self.plan(machine, form, batch, draft, tier)
        workload = self.replay.kept(plan, acceptance)
        passes = workload.target
        if form == "quant":  # the fast memory holds experts of the copy, of no use to the target
            passes = replace(passes, msb_hits=np.zeros_like(passes.active), lsb_hits=np.zeros_like(passes.active))
        room = 0.0 if tier is None else tier.room
        costs = self.costs(machine, form, passes, workload.draft, batch, draft, room)
        return Priced(workload, *costs, draft.words)

    def plan(self, machine: Machine, form: FormName, batch: int, draft: Draft, tier: TierPlan | None) -> Plan:
        """What to replay."""
        kind = DRAFTS[form]
        return Plan(
            batch, kind, draft.length, self.context, machine.token_rows, self.steps, tier, draft.tree, draft.shape.siblings
        )  # fmt: skip

    def costs(
        self, machine: Machine, form: FormName, target: Passes, drafting: Passes | None, batch: int, draft: Draft,
        room: float | Array,
    ) -> tuple[Cost | None, Cost]:  # fmt: skip
        """(steps,) costs of drafting and of the target passes, one of a step.

        :param drafting: passes of the target's experts that draft, equally many of every step. :param room: bytes of fast
            memory beside the residents.
        """
        rows = self.modelling.embedding_rows
        if form == "ar" or not draft.length:
            return None, target_cost(machine, self.model, target, rows)
        steps = len(target.tokens)
        if drafting is None:
            cost = self._other_network(machine, form, batch, draft.shape, steps)
            return cost, target_cost(machine, self.model, target, rows)
        each = draft_cost(form, machine, self.model, self.drafters, drafting, drafting.tokens, batch, self.context, rows)
        cost = _per_step(each, steps)
        if not self.reads_ahead(machine, form):
            return cost, target_cost(machine, self.model, target, rows)
        behind_first = each.latency.reshape(steps, -1)[:, 1:].sum(axis=1)
        return self._ahead(machine, target, cost, behind_first, room)

    def _other_network(self, machine: Machine, form: FormName, batch: int, shape: DraftShape, steps: int) -> Cost:
        """(steps,) drafts by a network of their own: one token per sequence, then ``width`` tokens a level."""

        def level(width: int) -> Cost:
            tokens = np.full(steps, float(batch * width))
            rows = self.modelling.embedding_rows
            return draft_cost(form, machine, self.model, self.drafters, None, tokens, batch, self.context, rows)

        if shape.width == 1:
            return level(1).times(shape.levels)
        return level(1).then(level(shape.width).times(shape.levels - 1))

    def _ahead(
        self, machine: Machine, target: Passes, drafting: Cost, seconds: Array, room: float | Array
    ) -> tuple[Cost, Cost]:
        """Costs where slices are read ahead."""
        layers, rows = self.model.moe_layers, self.modelling.embedding_rows
        msb, lsb = (
            resample([getattr(layer, kind) for layer in layers], self.sampled) for kind in ("msb_bytes", "lsb_bytes")
        )
        missing = (target.msb_foreseen @ msb + target.lsb_foreseen @ lsb) * (len(layers) / self.sampled)
        ahead, share = elmoe3d.read_ahead(machine, missing, seconds, room)
        all_foreseen = elmoe3d.with_ahead(target, np.maximum(share, elmoe3d.FORESIGHT))
        cost, floor = (
            target_cost(machine, self.model, passes, rows) for passes in (elmoe3d.with_ahead(target, share), all_foreseen)
        )
        return drafting.beside(ahead), elmoe3d.streamed(cost, floor)

    def reads_ahead(self, machine: Machine, form: FormName) -> bool:
        """Whether drafts let slices be read before verification needs them."""
        features = machine.hardware.features
        return (
            self.modelling.read_ahead
            and form in ("elastic", "planned")
            and features.expert_cache
            and features.parallel_tiers
        )

    def _tier(
        self, machine: Machine, form: FormName, batch: int, draft: Draft, acceptance: Acceptance | None
    ) -> TierPlan | None:
        """What of the fast memory is left for experts, and how it is managed."""
        hardware, model = machine.hardware, self.model
        if hardware.fast is None or not hardware.features.expert_cache or not model.moe_layers:
            return None
        sizes = self.sizes(machine, form, batch, 1 + draft.length)
        capacity = int(hardware.fast.capacity.value)
        if form != "elastic" and sizes.fixed <= capacity < sizes.minimum:
            return None  # KV first: what is left would not make a draft, and is left unused
        sliced = hardware.features.bit_slices
        if self.modelling.split == "by_rate" and sliced and form != "quant":
            slots = self._slots_by_rate(machine, form, batch, draft, acceptance, sizes, capacity)
        else:
            slots = plan_slots(capacity, sizes, "msb_first" if sliced or form == "quant" else "whole_experts")
        return self.tier_of(machine, form, slots, sizes, capacity)

    def tier_of(self, machine: Machine, form: FormName, slots: SlotPlan, sizes: FastTierSizes, capacity: int) -> TierPlan:
        """The fast memory with these slots, its policy, and its room."""
        features = machine.hardware.features
        policy = (
            ResidencyParameters("static")
            if not features.refill
            else (ResidencyParameters() if features.bit_slices or form == "quant" else ResidencyParameters("lru"))
        )
        msb, lsb = (tuple(resample(one, self.sampled).tolist()) for one in (sizes.msb, sizes.lsb))
        room = float(capacity - slots.bytes + sizes.staging) if self.reads_ahead(machine, form) else 0.0
        return TierPlan(self.sampled_slots(slots), policy, msb, lsb, room)

    def sampled_slots(self, slots: SlotPlan) -> SlotPlan:
        """The slots of the facts' layers."""
        picked = self.picked
        return SlotPlan(tuple(slots.msb[i] for i in picked), tuple(slots.lsb[i] for i in picked), slots.bytes)

    def _slots_by_rate(
        self, machine: Machine, form: FormName, batch: int, draft: Draft, acceptance: Acceptance | None,
        sizes: FastTierSizes, capacity: int,
    ) -> SlotPlan:  # fmt: skip
        """The slots of the highest modelled rate (see ``sim/splitting.py``)."""
        check_budget(capacity, sizes, sizes.minimum)
        candidates = [
            replace(one, bytes=one.bytes + sizes.fixed) for one in splits(TierShape.of(sizes), capacity - sizes.fixed)
        ]
        expected = ExpectedPasses(
            self.replay.popularity(batch), candidates, self.picked, batch, self.context, machine.token_rows
        )
        committed, tokens, drafted, passes = np.full(len(candidates), float(batch)), batch, 0, None
        if acceptance is not None and draft.length:
            odds = [tuple(acceptance(share, depth) for depth in range(1, draft.length + 1)) for share in expected.shares]
            tree = draft.grown(odds[0])
            committed += batch * np.array([expected_depth(draft.grown(each), each) for each in odds])
            tokens += batch * tree.tokens
            if DRAFTS[form] == "resident":
                drafted = batch * sum(tree.expanded)
                passes = interleaved([expected.draft(batch * count) for count in tree.expanded])
            elif DRAFTS[form] == "natural":
                passes = interleaved([expected.target(batch, 0)] * draft.length)
        room = np.array([capacity - one.bytes + sizes.staging for one in candidates], np.float64)
        drafting, target = self.costs(machine, form, expected.target(tokens, drafted), passes, batch, draft, room)
        seconds = target.latency if drafting is None else drafting.latency + target.latency
        return candidates[int((committed / seconds).argmax())]

    def sizes(self, machine: Machine, form: FormName, batch: int, computed: int) -> FastTierSizes:
        """What competes for the fast memory. ``computed``: tokens of a sequence in a target pass."""
        model, layers, spec = self.model, self.model.moe_layers, self.model.spec
        kv = batch * model.cache_bytes(self.context, computed)
        dense = model.dense_bytes + draft_model_bytes(form, model, self.drafters, batch * self.context)
        if self.modelling.embedding_rows and not spec.tied_embeddings:
            dense -= model.embedding_bytes
        if not machine.hardware.features.fast_dense:
            dense = kv = 0
        if form == "quant":
            layers = tuple(
                msgspec.structs.replace(one, expert_precision=one.expert_precision.at_most(COPY)) for one in layers
            )
        msb, lsb = tuple(int(layer.msb_bytes) for layer in layers), tuple(int(layer.lsb_bytes) for layer in layers)
        staging = 0
        if self.reads_ahead(machine, form):
            staging = STAGING_EXPERTS * max(one + other for one, other in zip(msb, lsb, strict=True))
        return FastTierSizes(int(dense), kv, staging, msb, lsb, spec.experts, spec.top_k)

    def _check_fits(self, machine: Machine, form: FormName, batch: int) -> None:
        hardware, model = machine.hardware, self.model
        kv = batch * model.cache_bytes(self.context)
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
            fixed, capacity = self.sizes(machine, form, batch, 1).fixed, int(hardware.fast.capacity.value)
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
