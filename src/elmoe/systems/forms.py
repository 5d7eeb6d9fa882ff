"""Plain and speculative forms of serving: what drafts, how likely it is accepted, and what a draft pass costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from elmoe.hw.cost import Array, Cost, in_order
from elmoe.hw.machine import Machine
from elmoe.models.sizes import ModelSizes, Precision
from elmoe.schema.drafters import Drafters
from elmoe.systems import elmoe3d, near_memory, xpu
from elmoe.systems.operations import Operation, dense_model, operations
from elmoe.systems.passes import Passes
from elmoe.trace.acceptance import AcceptanceTable

FormName = Literal["ar", "eagle", "small_lm", "quant", "elastic", "bit_axis", "planned"]
"""``planned`` is ``elastic`` with the engine's planner, which decides as it runs whether and how long to draft. ``bit_axis``
is an ablation of ``elastic``: MSB slices alone, but of all experts, those not resident read as they come."""
FORMS: tuple[FormName, ...] = ("ar", "eagle", "small_lm", "quant", "elastic")
FORM_WORDS: dict[str, str] = {
    "ar": "nothing, plain decoding", "eagle": "a head of one layer", "small_lm": "a separate small model",
    "quant": "a 4-bit copy", "elastic": "4-bit slices of the experts in the fast memory",
    "bit_axis": "4-bit slices of all experts", "planned": "as elastic, when the engine's planner decides so",
}  # fmt: skip
"""What drafts, by form."""
COPY = Precision((4.5,), (1.0,))
"""How a 4-bit copy keeps its weights, with their scales."""


def explain_forms(names: Iterable[str]) -> str:
    """What drafts in forms of these names, for people."""
    return "; ".join(f"{name}: {FORM_WORDS[name]}" for name in dict.fromkeys(names) if name in FORM_WORDS)


def lower(machine: Machine, operation: Operation) -> Cost:
    """One execution on the machine's system."""
    if machine.hardware.near is not None:
        return near_memory.lower(machine, operation)
    if machine.hardware.fast is not None:
        return elmoe3d.lower(machine, operation)
    return xpu.lower(machine, operation)


def cost_of(machine: Machine, run: list[Operation]) -> Cost:
    """(passes,) cost of operations one after the other, each its number of times."""
    costs = []
    for operation in run:
        cost = lower(machine, operation).times(operation.repeat)
        costs.append(cost.sum(axis=1) if cost.latency.ndim == 2 else cost)
    return in_order(costs)


def target_cost(machine: Machine, model: ModelSizes, passes: Passes, embedding_rows: bool = False) -> Cost:
    """(passes,) cost of target passes and of the slices they leave in the fast memory."""
    cost = cost_of(machine, operations(model, passes, machine, embedding_rows=embedding_rows))
    if machine.hardware.features.expert_cache:
        scale = len(model.moe_layers) / passes.active.shape[1]
        cost = cost.then(elmoe3d.refill(machine, passes.captured * scale))
    return cost


def draft_model_bytes(form: FormName, model: ModelSizes, drafters: Drafters) -> float:
    """Bytes of a draft network beside the target, kept as the target's head is."""
    if form == "eagle":
        return model.head_precision.bytes_of(_eagle_parameters(model, drafters))
    return model.head_precision.bytes_of(drafters.small_lm.parameters.value) if form == "small_lm" else 0.0


def draft_cost(
    form: FormName, machine: Machine, model: ModelSizes, drafters: Drafters, passes: Passes | None, tokens: Array,
    embedding_rows: bool = False,
) -> Cost:  # fmt: skip
    """(passes,) cost of draft passes of so many ``tokens`` each; ``passes`` where the target's experts draft."""
    if form in ("elastic", "bit_axis", "planned"):
        assert passes is not None
        slices = machine.hardware.features.bit_slices  # without them whole experts draft: the expert axis alone
        return cost_of(machine, operations(model, passes, machine, draft=slices, embedding_rows=embedding_rows))
    if form == "quant":
        assert passes is not None
        return cost_of(machine, operations(model, passes, machine, draft=True, copy=COPY, embedding_rows=embedding_rows))
    hidden, precision = model.spec.hidden, model.head_precision

    def network(name: str, parameters: float) -> Operation:
        return dense_model(name, hidden, parameters, precision, tokens, machine)

    if form == "small_lm":
        return cost_of(machine, [network("draft", drafters.small_lm.parameters.value)])
    return cost_of(
        machine, [network("draft", _eagle_parameters(model, drafters)), network("head", model.embedding_parameters)]
    )


def _eagle_parameters(model: ModelSizes, drafters: Drafters) -> float:
    """One decoder layer with the attention of the target's last one and a feed-forward of four times the hidden width."""
    return drafters.eagle.layers.value * (model.layers[-1].attention_parameters + 12 * model.spec.hidden**2)


@dataclass(frozen=True)
class Odds:
    """Acceptance of a draft token; ``label`` names the row, ``value`` the probability, ``status`` where it comes from."""

    label: str
    value: float
    status: str

    def __call__(self, share: float, depth: int) -> float:
        """The same whatever is resident and however deep."""
        return self.value


@dataclass(frozen=True)
class TableOdds:
    """A measured acceptance table as the simulator asks for it: MSB slices, by resident share and depth."""

    label: str
    table: AcceptanceTable

    def __call__(self, share: float, depth: int) -> float:
        """Probability at a share of resident MSB slices and a depth from 1."""
        return self.table.probability(4, share, depth)

    @property
    def status(self) -> str:
        """Whether it was measured."""
        return self.table.status

    def __hash__(self) -> int:
        return hash(self.label)


def rival_odds(form: FormName, drafters: Drafters) -> Odds:
    """The preset acceptance of a rival's draft."""
    odds = {
        "eagle": drafters.eagle.acceptance, "small_lm": drafters.small_lm.acceptance, "quant": drafters.quant.acceptance,
    }  # fmt: skip
    constant = odds[form]
    return Odds("preset", constant.value, constant.status)
