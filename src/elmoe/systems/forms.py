"""Plain and speculative forms of serving: what drafts, how likely it is accepted, and what a draft pass costs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from elmoe.hw.cost import Array, Cost, in_order
from elmoe.hw.machine import Machine
from elmoe.models.load import load_model
from elmoe.models.sizes import ModelSizes, Precision
from elmoe.schema.drafters import Drafters, Tree
from elmoe.systems import elmoe3d, near_memory, xpu
from elmoe.systems.operations import Operation, attention_of, dense_model, operations
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


def draft_model_bytes(form: FormName, model: ModelSizes, drafters: Drafters, positions: int = 0) -> float:
    """Bytes of a draft network beside the target, kept as the target's head is, and of its own cache of ``positions`` where
    it counts one."""
    if form == "eagle":
        cached = model.layers[-1].kv_bytes * drafters.eagle.layers.value if drafters.eagle.caches else 0.0
        return model.head_precision.bytes_of(_eagle_parameters(model, drafters) + _own_head(model, drafters)) + (
            positions * cached
        )
    if form != "small_lm":
        return 0.0
    if drafters.small_lm.model is None:
        return model.head_precision.bytes_of(drafters.small_lm.parameters.value)
    small = _small_model(drafters.small_lm.model)
    return small.total_bytes + positions * small.spec.kv_bytes_per_position


def draft_cost(
    form: FormName, machine: Machine, model: ModelSizes, drafters: Drafters, passes: Passes | None, tokens: Array,
    sequences: int, context: int, embedding_rows: bool = False,
) -> Cost:  # fmt: skip
    """(passes,) cost of draft passes of so many ``tokens`` each; ``passes`` where the target's experts draft.

    A drafter with a cache of its own reads ``context`` positions of every one of the ``sequences``.
    """
    if form in ("elastic", "bit_axis", "planned"):
        assert passes is not None
        slices = machine.hardware.features.bit_slices  # without them whole experts draft: the expert axis alone
        return cost_of(machine, operations(model, passes, machine, draft=slices, embedding_rows=embedding_rows))
    if form == "quant":
        assert passes is not None
        return cost_of(machine, operations(model, passes, machine, draft=True, copy=COPY, embedding_rows=embedding_rows))
    hidden, precision = model.spec.hidden, model.head_precision
    own = dense_passes(tokens, sequences, context)

    def network(name: str, parameters: float) -> Operation:
        return dense_model(name, hidden, parameters, precision, tokens, machine)

    if form == "small_lm" and drafters.small_lm.model is not None:
        return cost_of(machine, operations(_small_model(drafters.small_lm.model), own, machine))
    if form == "small_lm":
        return cost_of(machine, [network("draft", drafters.small_lm.parameters.value)])
    head = network("head", _own_head(model, drafters) or model.embedding_parameters)
    parameters = _eagle_parameters(model, drafters)
    if not drafters.eagle.caches:
        return cost_of(machine, [network("draft", parameters), head])
    last = model.layers[-1]
    attention = attention_of(model, last, own, machine)
    others = parameters / drafters.eagle.layers.value - last.attention_parameters
    ops = [attention, network("draft", others)] * int(drafters.eagle.layers.value)
    return cost_of(machine, [*ops, head])


def dense_passes(tokens: Array, sequences: int, context: int) -> Passes:
    """Passes of a network without experts over sequences of ``context`` cached positions each."""
    none = np.zeros((len(tokens), 0))
    cached = np.full_like(tokens, sequences * context)
    zero = np.zeros_like(tokens)
    return Passes(
        tokens, tokens * context, cached, none, none, none, none, none, zero, np.full_like(tokens, sequences), none, none
    )  # fmt: skip


def _eagle_parameters(model: ModelSizes, drafters: Drafters) -> float:
    """One decoder layer with the attention of the target's last one and a feed-forward of four times the hidden width."""
    return drafters.eagle.layers.value * (model.layers[-1].attention_parameters + 12 * model.spec.hidden**2)


def _own_head(model: ModelSizes, drafters: Drafters) -> float:
    """Weights of the draft head's own vocabulary head; 0 where it shares the target's."""
    vocabulary = drafters.eagle.vocabulary
    return 0.0 if vocabulary is None else min(vocabulary.value, model.spec.vocabulary) * model.spec.hidden


@dataclass(frozen=True)
class DraftShape:
    """What is drafted per step: ``levels`` tokens one after the other, of which ``siblings`` (by level) have more candidates
    beside the first; every level but the first is drafted from ``width`` tokens of the one above."""

    levels: int
    siblings: tuple[int, ...] = ()
    width: int = 1

    @property
    def words(self) -> str:
        """For people."""
        if self.width == 1:
            return f"chain of {self.levels}"
        return f"tree of {1 + self.levels + sum(self.siblings)} in {self.levels} levels"


def shape_of(tree: Tree) -> DraftShape:
    """Candidates spread over the levels as evenly as they go, the upper levels first."""
    levels, extra = int(tree.levels.value), int(tree.tokens.value - tree.levels.value) - 1
    each, more = divmod(extra, levels)
    siblings = tuple(each + (level < more) for level in range(levels))
    return DraftShape(levels, siblings if extra else (), int(tree.width.value))


def odds_of_yield(committed: float, levels: int) -> float:
    """Probability per level, the same at each, at which ``levels`` of them commit so many tokens in the mean.

    Solves 1 + a + a^2 + ... + a^levels = committed.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(middle**level for level in range(levels + 1)) < committed:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def rival_shapes(form: FormName, drafters: Drafters) -> list[tuple[DraftShape, Odds]]:
    """Trees that a rival may draft beside chains, with the odds that a level holds the right token."""
    if form != "eagle":
        return []
    return [
        (shape_of(tree), Odds("preset", odds_of_yield(tree.committed.value, int(tree.levels.value)), tree.committed.status))
        for tree in drafters.eagle.trees
    ]


@cache
def _small_model(name: str) -> ModelSizes:
    return load_model(name)


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
