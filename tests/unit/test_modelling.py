"""Options that bring the simulator to what the engine does: each alone does what it says, and nothing elsewhere."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate

import msgspec
import numpy as np
import pytest

from elmoe.errors import BudgetError
from elmoe.hw.cost import Cost
from elmoe.hw.machine import Machine
from elmoe.models.load import load_model
from elmoe.models.sizes import ModelSizes
from elmoe.policy.budget import SlotPlan
from elmoe.policy.planner import popularity
from elmoe.policy.residency import ResidencyParameters
from elmoe.schema.constants import Capacity
from elmoe.schema.drafters import load_drafters
from elmoe.sim.modelling import BEFORE, STEPS, TODAY, TREES, Draft, Modelling, without_windows
from elmoe.sim.planned import JUDGED, PlannedRun
from elmoe.sim.simulate import Priced, Simulation
from elmoe.sim.splitting import ExpectedPasses, _restricted
from elmoe.sim.trees import TreeShape, tree_of
from elmoe.sim.workload import Plan, RoutingReplay, TierPlan
from elmoe.systems.elmoe3d import FORESIGHT, read_ahead, streamed
from elmoe.systems.forms import Odds
from elmoe.systems.operations import operations, resample
from tests.physics.machines import EVERYTHING, MODEL, facts, hardware, known, memory

REPLAY = RoutingReplay(facts())
ODDS = Odds("0.8", 0.8, "assumed")


def small_fast(capacity: float = 24e6, main: float = 100e9) -> Machine:
    machine = hardware(EVERYTHING, fast=True, main=memory(main, 64e9, 4e-12))
    return Machine(
        msgspec.structs.replace(machine, fast=msgspec.structs.replace(machine.fast, capacity=known(Capacity, capacity)))
    )


def simulation(modelling: Modelling, model: ModelSizes = MODEL) -> Simulation:
    return Simulation(model, REPLAY, load_drafters(), 64, 16, modelling)


def price(
    modelling: Modelling, form: str = "elastic", batch: int = 4, model: ModelSizes = MODEL, capacity: float = 24e6,
    main: float = 100e9, odds: Odds = ODDS, **named: object,
) -> Priced:  # fmt: skip
    return simulation(modelling, model).price(
        small_fast(capacity, main), form, batch, None if form == "ar" else odds, **named
    )


def windowed(window: int = 16) -> ModelSizes:
    """Half of the layers with a window."""
    layers = tuple(
        msgspec.structs.replace(layer, attention=msgspec.structs.replace(layer.attention, window=window)) if i % 2 else layer
        for i, layer in enumerate(MODEL.spec.layers)
    )
    return msgspec.structs.replace(MODEL, spec=msgspec.structs.replace(MODEL.spec, layers=layers))


def test_steps_lead_from_before_to_today_and_then_to_trees():
    *_, without_trees, last = accumulate(STEPS, lambda modelling, step: step.of(modelling), initial=BEFORE)
    assert without_trees == TODAY and last == replace(TODAY, trees=TREES)
    for step in STEPS:
        assert step.of(BEFORE) != BEFORE and step.of(TODAY) in (TODAY, last) and step.reason


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_each_step_alone_changes_what_it_is_about(step):
    """A windowed model whose table does not fit beside everything, drafts that are mostly accepted, but not the first choice
    where trees are to help: every step has its say, and each can only be chosen where it gains."""
    odds, named = Odds("0.98", 0.98, "assumed"), dict(batch=8, model=windowed(), capacity=36e6)
    if step.name == "token trees":  # they need more from memory that is slow anyway
        odds, named = Odds("0.5", 0.5, "assumed"), named | dict(batch=16, main=5e9)
    before, after = (price(modelling, odds=odds, **named) for modelling in (BEFORE, step.of(BEFORE)))
    assert after.tokens / after.seconds > before.tokens / before.seconds


def test_the_embedding_table_leaves_the_fast_memory_but_for_what_is_the_head_too():
    sizes = [simulation(one).sizes(small_fast(), "ar", 1, 1) for one in (BEFORE, replace(BEFORE, embedding_rows=True))]
    assert sizes[0].dense - sizes[1].dense == MODEL.embedding_bytes == 1024 * 512 * 8.5 / 8
    tied = msgspec.structs.replace(MODEL, spec=msgspec.structs.replace(MODEL.spec, tied_embeddings=True))
    sizes = [simulation(one, tied).sizes(small_fast(), "ar", 1, 1) for one in (BEFORE, replace(BEFORE, embedding_rows=True))]
    assert sizes[0] == sizes[1]
    plain, rows = (price(one, "ar", model=tied).whole.latency for one in (BEFORE, replace(BEFORE, embedding_rows=True)))
    assert np.array_equal(plain, rows)


def test_a_token_reads_its_row_from_the_main_memory():
    passes = REPLAY.run(Plan(4, context=64, steps=4)).target
    machine = small_fast()
    row = next(op for op in operations(MODEL, passes, machine, embedding_rows=True) if op.name == "embedding")
    assert row.msb.tolist() == (passes.tokens * 512 * 8.5 / 8).tolist() and not row.msb_hit.any() and not row.dense.any()


def test_layers_with_a_window_read_and_keep_no_more_than_it():
    """In lock-step, exactly; of a model without windows, or with windows that hold the context, nothing changes."""
    passes = REPLAY.run(Plan(4, "external", 3, context=64, steps=4), lambda share, depth: 0.5).target
    machine, model = small_fast(), windowed()
    read = [op.dense for op in operations(model, passes, machine) if op.name == "attention"]
    full = [op.dense for op in operations(MODEL, passes, machine) if op.name == "attention"]
    # Four tokens of each of 4 sequences: the first sees 16 positions, the last three more that are new.
    spared = 4 * (64 - (16 - 1 + 4)) * MODEL.layers[0].kv_bytes
    assert [values.tolist() for values in read] == [full[0].tolist(), (full[0] - spared).tolist()]
    assert model.cache_bytes(64) == MODEL.layers[0].kv_bytes * (2 * 64 + 2 * 16)
    assert without_windows(model) == MODEL and without_windows(MODEL) is MODEL
    wide = price(replace(BEFORE, windows=True), model=windowed(64)).whole.latency
    assert np.array_equal(wide, price(BEFORE).whole.latency)


def test_gpt_oss_keeps_half_of_its_layers_positions():
    model = load_model("gpt-oss-20b")
    layer = 2 * 2 * 8 * 64
    assert (
        model.cache_bytes(1024) == 12 * layer * (1024 + 128)
        and without_windows(model).cache_bytes(1024) == 24 * layer * 1024
    )


def test_experts_of_one_slice_draft_as_they_are():
    """MXFP4: no bit axis. A draft reads whole experts of the resident set, and the split has nothing to choose."""
    one_slice = msgspec.structs.replace(MODEL, formats={"experts": "table4"})
    for modelling in (BEFORE, TODAY):
        run = price(modelling, model=one_slice)
        machine = small_fast()
        drafts = operations(one_slice, run.workload.draft, machine, draft=True)
        experts = next(op for op in drafts if op.name == "experts")
        whole = 3 * 512 * 256 * 4.25 / 8
        assert experts.msb.tolist() == experts.msb_hit.tolist() == (run.workload.draft.active * whole).tolist()
        assert not experts.lsb.any() and np.array_equal(run.workload.target.msb_hits, run.workload.target.lsb_hits)


@pytest.mark.parametrize("form", ["ar", "eagle", "elastic"])
@pytest.mark.parametrize("batch", [1, 8])
def test_slices_split_by_rate_fill_no_more_than_there_is(form, batch):
    """The choice is one of the engine's; every layer can draft; and it is modelled as no slower than the paper's rule."""
    by_rate = replace(BEFORE, split="by_rate")
    found = simulation(by_rate)
    run = price(by_rate, form, batch)
    assert run.workload.msb_hit_rate > 0
    sizes = found.sizes(small_fast(), form, batch, 1)
    draft = Draft(0 if form == "ar" else 2)
    slots = found._slots_by_rate(small_fast(), form, batch, draft, None if form == "ar" else ODDS, sizes, 24_000_000)
    assert (
        slots.bytes <= 24_000_000 and min(slots.msb) >= 4 and all(x <= m for m, x in zip(slots.msb, slots.lsb, strict=True))
    )


def test_splits_by_rate_win_in_plain_decoding():
    """What all MSB slices leave to read, half of every expert, whole experts spare."""
    rates = [run.tokens / run.seconds for run in (price(one, "ar", 1) for one in (BEFORE, replace(BEFORE, split="by_rate")))]
    assert rates[1] > 1.05 * rates[0]


def test_expected_passes_are_those_of_popular_experts():
    use = popularity(np.array([[40.0, 30, 20, 10, 0, 0, 0, 0]]), 2)
    plans = [SlotPlan((8,), (8,), 0), SlotPlan((2,), (1,), 0), SlotPlan((4,), (0,), 0)]
    expected = ExpectedPasses(use, plans, np.array([0]), 3, 64, 16)
    assert expected.shares == [1.0, 0.25, 0.5]
    target = expected.target(3, 2)
    touched, known = 1 - (1 - use) ** 3, 1 - (1 - use) ** 2
    np.testing.assert_allclose(target.active[:, 0], touched.sum())
    np.testing.assert_allclose(target.msb_hits[:, 0], [touched.sum(), touched[:2].sum(), touched.sum()])
    np.testing.assert_allclose(target.lsb_hits[:, 0], [touched.sum(), touched[0], 0])
    np.testing.assert_allclose(target.msb_foreseen[:, 0], [0, known[2:].sum(), 0], atol=1e-12)
    np.testing.assert_allclose(target.lsb_foreseen[:, 0], [0, known[1:].sum(), known.sum()], atol=1e-12)
    draft = expected.draft(3)
    np.testing.assert_allclose(draft.active[1, 0], 2)  # both residents, always
    np.testing.assert_allclose(draft.active[0, 0], touched.sum())
    assert target.tokens.tolist() == [3.0] * 3 and target.attended.tolist() == [3 * 64.0] * 3
    assert target.cached.tolist() == [3 * 64.0] * 3 and target.sequences.tolist() == [3.0] * 3
    np.testing.assert_allclose(target.pairs, np.full((3, 1), 3 * 2.0))
    each = 3 * use[touched > 0] / touched[touched > 0]  # tokens of an expert that has any: below the 16 rows of a block
    np.testing.assert_allclose(target.blocks[:, 0], (touched[touched > 0] * np.ceil(each / 16)).sum())
    few = ExpectedPasses(use, plans, np.array([0]), 3, 64, 1).target(3, 0)
    np.testing.assert_allclose(few.blocks[:, 0], (touched[touched > 0] * np.ceil(each)).sum())


def test_a_token_uses_its_experts_once_each_however_few_it_may_use():
    for use, top_k in (([0.9, 0.5, 0.1], 2.0), ([0.9, 0.05, 0.05], 2.0), ([0.5, 0.5], 2.0), ([0.25] * 4, 1.0)):
        found = _restricted(np.array(use), top_k)
        assert found.max() <= 1 and found.sum() == pytest.approx(top_k, abs=1e-8)
        assert (np.diff(found) <= 1e-12).all()


def test_a_split_expects_all_tokens_of_drafts_to_be_verified(monkeypatch):
    """Drafts of 4 at batch 4: 20 tokens, of which the drafts computed 16; a tree of 12: 52 and as many as it expands."""
    asked: list[tuple[int, int]] = []
    whole = ExpectedPasses.target
    monkeypatch.setattr(ExpectedPasses, "target", lambda self, *told: asked.append(told) or whole(self, *told))
    price(TODAY, lengths=(4,))
    tree = TreeShape(4, 4, 12)
    price(replace(TODAY, lengths=(), trees=(tree,)))
    expanded = sum(tree_of(tree, (0.8,) * 4).expanded)
    assert asked == [(4 + 4 * 4, 4 * 4), (4 + 4 * 12, 4 * expanded)]


def test_slices_of_all_experts_can_draft_with_a_split_by_rate():
    every, few = (price(TODAY, "bit_axis", capacity=capacity) for capacity in (1e9, 24e6))
    assert every.workload.draft is not None and every.tokens / every.seconds > few.tokens / few.seconds
    assert every.workload.draft.msb_hits.sum() > few.workload.draft.msb_hits.sum()


def test_drafts_say_what_they_are():
    assert Draft().words is None and Draft(3).words == "chain of 3"
    assert Draft(4, TreeShape(4, 4, 12)).words == "tree of up to 13 in 4 levels"
    assert TODAY.lengths == (1, 2, 4, 8, 12, 16) and BEFORE.lengths == (1, 2, 4, 8)


def test_stretches_of_layers_are_means():
    assert resample([1.0, 2.0, 3.0, 4.0], 2).tolist() == [1.5, 3.5] and resample([5.0, 5.0], 4).tolist() == [5.0] * 4
    assert resample([1.0, 4.0], 4).tolist() == [1.0, 1.0, 4.0, 4.0]


def test_the_planner_needs_a_memory_that_can_draft():
    with pytest.raises(BudgetError, match="below the minimum"):
        price(TODAY, "planned", capacity=1e5)


def test_reads_ahead_are_bounded_by_time_room_and_what_is_missing():
    machine = small_fast()  # 100 GB/s
    missing = np.array([1e6, 1e6, 1e6, 0.0])
    cost, share = read_ahead(machine, missing, np.array([1.0, 4e-6, 1.0, 1.0]), np.array([1e9, 1e9, 2e5, 1e9]))
    np.testing.assert_allclose(cost.traffic["main"], [1e6, 4e5, 2e5, 0])
    np.testing.assert_allclose(share, FORESIGHT * np.array([1, 0.4, 0.2, 0]))
    np.testing.assert_allclose(cost.traffic["fast written"], cost.traffic["main"])


def test_a_pass_streams_what_is_foreseen_but_no_faster_than_the_memory():
    one = np.ones(3)
    target = Cost(10 * one, {}, {"main": np.array([4.0, 8.0, 10.0])}, {})
    latency = streamed(target, Cost(np.array([6.0, 6.0, 6.0]))).latency
    assert latency.tolist() == [6.0, 8.0, 10.0]


@pytest.mark.parametrize("form", ["ar", "eagle", "small_lm", "quant", "bit_axis"])
def test_only_elastic_drafts_have_slices_read_ahead(form):
    off, on = (price(replace(BEFORE, read_ahead=ahead), form, capacity=700e6).whole.latency for ahead in (False, True))
    assert np.array_equal(off, on)


def test_slices_read_ahead_cost_no_time_and_their_bytes_are_counted():
    """The same passes priced both ways: the draft takes as long, the target less."""
    on = price(replace(BEFORE, read_ahead=True), lengths=(4,))
    work = on.workload
    draft, target = simulation(BEFORE).costs(small_fast(), "elastic", work.target, work.draft, 4, Draft(4), 0.0)
    np.testing.assert_allclose(on.draft.latency, draft.latency, rtol=1e-12)
    assert (on.target.latency <= target.latency * (1 + 1e-12)).all() and on.seconds < (draft.latency + target.latency).sum()
    ahead = on.draft.traffic["main"]
    assert (ahead > 0).all() and (ahead <= 100e9 * on.draft.latency).all()
    spared = target.traffic["main"] - on.target.traffic["main"]
    np.testing.assert_allclose(spared, FORESIGHT * ahead)  # the rest was read in vain
    np.testing.assert_allclose(on.target.traffic["fast"] - target.traffic["fast"], spared)


def test_a_tree_of_width_one_is_priced_as_the_chain():
    tier = TierPlan(SlotPlan((8,) * 4, (8,) * 4, 0), ResidencyParameters(), (1.0,) * 4, (1.0,) * 4)
    chain = REPLAY.run(Plan(3, "resident", 4, 64, 16, 8, tier), ODDS)
    tree = REPLAY.run(Plan(3, "resident", 4, 64, 16, 8, tier, TreeShape(4)), ODDS)
    for name in chain.target.__dataclass_fields__:
        for one, other in ((chain.target, tree.target), (chain.draft, tree.draft)):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert chain.committed.tolist() == tree.committed.tolist()


def test_a_tree_costs_more_tokens_and_accepts_more():
    tier = TierPlan(SlotPlan((8,) * 4, (8,) * 4, 0), ResidencyParameters(), (1.0,) * 4, (1.0,) * 4)
    odds = Odds("0.5", 0.5, "assumed")
    chain = REPLAY.run(Plan(3, "resident", 4, 64, 16, 16, tier), odds)
    tree = REPLAY.run(Plan(3, "resident", 4, 64, 16, 16, tier, TreeShape(4, 4, 12)), odds)
    assert (tree.target.tokens == 3 * 13).all() and (chain.target.tokens == 3 * 5).all()
    assert tree.target.active.mean() > chain.target.active.mean()
    assert tree.committed.mean() > chain.committed.mean() and (tree.draft.active <= 8).all()


def test_the_planner_drafts_where_that_pays_and_leaves_it_where_not():
    """No hindsight: near the better of plain and elastic, and by as many drafts as that tells."""
    found = simulation(TODAY)
    for chance, drafts in ((0.95, True), (0.02, False)):
        odds = Odds(f"{chance}", chance, "assumed")
        machine = small_fast(60e6)
        plain, elastic = found.price(machine, "ar", 8), found.price(machine, "elastic", 8, odds)
        planned = found.price(machine, "planned", 8, odds)
        share = planned.workload.drafting
        assert (share > 0.8) if drafts else (share < 0.2)
        best = max(plain.tokens / plain.seconds, elastic.tokens / elastic.seconds)
        assert 0.8 * best < planned.tokens / planned.seconds < 1.2 * best
        assert (
            planned.whole.latency.shape == (planned.workload.steps,) and planned.tokens == planned.workload.committed.sum()
        )
        for name, busy in planned.whole.busy.items():
            assert (busy <= planned.whole.latency * (1 + 1e-12)).all(), name


@pytest.mark.parametrize("chance", [0.3, 0.6])
def test_the_planner_begins_with_the_acceptance_that_it_has_judged(chance):
    """Experts of unequal popularity: residents cover more of the routing than their share."""
    odds = Odds(f"{chance}", chance, "assumed")
    run = PlannedRun(simulation(replace(TODAY, split="msb_first")), small_fast(), 1, odds)
    run._judge()
    counts = REPLAY.prompt_counts(1)
    assert counts.max() > 2 * counts.mean()
    run._planner.plan(1, run._sizes, run._capacity, counts)
    seen = np.mean(REPLAY.luck.ravel()[-JUDGED:] < chance)
    expected = run._planner.acceptance.expected(run._planner._covered)
    assert expected == pytest.approx(seen, abs=0.15)  # a prior of 4 rejections


def test_the_planner_decides_before_every_step_since_deciding_takes_no_simulated_time(monkeypatch):
    run, choices = PlannedRun(simulation(TODAY), small_fast(), 2, ODDS), []
    choose = run._planner._choose
    monkeypatch.setattr(run._planner, "_choose", lambda *given: (choices.append(given), choose(*given)))
    workload, _, _ = run._run(8, 0)
    assert workload.steps == 8 and len(choices) >= 8


def test_a_split_by_rate_expects_passes_of_all_tokens_that_are_verified_and_drafted(monkeypatch):
    seen, target = [], ExpectedPasses.target
    monkeypatch.setattr(
        ExpectedPasses,
        "target",
        lambda self, tokens, drafted: (seen.append((tokens, drafted)), target(self, tokens, drafted))[1],
    )
    simulation(TODAY)._tier(small_fast(), "elastic", 3, Draft(2), ODDS)
    assert seen == [(3 + 3 * 2, 3 * 2)]


def test_a_plan_attends_to_the_paper_s_1024_positions_unless_told():
    assert set(REPLAY.run(Plan(2)).target.attended.tolist()) == {2 * 1024.0}
