"""The slots that an engine kept in every step, for a replay of its trace."""

from __future__ import annotations

from elmoe.engine.engine import Engine
from elmoe.policy.budget import SlotPlan
from elmoe.policy.planner import Plan


def slots_by_step(engine: Engine) -> dict[int, SlotPlan]:
    """Slots by the number of the step, filled as the engine runs from here on.

    They change where a planner splits by rate, and where sequences end: an enforced budget gives the bytes of their keys to
    slices.
    """
    slots: dict[int, SlotPlan] = {}
    planned = engine._manager.plan

    def plan(sequences: int) -> Plan:
        found = planned(sequences)
        if found.slots is not None:
            slots[engine._passes.step] = found.slots
        return found

    engine._manager.plan = plan  # type: ignore[method-assign]
    return slots
