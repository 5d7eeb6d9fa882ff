"""Stores whose experts have one slice, 4 + 2 bits, or several formats, through both tiers: always the plain output."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import ModelError, StoreError
from elmoe.kernels.slices import LSB, MSB
from elmoe.measure.calibrate import _slow_bandwidth
from elmoe.store import open_direct, open_store
from elmoe.store.synthetic import synthesize
from elmoe.trace import TraceRecorder, read_trace
from tests.tiny import tiny_spec

SPEC = tiny_spec(layers=5, dense_layers=(1,), experts=12, top_k=3, hidden=64, expert_width=96, tied_embeddings=False)
PLAIN = EngineOptions(mode="plain", keep_kv_digest=True)


def everywhere(name: str) -> dict[str, str]:
    """One format for all matrices."""
    return {f"layers.{i}.{part}": name for i in range(5) for part in ("query_key_value", "attention_output")} | {
        "embedding": name, "head": name, "layers.1.dense_ffn": name,
        **{f"layers.{i}.experts": name for i in (0, 2, 3, 4)},
    }  # fmt: skip


STORES = {
    "affine4_k": everywhere("affine4_k"),
    "table4_mx": everywhere("table4_mx"),
    "planes6": everywhere("planes6"),
    "mixed": {
        "embedding": "planes6", "head": "affine4_1", "layers.0.query_key_value": "affine4_k+affine4_k+planes6",
        "layers.1.dense_ffn": "table4_nl+affine4_0+planes6", "layers.2.attention_output": "table4_xs",
        "layers.0.experts": "affine4_k+affine4_k+planes6", "layers.2.experts": "affine4_k", "layers.4.experts": "table4_xs",
    },  # layer 3: nested8
}  # fmt: skip


def requests(count: int = 4, tokens: int = 14, temperature: float = 0.8) -> list[Request]:
    rng = np.random.default_rng(2)
    return [
        Request(tuple(rng.integers(1, 97, 3 + 7 * i).tolist()), tokens, SamplingParameters(temperature, seed=i))
        for i in range(count)
    ]


@pytest.fixture(scope="module", params=STORES)
def readers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    synthesize(folder / "store", SPEC, 3, formats=STORES[request.param])
    with open_store(folder / "store") as memory, open_direct(folder / "store") as direct:
        memory.verify()
        yield memory, direct


@pytest.fixture(scope="module")
def reference(readers):
    """By the definition in NumPy."""
    return Engine(readers[0], bitslice, replace(PLAIN, batch=4)).generate(requests())[0]


OPTIONS = {
    "one by one": PLAIN,
    "batch": replace(PLAIN, batch=3),
    "cache": replace(PLAIN, mode="cache", fast_memory=0.3, split="whole_experts", batch=3),
    "least budget": replace(PLAIN, mode="elastic", fast_memory=0.0, draft_length=2, staging_experts=1),
    "whole experts": replace(PLAIN, mode="elastic", fast_memory=0.25, split="whole_experts", draft_length=8, batch=2),
    "MSB first": replace(
        PLAIN, mode="elastic", fast_memory=0.5, split="msb_first", draft_length=3, batch=4, staging_experts=24
    ),
    "all in memory": replace(PLAIN, mode="elastic", fast_memory=1.0, draft_length=4, batch=2),
}
"""Settings of the losslessness grid; all are run by the best variant, one by every other. The full tier runs those that are
between others."""
BETWEEN = ("one by one", "cache", "all in memory")
CASES = [
    pytest.param(name, kernels.variants()[0], marks=[pytest.mark.full] if name in BETWEEN else []) for name in OPTIONS
] + [pytest.param("MSB first", one) for one in kernels.variants()[1:]]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_output_is_the_plain_output_in_both_tiers(readers, reference, name, variant):
    options = OPTIONS[name]
    kernels.set_variant(variant)
    try:
        for reader in readers:
            engine = Engine(reader, kernels, options)
            if engine.tier.enforced:
                engine.tier._pool.inject_delay(0.0005, 7)
            for _ in range(2):  # cold and warm
                results, statistics = engine.generate(requests())
                assert results == reference and statistics.draft_slow_reads == 0
            assert options.mode != "elastic" or statistics.drafted > 0
    finally:
        kernels.set_variant(None)


def test_budgets_and_reads_are_those_of_the_slices(readers):
    direct = readers[1]
    options = replace(PLAIN, mode="elastic", fast_memory=0.5, split="msb_first", draft_length=3, batch=4)
    engine = Engine(direct, kernels, options)
    engine.generate(requests())
    arena, resident = engine.tier.arena, engine.tier.resident
    layouts = [direct.expert_layout(layer) for layer in direct.spec.moe_layers]
    used = sum(
        int(msb.sum()) * layout.msb_bytes + int(lsb.sum()) * layout.lsb_bytes
        for msb, lsb, layout in zip(resident.msb, resident.lsb, layouts, strict=True)
    )
    assert 0 < used == arena.used <= arena.capacity
    for row, (layer, layout) in enumerate(zip(direct.spec.moe_layers, layouts, strict=True)):
        extents = [direct.expert_extent(layer, expert) for expert in range(12)]
        assert {size for _, size in extents} == {layout.msb_bytes + layout.lsb_bytes}
        lsb_addresses = engine.tier.tables[row][:, LSB]
        assert (engine.tier.tables[row][:, MSB] != 0).sum() >= resident.msb[row].sum()
        assert layout.lsb_bytes or not lsb_addresses.any()
    _, statistics = Engine(direct, kernels, replace(PLAIN, batch=3)).generate(requests())
    assert statistics.read_bytes == sum(phase.slow_bytes for phase in statistics.phases.values()) > 0


def test_both_tiers_count_alike(readers):
    options = EngineOptions(mode="elastic", fast_memory=0.5, split="msb_first", draft_length=3, batch=4)
    accounted, enforced = (Engine(one, kernels, options).generate(requests())[1].as_dict()["phases"] for one in readers)
    for phase in accounted:
        for key in ("seconds", "waited_seconds"):
            del accounted[phase][key], enforced[phase][key]
    assert accounted == enforced


def test_drafts_read_ahead(readers):
    options = EngineOptions(mode="elastic", fast_memory=0.5, split="msb_first", draft_length=4, batch=2, staging_experts=30)
    assert Engine(readers[1], kernels, options).generate(requests())[1].foreseen_hits > 0


def test_a_trace_holds_every_step(readers, tmp_path):
    options = EngineOptions(mode="elastic", fast_memory=0.5, split="msb_first", draft_length=3, batch=2)
    with TraceRecorder(tmp_path / "run.trace", readers[1].spec, {"commit_limit": 1}) as recorder:
        engine = Engine(readers[1], kernels, replace(options, batch=1))
        _, statistics = engine.generate(requests(1), recorder=recorder)
    rows = read_trace(tmp_path / "run.trace").table.to_pydict()
    assert rows["phase"].count("draft") == statistics.drafted > 0


def test_reads_of_one_slice_are_measured(readers):
    assert _slow_bandwidth(readers[1], None) > 0


def test_a_draft_of_one_slice_restricts_experts_only(tmp_path):
    """Its bits are the target's: with all experts and their own weights every draft token is what the target takes."""
    synthesize(tmp_path / "store", SPEC, 3, formats=STORES["affine4_k"])
    whole = EngineOptions(mode="elastic", fast_memory=None, draft_length=4, batch=2, draft_rescale=False)
    half, found = replace(whole, fast_memory=0.5), []
    with open_store(tmp_path / "store") as reader:
        for options in (whole, half, replace(half, draft_bits=8)):
            _, statistics = Engine(reader, kernels, options).generate(requests(temperature=0.0))
            found.append((statistics.drafted, statistics.accepted, statistics.rejected))
    assert found[0][1] > 0 and found[0][2] == 0
    assert found[1] == found[2] and found[1][2] > 0


def test_formats_that_do_not_fit_are_refused(tmp_path):
    for name, format in (
        ("embedding", "planes6+planes6"), ("layers.0.experts", "planes6+planes6"), ("final_norm", "nested8"),
        ("layers.9.experts", "planes6"), ("layers.0.query_key_value", "nested9"),
    ):  # fmt: skip
        with pytest.raises(ModelError, match=name):
            synthesize(tmp_path / "store", SPEC, formats={name: format})
    odd = tiny_spec(heads=3, kv_heads=1, head_dim=8)
    assert all(layer.attention.query_width % 16 for layer in odd.layers)
    with pytest.raises(ModelError):
        synthesize(tmp_path / "store", odd, formats={"layers.0.query_key_value": "planes6+nested8+planes6"})


def test_a_manifest_with_another_format_is_refused(tmp_path):
    synthesize(tmp_path / "store", SPEC, formats=STORES["planes6"])
    manifest = tmp_path / "store" / "manifest.json"
    text = manifest.read_text()
    for old, new in (("planes6", "affine4_k"), ("planes6", "planes7"), ("planes6", "planes6+planes6")):
        manifest.write_text(text.replace(old, new, 1))
        with pytest.raises(StoreError, match=r"manifest\.json: tensors\.embedding"):
            open_store(tmp_path / "store")
