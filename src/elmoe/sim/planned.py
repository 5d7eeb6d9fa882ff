"""A run in which the engine's planner decides, step by step and without hindsight, on simulated seconds.

The planner is the engine's own (``policy.planner.Planner``) and learns from what the engine would tell it: seconds of
passes, waits and reads, judged drafts, verified routing. It has no clock, so the machine's prices are its seconds. As in the
engine it stays warm between texts: it has judged drafts before, as an engine that has run for long, serves later positions
of the same sequences, and then what the other forms serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from elmoe.hw.cost import Cost
from elmoe.hw.machine import Machine
from elmoe.policy.budget import FastTierSizes, SlotPlan, TierShape, check_budget
from elmoe.policy.planner import DRAFT_LENGTHS, Planner
from elmoe.policy.residency import ResidencyParameters
from elmoe.sim.modelling import Draft
from elmoe.sim.workload import Acceptance, Plan, Serving, TierPlan, Workload
from elmoe.systems.forms import target_cost
from elmoe.systems.operations import resample

if TYPE_CHECKING:
    from elmoe.sim.simulate import Simulation

WARM_STEPS = 24
"""Steps that the planner has served before those that count."""
JUDGED = 128
"""Draft tokens that it has judged before. Trials bring them in an engine that runs for long: it tries two tokens of each
sequence after 64 steps without drafts, then after 128, up to every 1,024 (``RETRY`` and ``LONGEST_WAIT`` of the planner)."""


@dataclass
class _Step:
    """What a step took."""

    draft: Cost | None
    target: Cost
    drafted: int


class PlannedRun:
    """``serve`` gives (workload, draft cost, target cost) of a run; one object serves one condition.

    The planner sees as many layers as the facts have, each with the bytes of all those that it stands for.
    """

    def __init__(self, simulation: Simulation, machine: Machine, batch: int, acceptance: Acceptance) -> None:
        self._simulation, self._machine, self._batch, self._acceptance = simulation, machine, batch, acceptance
        assert machine.hardware.fast is not None
        self._capacity = int(machine.hardware.fast.capacity.value)
        sizes = simulation.sizes(machine, "planned", batch, 1)
        check_budget(self._capacity, sizes, sizes.minimum)
        scale = len(sizes.msb) / simulation.sampled
        msb, lsb = (
            tuple(round(each * scale) for each in resample(one, simulation.sampled)) for one in (sizes.msb, sizes.lsb)
        )
        self._sizes: FastTierSizes = replace(sizes, msb=msb, lsb=lsb)
        self._bytes = np.array([msb, lsb], np.float64)
        features = machine.hardware.features
        self._parameters = ResidencyParameters() if features.refill else ResidencyParameters("static")
        by_rate = simulation.modelling.split == "by_rate"
        self._planner = Planner(TierShape.of(self._sizes), "elastic", "auto" if by_rate else "msb_first")
        self._planner.observe_planning(0.0)

    def serve(self) -> tuple[Workload, Cost | None, Cost]:
        """Warm the planner up, then serve what counts."""
        facts = self._simulation.replay.facts
        first = facts.prompts[: self._batch]
        behind = int((facts.lengths[: self._batch] - first).min()) // 2
        self._judge()
        self._run(WARM_STEPS, behind)
        return self._run(self._simulation.steps, 0)

    def _judge(self) -> None:
        """Let the planner know how often drafts were accepted, by residents that cover what popular experts cover."""
        planner, sizes, replay = self._planner, self._sizes, self._simulation.replay
        slots = planner.plan(self._batch, sizes, self._capacity, replay.prompt_counts(self._batch)).slots
        assert slots is not None
        chance = self._acceptance(float(np.mean(slots.msb)) / sizes.experts, 1)
        for luck in replay.luck.ravel()[-JUDGED:].tolist():
            planner.observe_judged(chance, luck < chance)

    def _run(self, most: int, start: int) -> tuple[Workload, Cost | None, Cost]:
        planner, sizes = self._planner, self._sizes
        planner.begin_run()
        none = np.zeros((self._simulation.sampled, sizes.experts))
        slots = planner.plan(self._batch, sizes, self._capacity, none).slots
        assert slots is not None
        msb, lsb = (tuple((row / len(sizes.msb)).tolist()) for row in self._bytes)
        tier = TierPlan(slots, self._parameters, msb, lsb)
        plan = Plan(
            self._batch, "resident", max(DRAFT_LENGTHS), self._simulation.context, self._machine.token_rows, most, tier
        )
        serving = Serving(self._simulation.replay, plan, self._acceptance, start)
        steps: list[_Step] = []
        while len(steps) < most:
            step = self._step(serving)
            if step is None:
                break
            steps.append(step)
        workload = serving.workload()
        drafted = [step.drafted for step in steps]
        workload = replace(
            workload, draft=None, draft_passes=round(float(np.mean(drafted))), drafting=float(np.mean(np.array(drafted) > 0))
        )
        drafts = [step.draft for step in steps]
        return workload, _joined(drafts) if any(drafts) else None, _joined([step.target for step in steps])

    def _step(self, serving: Serving) -> _Step | None:
        """One step; None where the facts end."""
        planner, batch, tier = self._planner, self._batch, serving.tier
        assert tier is not None
        plan = planner.plan(batch, self._sizes, self._capacity, tier.counts)
        slots = plan.slots
        assert slots is not None
        tier.resize(slots)
        limit = plan.draft_length if tier.resident.msb.any(axis=1).all() else 0
        if not serving.has_room(limit):
            return None
        serving.begin(limit)
        confidences = [self._acceptance(serving.share, depth) for depth in range(1, limit + 1)]
        drafted = 0
        while drafted < limit:
            serving.draft(drafted)
            drafted += 1
            if drafted < limit and not any(planner.proceed([confidences[:drafted]] * batch, plan)):
                break
        accepted, kept, found = serving.verify(drafted)
        step = self._priced(serving, drafted, slots)
        self._learn(serving, step, confidences, accepted)
        assert found is not None
        committed = dict(enumerate((accepted + 1).tolist()))
        planner.observe_routing(committed, kept.transpose(1, 0, 2).astype(np.int32), found)
        return step

    def _priced(self, serving: Serving, drafted: int, slots: SlotPlan) -> _Step:
        """Costs of the step that was served last."""
        rows, sizes = serving.rows, self._sizes
        target = rows.passes(rows.targets[-1:])
        drafts = rows.passes(rows.drafts[len(rows.drafts) - drafted :]) if drafted else None
        room = float(self._capacity - sizes.dense - sizes.kv) - float((self._bytes * (slots.msb, slots.lsb)).sum())
        draft, cost = self._simulation.costs(self._machine, "planned", target, drafts, self._batch, Draft(drafted), room)
        return _Step(draft, cost, drafted)

    def _learn(self, serving: Serving, step: _Step, confidences: Sequence[float], accepted: NDArray[np.int64]) -> None:
        """Tell the planner what the engine would tell it."""
        planner, batch, drafted = self._planner, self._batch, step.drafted
        target = serving.rows.passes(serving.rows.targets[-1:])
        there = replace(target, msb_hits=target.active, lsb_hits=target.active)
        simulation = self._simulation
        computing = target_cost(self._machine, simulation.model, there, simulation.modelling.embedding_rows)
        seconds = float(step.target.latency[0])
        missed = int(((target.active - (target.msb_hits, target.lsb_hits))[:, 0] * self._bytes).sum())
        drafting = 0.0
        reading = float(step.target.busy["main"][0])
        if step.draft is not None:
            drafting = float(step.draft.latency[0])
            reading += float(step.draft.busy.get("main", np.zeros(1))[0])
            for _ in range(drafted):
                planner.observe_draft(batch, drafting / drafted)
            for count in accepted.tolist():
                for depth in range(min(count + 1, drafted)):
                    planner.observe_judged(confidences[depth], depth < count)
        planner.observe_target(batch * (1 + drafted), seconds, max(0.0, seconds - float(computing.latency[0])))
        if missed * len(self._sizes.msb) >= planner.shape.one_expert and missed:
            planner.costs.observe_reads(missed, reading)
        planner.observe_step(batch, batch * drafted, missed, drafting + seconds)


def _joined(costs: Sequence[Cost | None]) -> Cost:
    """(steps,) of single steps; None costs nothing."""
    known = [cost for cost in costs if cost is not None]

    def parts(name: str) -> dict[str, Any]:
        keys = dict.fromkeys(key for cost in known for key in getattr(cost, name))
        return {
            key: np.array([0.0 if cost is None else float(getattr(cost, name).get(key, [0.0])[0]) for cost in costs])
            for key in keys
        }

    latency = np.array([0.0 if cost is None else float(cost.latency[0]) for cost in costs])
    return Cost(latency, parts("energy"), parts("busy"), parts("traffic"))
