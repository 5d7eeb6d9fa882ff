"""Frozen results: transformers' logits of tiny checkpoints, and the demo model's text bit by bit. Needs no torch.

``tools/golden/make_golden.py`` regenerates the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elmoe import bitslice
from tests.parity import float_backend, harness
from tests.parity.bounds import FLOAT_BOUND, MEASURED
from tests.parity.tiny_checkpoints import digest, recipe

FOLDER = Path(__file__).parent
RECIPES = ("gqa_tied", "mha_odd_widths", "dense_layers_bf16", "sparse_step_shards")
"""Tied and untied, float32 and bf16, dense layers of both kinds, odd widths, shards."""
PROMPT, GENERATED = 12, 40


@dataclass(frozen=True)
class Golden:
    name: str
    reader: Any
    ids: np.ndarray
    logits: np.ndarray
    generated: tuple[int, ...]
    weights: str


@pytest.fixture(scope="module", params=RECIPES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    name = request.param
    with np.load(FOLDER / f"{name}.npz") as file:
        frozen = {key: file[key] for key in file.files}
    assert digest(recipe(name)) == frozen["checkpoint"].item(), "the checkpoint generator changed: regenerate the file"
    reader = harness.convert_recipe(recipe(name), tmp_path_factory.mktemp(name))
    generated = tuple(frozen["generated"].tolist())
    yield Golden(name, reader, frozen["ids"], frozen["logits"], generated, frozen["weights"].item())
    reader.close()


def test_stored_weights(golden: Golden) -> None:
    """Quantisation gives the same weights as when the logits were computed."""
    assert harness.weights_digest(golden.reader) == golden.weights


def test_float_backend(golden: Golden) -> None:
    ours = harness.decoder_logits(golden.reader, float_backend, golden.ids)
    assert harness.relative_error(ours, golden.logits) < FLOAT_BOUND


def test_w8a8(golden: Golden) -> None:
    """INT8 activations stay near, and native kernels have bitslice's bits."""
    ours = harness.decoder_logits(golden.reader, bitslice, golden.ids)
    int8_float = harness.int8_float_logits(golden.reader, golden.ids)
    harness.check(harness.measure(ours, golden.logits, int8_float), MEASURED[golden.name])
    kernels = harness.native_kernels()
    if kernels is not None:
        assert np.array_equal(harness.decoder_logits(golden.reader, kernels, golden.ids), ours)


@pytest.mark.parametrize("mode", ["plain", "elastic"])
def test_greedy_tokens(golden: Golden, mode: str) -> None:
    options = {"mode": mode} | ({"fast_memory": 0.5, "draft_length": 3} if mode == "elastic" else {})
    results, _ = harness.greedy(golden.reader, float_backend, [golden.ids[:PROMPT]], GENERATED, **options)
    assert results[0].tokens == golden.generated


def demo_cases() -> list[dict[str, Any]]:
    return json.loads((FOLDER / "demo.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", demo_cases(), ids=lambda case: case["name"])
def test_demo_bits(case: dict[str, Any]) -> None:
    """The demo model's tokens, log-probabilities and KV bytes are exactly the frozen ones, drafted or not."""
    backend = harness.native_kernels() or bitslice
    for options in ({"mode": "plain"}, {"mode": "elastic", "fast_memory": 0.5, "draft_length": 3}):
        assert harness.demo_result(case["prompt"], case["sampling"], case["count"], backend, **options) == case["result"]
