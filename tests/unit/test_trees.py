"""Token trees: which tokens they hold, how deep a text goes into them, and what published trees accept."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from elmoe.sim.trees import TreeShape, accepted_depth, candidate_odds, expected_depth, tree_of


def constant(value: float, shape: TreeShape) -> tuple[float, ...]:
    return (value,) * shape.depth


@pytest.mark.parametrize(
    ("shape", "measured"), [(TreeShape(3), 1.86), (TreeShape(6, 10, 16), 2.52), (TreeShape(8, 10, 60), 3.2)]
)
def test_published_trees_accept_as_many_tokens(shape, measured):
    """EAGLE-3 on Qwen3-30B-A3B, MT-Bench (SpecForge #339): tokens per verification of a chain of 3, of trees of 16 and
    60. The chain gives the acceptance of a first choice, 0.5; trees follow from it."""
    odds = constant(0.5, shape)
    assert 1 + expected_depth(tree_of(shape, odds), odds) == pytest.approx(measured, rel=0.05)


def test_a_tree_of_width_one_is_a_chain():
    shape = TreeShape(5)
    tree = tree_of(shape, constant(0.6, shape))
    assert tree.levels == tree.expanded == (1,) * 5 and tree.tokens == tree.depth == 5
    odds = constant(0.6, shape)
    assert expected_depth(tree, odds) == pytest.approx(sum(0.6**n for n in range(1, 6)))
    for luck in np.random.default_rng(0).random((50, 5)).tolist():
        accepted = int(np.cumprod(np.array(luck) < 0.6).sum())
        assert accepted_depth(tree, odds, luck) == accepted


@pytest.mark.parametrize("first", [0.2, 0.5, 0.9])
def test_a_tree_holds_the_most_probable_tokens(first):
    """Against all trees: no token outside, whose parent is inside or that fits below, is more probable than one inside."""
    shape = TreeShape(3, 3, 6)
    odds = constant(first, shape)
    tree = tree_of(shape, odds)
    each = candidate_odds(first, 3)
    chance = {
        path: float(np.prod([each[rank] for rank in path]))
        for depth in (1, 2, 3)
        for path in product(range(3), repeat=depth)
    }
    assert tree.tokens == 6 and {(0,), (0, 0), (0, 0, 0)} <= tree.nodes and max(tree.levels) <= 3
    assert all(path[:-1] in tree.nodes or len(path) == 1 for path in tree.nodes)
    free = [path for path in tree.nodes if any(path)]
    outside = [p for p in chance if p not in tree.nodes and any(p) and (len(p) == 1 or p[:-1] in tree.nodes)]
    room = [p for p in outside if tree.levels[len(p) - 1] < 3]
    assert all(chance[path] <= min(map(chance.get, free)) + 1e-12 for path in room)
    assert sum(tree.expanded) == len({path[:-1] for path in tree.nodes})


@pytest.mark.parametrize("shape", [TreeShape(4, 2, 8), TreeShape(4, 4, 16), TreeShape(6, 5, 30)])
def test_what_happens_is_what_is_expected(shape):
    odds = constant(0.6, shape)
    tree = tree_of(shape, odds)
    luck = np.random.default_rng(1).random((20000, shape.depth))
    happened = np.mean([accepted_depth(tree, odds, row) for row in luck.tolist()])
    assert happened == pytest.approx(expected_depth(tree, odds), abs=0.04)
    chain = np.cumprod(luck < 0.6, axis=1).sum(axis=1).mean()
    assert happened > chain + 0.2


@pytest.mark.parametrize("arguments", [(0,), (2, 0), (4, 2, 3)])
def test_shapes_that_cannot_be_are_refused(arguments):
    with pytest.raises(ValueError, match="a tree of"):
        TreeShape(*arguments)
