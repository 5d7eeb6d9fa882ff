"""Token trees: which drafted tokens are verified together, and how deep the target's own text goes into them.

A tree is static: of all tokens up to a depth it holds the most probable ones, at most ``width`` at a depth and ``budget`` in
all. A chain is a tree of width 1. Simulated only: the engine drafts chains.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from elmoe.policy.acceptance import LARGEST

SIBLING = 0.5
"""Acceptance of a further candidate, where those before it were rejected, as a share of the first one's. Assumed; see
:func:`candidate_odds`."""


@dataclass(frozen=True)
class TreeShape:
    """``depth``: draft passes. ``width``: most tokens at a depth. ``budget``: tokens in all."""

    depth: int
    width: int = 1
    budget: int = 0

    def __post_init__(self) -> None:
        if self.depth < 1 or self.width < 1:
            raise ValueError(f"a tree of depth {self.depth} and width {self.width}")
        object.__setattr__(self, "budget", self.budget or self.depth * self.width)
        if self.budget < self.depth:
            raise ValueError(f"a tree of {self.budget} tokens has no depth of {self.depth}")


@dataclass(frozen=True)
class Tree:
    """``nodes``: of every drafted token its path: the candidate (0 is the draft's first choice) taken at each depth from 1
    on. ``levels``: tokens at each depth. ``expanded``: tokens that each draft pass computes, for one sequence."""

    nodes: frozenset[tuple[int, ...]]
    levels: tuple[int, ...]
    expanded: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Drafted tokens of a sequence."""
        return len(self.nodes)

    @property
    def depth(self) -> int:
        """Draft passes."""
        return len(self.levels)


def candidate_odds(first: float, width: int) -> list[float]:
    """Probabilities that the target's token is the draft's candidate 0, 1, ... of ``width``, the first one's given."""
    odds, left, each = [], 1.0, first
    for _ in range(width):
        odds.append(left * each)
        left *= 1 - each
        each = SIBLING * first
    return odds


@lru_cache(maxsize=4096)
def tree_of(shape: TreeShape, odds: tuple[float, ...]) -> Tree:
    """The most probable tokens, the chain of first choices always among them.

    :param odds: acceptance of a first choice at each depth from 1 on.
    """
    levels: list[list[tuple[float, tuple[int, ...]]]] = []
    frontier: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    for depth in range(shape.depth):
        each = candidate_odds(odds[depth], shape.width)
        grown = [(reach * chance, (*path, rank)) for reach, path in frontier for rank, chance in enumerate(each)]
        grown.sort(key=lambda one: (any(one[1]), -one[0], one[1]))
        frontier = grown[: shape.width]
        levels.append(frontier)
    chain = [level[0] for level in levels]
    others = sorted((one for level in levels for one in level[1:]), key=lambda one: (-one[0], len(one[1]), one[1]))
    nodes = {path for _, path in chain}
    for _, path in others:  # a parent is at least as probable as its child, and comes before it
        if len(nodes) < shape.budget and (len(path) == 1 or path[:-1] in nodes):
            nodes.add(path)
    parents = {path[:-1] for path in nodes}
    counts = tuple(sum(len(path) == depth for path in nodes) for depth in range(1, shape.depth + 1))
    expanded = tuple(sum(len(path) == depth for path in parents) for depth in range(shape.depth))
    return Tree(frozenset(nodes), counts, expanded)


def expected_depth(tree: Tree, odds: tuple[float, ...]) -> float:
    """Expected accepted tokens of a sequence."""
    total = 0.0
    for path in tree.nodes:
        chance = 1.0
        for depth, rank in enumerate(path):
            chance *= candidate_odds(min(LARGEST, odds[depth]), rank + 1)[rank]
        total += chance
    return total


def accepted_depth(tree: Tree, odds: tuple[float, ...], luck: list[float]) -> int:
    """How many tokens of the target's own text the tree holds; ``luck``: a draw of 0..1 at each depth from 1 on. A draw
    below the first choice's acceptance accepts it, as in a chain."""
    path: tuple[int, ...] = ()
    for depth in range(tree.depth):
        below = 0.0
        width = 1 + max((node[-1] for node in tree.nodes if len(node) == depth + 1 and node[:-1] == path), default=-1)
        for rank, chance in enumerate(candidate_odds(odds[depth], width)):
            below += chance
            if luck[depth] < below:
                path = (*path, rank)
                break
        else:
            return depth
    return tree.depth
