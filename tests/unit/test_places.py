"""Cell, position and parents: where a token lies changes no bit, and branches see what they follow, not their siblings."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import Places
from elmoe.engine.decoder import AllExperts, Decoder
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.passes import Row, places_of
from elmoe.engine.request import Request
from elmoe.errors import KernelError
from tests.tiny import TinyReader, bound_cache, tiny_spec

READER = TinyReader(tiny_spec(layers=2))
PROMPT = tuple(range(5, 23))  # more than a block of 16 cells
# A tree behind the prompt: token, parent, depth. Rows 1 and 2 follow row 0; rows 3 and 4 follow 1 and 2; row 5 is a root.
TREE = ((30, -1, 0), (31, 0, 1), (32, 0, 1), (33, 1, 2), (34, 2, 2), (35, -1, 0))


def array(values) -> np.ndarray:
    return np.array(values, np.int32)


def decoder(backend):
    one, cache = Decoder(READER, backend), bound_cache(READER.spec, 1, 128)
    one.reserve_positions(128)
    one.forward(array(PROMPT), Places(*chain(0, len(PROMPT))), cache.kernels, AllExperts(READER))
    return one, cache.kernels


def chain(first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(last - first, np.int32), np.arange(first, last, dtype=np.int32)


def path(row: int) -> list[int]:
    """Tokens from the root to a row of the tree."""
    token, parent, _ = TREE[row]
    return [*(path(parent) if parent >= 0 else []), token]


@pytest.mark.parametrize("order", [range(6), [7, 3, 90, 0, 41, 100]], ids=["one by one", "anywhere"])
def test_every_branch_of_a_tree_is_its_own_chain(order):
    """Logits, and keys and values, of one pass over the tree are those of a pass over each branch."""
    one, cache = decoder(bitslice)
    tokens, parents, depths = (array(column) for column in zip(*TREE, strict=True))
    cells = array(order) + len(PROMPT)
    places = Places(np.zeros(6, np.int32), depths + len(PROMPT), cells, parents)
    assert not places.chain
    logits, _ = one.forward(tokens, places, cache, AllExperts(READER))
    for row in range(6):
        alone, other = decoder(bitslice)
        branch = array(path(row))
        there = Places(*chain(len(PROMPT), len(PROMPT) + len(branch)))
        expected, _ = alone.forward(branch, there, other, AllExperts(READER))
        assert logits[row].tobytes() == expected[-1].tobytes()
        for layer in range(2):
            lies = [one[:, cells[row]] for one in cache.gather(layer, 0, 128)]
            should = [one[:, -1] for one in other.gather(layer, 0, len(PROMPT) + len(branch))]
            assert all(a.tobytes() == b.tobytes() for a, b in zip(lies, should, strict=True))


def test_a_chain_is_a_tree_without_branches():
    slots, positions = chain(18, 22)
    plain, told = Places(slots, positions), Places(slots, positions, positions.copy(), array([-1, 0, 1, 2]))
    assert plain.chain and told.chain
    assert [seen.tolist() for seen in told.seen()] == [seen.tolist() for seen in plain.seen()]
    outcomes = []
    for backend in (bitslice, kernels):
        for places in (plain, told):
            one, cache = decoder(backend)
            outcomes.append(one.forward(array([3, 1, 4, 1]), places, cache, AllExperts(READER))[0].tobytes())
    assert len(set(outcomes)) == 1


def test_native_kernels_refuse_what_is_no_chain():
    one, cache = decoder(kernels)
    before = cache.keys.tobytes()
    with pytest.raises(KernelError, match="chains of tokens, not trees"):
        one.forward(array([1, 2]), Places(*chain(18, 20), array([18, 20])), cache, AllExperts(READER))
    weights = one._layers[0].attention
    with pytest.raises(KernelError, match="chains of tokens, not trees"):
        x = np.zeros((1, READER.spec.hidden), np.float32)
        kernels.attention_block(weights, x, cache, 0, Places(*chain(18, 19), array([19])), one._cosine, one._sine)
    assert cache.keys.tobytes() == before


@pytest.mark.parametrize(
    "places,named",
    [
        (([0, 0], [3, 4], [5, 5], [-1, 0]), "two tokens are in one cell"),
        (([0, 0], [3, 4], [5, 6], [-1, 1]), "token 1 has the parent 1"),
        (([0, 0], [3, 4], [5, 6], [-2, 0]), "token 0 has the parent -2"),
        (([0, 1], [3, 4], [5, 6], [-1, 0]), "token 1 has the parent 0, which is not before it in its sequence"),
        (([0, 0], [3, 5], [5, 6], [-1, 0]), "token 1 at position 5 has a parent at position 3"),
        (([0, 0], [3, 4], [2, 6], [-1, 0]), "token 0 is in the cell 2, which it sees"),
    ],
)
def test_places_that_contradict_each_other_are_named(places, named):
    with pytest.raises(ValueError, match=named):
        Places(*(array(part) for part in places)).seen()


def test_two_sequences_may_use_the_same_cells():
    places = Places(array([0, 1]), array([3, 3]), array([4, 4]), array([-1, -1]))
    assert [seen.tolist() for seen in places.seen()] == [[0, 1, 2, 4], [0, 1, 2, 4]]


def test_rows_say_their_cell_and_parent_only_where_they_branch():
    sequence = SimpleNamespace(entry=SimpleNamespace(row=2))
    rows = [Row(sequence, 18, 30), Row(sequence, 19, 31, parent=0), Row(sequence, 19, 32)]
    straight = places_of(rows[:2])
    assert straight.cells is None and straight.parents is None and straight.positions.tolist() == [18, 19]
    rows[2] = Row(sequence, 19, 32, cell=20, parent=0)
    branching = places_of(rows)
    assert branching.cells is not None and branching.parents is not None
    assert (branching.slots.tolist(), branching.cells.tolist()) == ([2, 2, 2], [18, 19, 20])
    assert branching.parents.tolist() == [-1, 0, 0]


def test_a_pass_of_the_engine_computes_a_tree_on_the_definition():
    """Two drafts of one sequence in one pass, each sampled as if it were the only one."""
    engine = Engine(READER, bitslice, EngineOptions(mode="plain"))
    engine.add(Request(PROMPT, 20, ignore_eos=True))
    while not engine.scheduler.running or not engine.scheduler.running[0].output:
        engine.step()
    (sequence,) = engine.scheduler.running
    at = len(sequence.tokens) - 1
    engine.cache.reserve(sequence.entry, at + 3)
    last = Row(sequence, at, sequence.tokens[-1])
    both = [last, Row(sequence, at + 1, 40, cell=at + 1, parent=0), Row(sequence, at + 1, 41, cell=at + 2, parent=0)]
    tree = engine._passes.run("verify", both, {}).samples
    alone = [engine._passes.run("verify", [last, Row(sequence, at + 1, token)], {}).samples for token in (40, 41)]
    assert tree == [alone[0][0], alone[0][1], alone[1][1]]
