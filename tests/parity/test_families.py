"""Every family that the engine runs against transformers: tiny random models, saved by transformers, as folder and as GGUF.

Needs the parity extra. Run with ``make parity``; the errors are printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from elmoe import bitslice
from elmoe.convert.gguf_export import export_store
from elmoe.engine.decoder import Draft
from tests.family_configs import CONFIGS
from tests.parity import float_backend, harness
from tests.parity.bounds import FAMILY_BOUND
from tests.parity.family_models import convert_saved, token_ids
from tests.parity.transformers_reference import greedy, logits
from tests.unit.test_served_families import NOT_IN_GGUF

pytestmark = pytest.mark.filterwarnings("default")  # torch and transformers warn of their own affairs

GENERATED = 64


@dataclass(frozen=True)
class Case:
    name: str
    reader: Any
    model: Any
    ids: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module", params=CONFIGS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    reader, model = convert_saved(request.param, tmp_path_factory.mktemp(request.param))
    ids = token_ids()
    yield Case(request.param, reader, model, ids, logits(model, ids))
    reader.close()


def test_float_backend_equals_transformers(case: Case) -> None:
    for chunk in (1, 32, len(case.ids)):
        error = harness.relative_error(harness.decoder_logits(case.reader, float_backend, case.ids, chunk), case.logits)
        print(f"\n{case.name}: float, {chunk} tokens at a time: max relative error {error:.1e}", end="")
        assert error < FAMILY_BOUND


def test_native_kernels_equal_bitslice(case: Case) -> None:
    kernels = harness.native_kernels()
    if kernels is None:
        pytest.skip("no native kernels")
    spec, used = case.reader.spec, kernels.variant()
    allowed = np.zeros((len(spec.moe_layers), spec.experts), np.uint8)
    allowed[:, ::2] = 1
    for draft in (None, Draft(allowed, spec.top_k)) if spec.moe_layers else (None,):
        expected = harness.decoder_logits(case.reader, bitslice, case.ids, draft=draft)
        if draft is None:
            print(f"\n{case.name}: W8A8, rms error {harness.rms_error(expected, case.logits):.3f}", end="")
            assert harness.rms_error(expected, case.logits) < 0.3
        for variant in kernels.variants():
            kernels.set_variant(variant)
            try:
                for chunk in (1, 7, len(case.ids)):
                    found = harness.decoder_logits(case.reader, kernels, case.ids, chunk, draft)
                    assert np.array_equal(found, expected), (variant, chunk)
            finally:
                kernels.set_variant(used)


def test_greedy_generation(case: Case) -> None:
    prompts = [case.ids[:12], case.ids[20:21], case.ids[30:100]]
    expected = [greedy(case.model, prompt, GENERATED) for prompt in prompts]
    drafts = {"fast_memory": 0.5, "draft_length": 3} if case.reader.spec.moe_layers else {}
    for options in ({"mode": "plain"}, {"mode": "elastic", "batch": 3} | drafts, {"prefill_chunk": 5}):
        results, _ = harness.greedy(case.reader, float_backend, prompts, GENERATED, **options)
        assert [result.tokens for result in results] == expected, options


def test_a_gguf_twin_gives_the_same_tokens(case: Case, tmp_path: Path) -> None:
    if case.name in NOT_IN_GGUF:
        pytest.skip(f"GGUF cannot say it: {NOT_IN_GGUF[case.name]}")
    export_store(case.reader, tmp_path / "model.gguf")
    with harness.convert(tmp_path / "model.gguf", tmp_path / "store") as twin:
        found = harness.greedy(twin, float_backend, [case.ids[:12]], GENERATED)[0]
    assert found[0].tokens == greedy(case.model, case.ids[:12], GENERATED)
