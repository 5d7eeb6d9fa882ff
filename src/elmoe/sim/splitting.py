"""How slices share the fast memory by modelled rate: the engine's candidates and its model of popularity, priced exactly.

As ``policy.planner.Planner``: of the splits from whole experts to all MSB slices, some with spare room, the one of the
highest expected tokens per second. Which experts a pass touches is expected from their popularity in the prompts. Where the
engine has learned what passes and reads cost, the machine tells it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from elmoe.hw.cost import Array
from elmoe.policy.budget import SlotPlan
from elmoe.systems.passes import Passes


class ExpectedPasses:
    """Passes as popularity lets expect them, a row for each way to share the fast memory.

    :param use: (experts,) how probably a token uses a layer's hottest, second hottest ... expert. :param plans: slots of the
        layers ``picked``. :param rows: token rows of a PE.
    """

    def __init__(
        self, use: Array, plans: Sequence[SlotPlan], picked: NDArray[np.int64], batch: int, context: int, rows: int
    ) -> None:
        self._use, self._top_k, self._batch, self._context, self._rows = use, float(use.sum()), batch, context, rows
        self.msb, self.lsb = (np.array([np.array(getattr(plan, kind))[picked] for plan in plans]) for kind in ("msb", "lsb"))

    @property
    def shares(self) -> list[float]:
        """Of MSB slices resident."""
        return (self.msb.mean(axis=1) / len(self._use)).tolist()

    def target(self, tokens: int, drafted: int) -> Passes:
        """Of so many tokens; ``drafted``: how many of them the drafts computed too, which foresee their experts."""
        used, known = self._touched(self._use, tokens), self._touched(self._use, drafted)
        total = np.append(0.0, np.cumsum(used))
        beyond = known.sum() - np.append(0.0, np.cumsum(known))
        return self._passes(
            tokens, np.full(self.msb.shape, total[-1]), np.full(self.msb.shape, self._blocks(self._use, used, tokens)),
            total[self.msb], total[self.lsb], beyond[self.msb], beyond[self.lsb],
        )  # fmt: skip

    def draft(self, tokens: int) -> Passes:
        """Of so many tokens, by residents alone: each is chosen the more often, the fewer there are."""
        active, blocks = np.zeros(self.msb.shape), np.zeros(self.msb.shape)
        for count in np.unique(self.msb).tolist():
            use = _restricted(self._use[:count], self._top_k)
            used = self._touched(use, tokens)
            active[self.msb == count], blocks[self.msb == count] = used.sum(), self._blocks(use, used, tokens)
        none = np.zeros(self.msb.shape)
        return self._passes(tokens, active, blocks, active, none, none, none)

    def _touched(self, use: Array, tokens: int) -> Array:
        touched: Array = 1 - (1 - use) ** tokens
        return touched

    def _blocks(self, use: Array, used: Array, tokens: int) -> float:
        """Blocks of token rows, an expert's tokens being as many as expected where it has any."""
        each = np.divide(tokens * use, used, out=np.zeros_like(use), where=used > 0)
        return float((used * np.ceil(each / self._rows)).sum())

    def _passes(
        self, tokens: int, active: Array, blocks: Array, msb: Array, lsb: Array, msb_foreseen: Array, lsb_foreseen: Array
    ) -> Passes:
        one, layer = np.ones(len(self.msb)), np.ones(self.msb.shape)
        return Passes(
            one * tokens, one * tokens * self._context, one * self._batch * self._context, active,
            layer * tokens * self._top_k, blocks, msb, lsb, one * 0, one * self._batch, msb_foreseen, lsb_foreseen,
        )  # fmt: skip


def _restricted(use: Array, top_k: float) -> Array:
    """How probably a token uses each of the experts it may use, ``top_k`` of them in all; none more than once."""
    found = np.maximum(use, 1e-9)
    for _ in range(len(use)):
        free = found < 1
        if not free.any():
            break
        scale = (top_k - (~free).sum()) / found[free].sum()
        found = np.where(free, np.minimum(1.0, found * scale), 1.0)
        if abs(found.sum() - top_k) < 1e-9:
            break
    return found


def interleaved(passes: Sequence[Passes]) -> Passes:
    """Draft passes of every depth, (rows,) each, as the draft passes of one row after another."""
    names = Passes.__dataclass_fields__
    stacked = {name: np.stack([getattr(one, name) for one in passes], axis=1) for name in names}
    return Passes(**{name: values.reshape(-1, *values.shape[2:]) for name, values in stacked.items()})
