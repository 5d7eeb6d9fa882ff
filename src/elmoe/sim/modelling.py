"""How ELMoE-3D and the models on it are simulated: options that bring the simulator to what the engine does.

Each is switched alone. :data:`BEFORE` is the simulator of version 0.1, bit for bit; :data:`STEPS` lead from it to
:data:`TODAY`, the default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from elmoe.models.sizes import ModelSizes
from elmoe.models.spec import GroupedAttention
from elmoe.schema.hardware import Hardware
from elmoe.sim.trees import Tree, TreeShape, tree_of
from elmoe.systems.forms import DraftShape, FormName

STAGING_EXPERTS = 16
"""Experts for which the fast memory has room beside the residents where slices are read ahead: the engine's default
(``EngineOptions.staging_experts``)."""


@dataclass(frozen=True)
class Draft:
    """How to draft: tokens in a row, or a tree as deep, by the target's own experts or by another network."""

    length: int = 0
    tree: TreeShape | None = None
    other: DraftShape | None = None

    @property
    def shape(self) -> DraftShape:
        """What another network drafts."""
        return self.other or DraftShape(self.length)

    @property
    def words(self) -> str | None:
        """For people; None without drafts."""
        if self.tree is not None:
            return f"tree of up to {1 + self.tree.budget} in {self.tree.depth} levels"
        return self.shape.words if self.length else None

    def grown(self, odds: tuple[float, ...]) -> Tree:
        """The tree, by the acceptance of a first choice at each depth; a chain is one of width 1."""
        return tree_of(self.tree or TreeShape(self.length), odds)


@dataclass(frozen=True)
class Modelling:
    """``split``: how MSB and LSB slices share the fast memory: the paper's rule, or the split of the highest modelled rate,
    as the engine has it. ``embedding_rows``: the embedding table is in the main memory, which gives a row of it for each
    token; else it fills fast memory and is never read. ``lengths``: draft lengths, of which each form takes the best.
    ``trees``: shapes of token trees that elastic drafts may take too; simulated only, the engine drafts chains.
    ``read_ahead``: slices that a draft routes to are read while it goes on. ``windows``: a layer with a window keeps and
    reads no positions beyond it."""

    split: Literal["msb_first", "by_rate"] = "by_rate"
    embedding_rows: bool = True
    lengths: tuple[int, ...] = (1, 2, 4, 8, 12, 16)
    trees: tuple[TreeShape, ...] = ()
    read_ahead: bool = True
    windows: bool = True

    def relevant(self, model: ModelSizes, hardware: Hardware, form: FormName) -> Modelling:
        """The same with options that have no say in a case as in ``BEFORE``: equal cases have equal prices."""
        features, drafts = hardware.features, form in ("elastic", "planned")
        return replace(
            self,
            split=self.split if features.bit_slices and features.expert_cache and form != "quant" else BEFORE.split,
            embedding_rows=self.embedding_rows and not model.spec.tied_embeddings,
            lengths=() if form in ("ar", "planned") else self.lengths,
            trees=self.trees if form == "elastic" else (),
            read_ahead=self.read_ahead and drafts and features.expert_cache and features.parallel_tiers,
            windows=self.windows and without_windows(model) is not model,
        )


TODAY = Modelling()
"""What the engine does."""
BEFORE = Modelling(
    split="msb_first", embedding_rows=False, lengths=(1, 2, 4, 8), read_ahead=False, windows=False
)  # fmt: skip
"""The simulator before these options."""
TREES = (TreeShape(4, 4, 16), TreeShape(8, 8, 48))
"""Shapes of trees to choose from where trees are wanted."""


@dataclass(frozen=True)
class Step:
    """A change of the modelling. ``reason``: where it comes from."""

    name: str
    change: dict[str, Any]
    reason: str

    def of(self, modelling: Modelling) -> Modelling:
        """The modelling with this change."""
        return replace(modelling, **self.change)


STEPS: list[Step] = [
    Step(
        "slices split by modelled rate", {"split": "by_rate"},
        "the engine: Planner, splits and popularity in policy/planner.py",
    ),
    Step(
        "embedding table in main memory", {"embedding_rows": True},
        "a token reads one row; llama.cpp keeps the table on the host (llama-model.cpp: 'there is very little benefit to "
        "offloading the input layer')",
    ),
    Step(
        "attention windows", {"windows": True},
        "config.json of GPT-OSS; the engine gives pages behind a window back (engine/cache_layout.py)",
    ),
    Step(
        "draft-guided reads", {"read_ahead": True}, "the engine: DirectTier.note, ExpertSlices::foresee and pump",
    ),
    Step("draft lengths to 16", {"lengths": TODAY.lengths}, "the engine: DRAFT_LENGTHS in policy/planner.py"),
    Step("token trees", {"trees": TREES}, "the paper (second-hand); simulated only, the engine drafts chains"),
]  # fmt: skip
"""Changes from ``BEFORE`` on, in the order in which a waterfall adds them; the last one leads beyond ``TODAY``."""


def without_windows(model: ModelSizes) -> ModelSizes:
    """The model with layers that attend to all positions."""
    layers = tuple(
        msgspec.structs.replace(layer, attention=msgspec.structs.replace(layer.attention, window=None))
        if isinstance(layer.attention, GroupedAttention) and layer.attention.window is not None
        else layer
        for layer in model.spec.layers
    )
    if layers == model.spec.layers:
        return model
    return msgspec.structs.replace(model, spec=msgspec.structs.replace(model.spec, layers=layers))
