"""The losslessness grid of every family: each format that GGUF can say and mixtures, each kind of window, both tiers.

Elastic output is the plain output of one sequence at a time: tokens, log-probabilities of them and of the alternatives,
bytes of the cache. The full tier runs all of it; the quick tier has its samples in ``test_served_families``,
``test_windows`` and ``test_format_stores``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import numpy as np
import pytest

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.cache_layout import PAGE_POSITIONS, layout_of
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.models import FAMILIES, spec_of_config
from elmoe.models.formats import BLOCK_ROWS, FORMATS, JOIN
from elmoe.models.support import check_supported
from elmoe.models.tensors import feed_forwards, tensors
from elmoe.store import open_direct, open_store
from elmoe.store.synthetic import RandomWeights, byte_tokenizer
from elmoe.store.writer import StoreWriter
from tests.checkpoints import tiny_config
from tests.family_configs import CONFIGS
from tests.unit.test_families import SIMULATED_FAMILIES

MODELS = CONFIGS | {
    "qwen3_moe": tiny_config(max_position_embeddings=512),
    "qwen3_moe_dense_layers": tiny_config(max_position_embeddings=512, mlp_only_layers=[1], norm_topk_prob=False),
    "qwen3": tiny_config(max_position_embeddings=512, architectures=["Qwen3ForCausalLM"], model_type="qwen3"),
}
"""Of every family, with all options that the engine runs."""
WINDOWED = {
    f"{name} in {window}": CONFIGS[name] | {"sliding_window": window}
    for name in ("mixtral_window", "qwen2_windows", "qwen2_moe_windows", "dots1_windows", "gpt_oss", "gpt_oss_options")
    for window in (1, 3, 16, 64, 65)
}
"""Windows shorter than a draft, of a block of keys and of a page, and one longer; all are shorter than most prompts."""
FORMATS_OF_STORES = (*FORMATS, "mixed", "mixed by projection", "published")
"""One format everywhere; matrix after matrix another one; another one in each part; the family's published experts."""


class Weights(RandomWeights):
    """Norms that are not all one, biases and sinks that are not zero."""

    def floats(self, tensor):
        if tensor.name.endswith("router") or "shared_expert_gate" in tensor.name:
            return super().floats(tensor)
        values = self._generator(tensor.name).standard_normal(tensor.shape, np.float32)
        return 1 + np.float32(0.2) * values if tensor.name.endswith("norm") else np.float32(0.3) * values


def formats_of(spec, name):
    """The format of every matrix and feed-forward. Parts of several formats must fill blocks of rows."""
    parts = {
        one.name: 1 if any(part.shape[0] % BLOCK_ROWS for part in one.parts[:-1]) else len(one.parts)
        for one in tensors(spec) if one.kind == "matrix"
    }  # fmt: skip
    parts |= {one.name: 3 for one in feed_forwards(spec)}
    if name in FORMATS:
        return dict.fromkeys(parts, name)
    if name == "published":
        experts = FAMILIES[spec.family].formats.get("experts", "nested8")
        return {one.name: experts for one in feed_forwards(spec) if one.kind == "expert"}
    turn = cycle(FORMATS)
    if name == "mixed":
        return {one: next(turn) for one in parts}
    return {one: JOIN.join(islice(turn, count)) for one, count in parts.items()}


def write(folder, config, formats):
    spec = spec_of_config(config)
    check_supported(spec)
    with StoreWriter(folder, spec, "random", lambda: f"{spec} {formats}", formats_of(spec, formats)) as writer:
        writer.write(Weights(1), None)
        writer.finish(byte_tokenizer(spec.vocabulary))
    return spec


def requests():
    """Prompts around the edges of pages, blocks and windows; answers that go over the next edge; copies of one prompt."""
    rng = np.random.default_rng(3)
    found = []
    for index, length in enumerate((1, 15, 60, 64, 65, 130, 200)):
        sampling = SamplingParameters() if index % 3 else SamplingParameters(0.7, seed=index)
        found.append(
            Request(
                tuple(rng.integers(1, 250, length).tolist()), 24 if length > 65 else 70, sampling, ignore_eos=index % 2 == 0,
                copies=1 + (length == 130), alternatives=5 * (index % 2),
            )
        )  # fmt: skip
    return found


def ways(spec, enforced):
    """Options by name. ``few pages`` has so little room that sequences are computed again."""
    page = layout_of(spec).page_bytes * layout_of(spec).groups
    found = {
        "chunks": EngineOptions(mode="plain", batch=3, prefill_chunk=7),
        "least budget": EngineOptions(fast_memory=0.0, draft_length=2, batch=2, staging_experts=1),
        "whole experts": EngineOptions(fast_memory=0.3, split="whole_experts", draft_length=8, batch=3, prefill_chunk=33),
        "MSB first": EngineOptions(fast_memory=0.5, split="msb_first", draft_length=5, batch=4),
        "planned": EngineOptions(fast_memory=0.7, batch=8, kv_memory=7 * page),
        "all": EngineOptions(fast_memory=1.0, draft_length=8, batch=2, draft_bits=4 if enforced else 8),
    }
    if not spec.moe_layers:  # nothing to draft with
        found = {name: replace(way, draft_length=None) for name, way in found.items()}
    return {name: replace(way, keep_kv_digest=True) for name, way in found.items()}


@pytest.fixture(autouse=True)
def threads():
    """Put back what a check changes."""
    before = kernels.threads()
    yield
    kernels.set_threads(before)


def check(tmp_path, config, formats):
    kernels.set_threads(1)
    spec, asked = write(tmp_path / "store", config, formats), requests()
    with open_store(tmp_path / "store") as memory, open_direct(tmp_path / "store") as direct:
        plain = EngineOptions(mode="plain", keep_kv_digest=True)
        expected = Engine(memory, kernels, plain).generate(asked)[0]
        assert all(result.kv_digest and result.error is None for result in expected)
        accepted = 0
        for reader in (memory, direct):
            for name, way in ways(spec, reader is direct).items():
                kernels.set_threads(2 if name in ("MSB first", "chunks") else 1)
                engine = Engine(reader, kernels, way)
                results, statistics = engine.generate(asked)
                assert results == expected, (reader.kind, name)
                assert statistics.draft_slow_reads == 0 and engine.cache.free_pages == engine.cache.pages
                if spec.moe_layers and way.draft_length:
                    assert statistics.drafted > 0, (reader.kind, name)
                accepted += statistics.accepted
        assert accepted > 0 or not spec.moe_layers


def test_every_family_is_in_the_grid():
    assert {spec_of_config(config).family for config in MODELS.values()} == set(FAMILIES) - set(SIMULATED_FAMILIES)
    lengths = [len(one.prompt) for one in requests()]
    assert min(lengths) < 16 and max(lengths) > 3 * PAGE_POSITIONS and PAGE_POSITIONS in lengths
    every = [spec_of_config(config) for config in (MODELS | WINDOWED).values()]
    windows = {layer.attention.window for spec in every for layer in spec.layers if hasattr(layer.attention, "window")}
    assert windows == {None, 1, 3, 16, 17, 33, 40, 64, 65, 70}
    for spec in every:
        assert JOIN in "".join(formats_of(spec, "mixed by projection").values()) and formats_of(spec, "mixed")


def test_a_sample_of_the_grid(tmp_path):
    check(tmp_path, MODELS["granitemoe"], "mixed by projection")


@pytest.mark.full
@pytest.mark.parametrize("formats", FORMATS_OF_STORES)
@pytest.mark.parametrize("name", MODELS)
def test_every_family_in_every_format(tmp_path, name, formats):
    check(tmp_path, MODELS[name], formats)


@pytest.mark.full
@pytest.mark.parametrize("formats", ["nested8", "affine4_k", "mixed by projection", "published"])
@pytest.mark.parametrize("name", WINDOWED)
def test_every_window(tmp_path, name, formats):
    check(tmp_path, WINDOWED[name], formats)
