"""elmoe against transformers: tiny checkpoints of many shapes, and the perplexity of the demo model.

Needs the parity extra (torch, transformers). Run with ``make parity``; the tables are printed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from elmoe import bitslice  # noqa: E402
from elmoe.engine.decoder import Draft  # noqa: E402
from elmoe.llm import Model, load  # noqa: E402
from elmoe.measure.perplexity import evaluate  # noqa: E402
from tests.parity import float_backend, harness  # noqa: E402
from tests.parity import transformers_reference as reference  # noqa: E402
from tests.parity.bounds import FLOAT_BOUND, MEASURED  # noqa: E402
from tests.parity.tiny_checkpoints import (  # noqa: E402
    RECIPES,
    Recipe,
    config,
    recipe,
    tensors,
    token_sequence,
    write_folder,
    write_tokenizer,
)

pytestmark = pytest.mark.filterwarnings("default")  # torch and transformers warn of their own affairs

PROMPT, GENERATED = 12, 40
WINDOW, WINDOWS = 256, 40


@dataclass(frozen=True)
class Case:
    recipe: Recipe
    reader: Any
    model: Any
    ids: np.ndarray
    logits: np.ndarray


@pytest.fixture(scope="module", params=RECIPES, ids=lambda r: r.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    recipe, folder = request.param, tmp_path_factory.mktemp(request.param.name)
    reader = harness.convert_recipe(recipe, folder)
    values = harness.dequantized_tensors(reader)
    write_folder(folder / "dequantized", config(recipe, "float32"), values, "float32")
    model = reference.load(folder / "dequantized")
    ids = token_sequence(recipe)
    yield Case(recipe, reader, model, ids, reference.logits(model, ids))
    reader.close()


def test_store_holds_the_checkpoint(case: Case) -> None:
    """Norms and routers exactly, matrices within half a step of their group's scale."""
    stored = harness.dequantized_tensors(case.reader)
    source = {name: harness.as_written(value, case.recipe.dtype) for name, value in tensors(case.recipe)}
    assert stored.keys() == source.keys()
    for name, value in source.items():
        if value.ndim == 1 or name.endswith("mlp.gate.weight"):
            assert np.array_equal(stored[name], value), name
        else:
            # half a step, and the scale itself is rounded to fp16
            assert np.abs(stored[name] - value).max() <= np.abs(value).max() * (0.5 / 127 + 1 / 2048), name


def test_float_backend_equals_transformers(case: Case) -> None:
    for chunk in (1, 32, len(case.ids)):
        ours = harness.decoder_logits(case.reader, float_backend, case.ids, chunk)
        error = harness.relative_error(ours, case.logits)
        print(f"\n{case.recipe.name}: float, {chunk} tokens at a time: max relative error {error:.1e}", end="")
        assert error < FLOAT_BOUND


def test_w8a8_error(case: Case) -> None:
    ours = harness.decoder_logits(case.reader, bitslice, case.ids)
    errors = harness.measure(ours, case.logits, harness.int8_float_logits(case.reader, case.ids))
    agreement = np.mean(ours.argmax(axis=1) == case.logits.argmax(axis=1))
    print(f"\n{case.recipe.name}: W8A8 {errors}, same top token at {agreement:.1%}", end="")
    harness.check(errors, MEASURED[case.recipe.name])


def test_native_kernels_equal_bitslice(case: Case) -> None:
    """Every variant this processor runs, target and draft, in pieces of any size: the same bits."""
    kernels = harness.native_kernels()
    if kernels is None:
        pytest.skip("no native kernels")
    spec = case.reader.spec
    allowed = np.zeros((len(spec.moe_layers), spec.experts), np.uint8)
    allowed[:, ::2] = 1
    used = kernels.variant()
    for draft in (None, Draft(allowed, spec.top_k), Draft(allowed, 1, rescale=False, offset=0.0)):
        expected = harness.decoder_logits(case.reader, bitslice, case.ids, draft=draft)
        for variant in kernels.variants():
            kernels.set_variant(variant)
            try:
                for chunk in (1, 7, len(case.ids)):
                    found = harness.decoder_logits(case.reader, kernels, case.ids, chunk, draft)
                    assert np.array_equal(found, expected), (variant, chunk, draft)
            finally:
                kernels.set_variant(used)


def test_greedy_generation(case: Case) -> None:
    """Plain and elastic, one request or three at once: transformers' tokens."""
    prompts = [case.ids[:PROMPT], case.ids[20:21], case.ids[30:50]]
    expected = [reference.greedy(case.model, prompt, GENERATED) for prompt in prompts]
    for options in (
        {"mode": "plain"},
        {"mode": "cache", "fast_memory": 0.5},
        {"mode": "elastic", "fast_memory": 0.5, "draft_length": 3},
        {"mode": "elastic", "fast_memory": 0.6, "draft_length": 4, "batch": 3},
    ):
        results, statistics = harness.greedy(case.reader, float_backend, prompts, GENERATED, **options)
        assert [result.tokens for result in results] == expected, options
        if options["mode"] == "elastic":
            assert statistics.accepted > 0
            print(f"\n{case.recipe.name}: {options}: {statistics.accepted} of {statistics.drafted} drafts accepted", end="")


def test_converts_what_transformers_saves(tmp_path: Path) -> None:
    """A model that transformers saved again gives the same store."""
    reader = harness.convert_recipe(recipe("gqa_tied"), tmp_path)
    model = reference.load(tmp_path / "checkpoint", torch.float32)
    model.save_pretrained(tmp_path / "saved")
    write_tokenizer(tmp_path / "saved")
    saved = harness.convert(tmp_path / "saved", tmp_path / "again")
    assert saved.spec == reader.spec
    assert harness.weights_digest(saved) == harness.weights_digest(reader)


@dataclass(frozen=True)
class Demo:
    folder: Path
    text: str
    windows: np.ndarray
    model: Model

    def perplexity(self, logits: Callable[[np.ndarray], np.ndarray], windows: int = WINDOWS) -> float:
        """Of the first windows, each computed afresh from its first token."""
        used = self.windows[:windows]
        return float(np.exp(sum(harness.cross_entropy(logits(w[:-1]), w[1:]) for w in used) / (len(used) * (WINDOW - 1))))

    def target(self, ids: np.ndarray) -> np.ndarray:
        return harness.decoder_logits(self.model.reader, self.model.backend, ids, 128)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    place = os.environ.get("ELMOE_DEMO_CHECKPOINT")
    if not place:
        pytest.skip("ELMOE_DEMO_CHECKPOINT names no checkpoint")
    folder = Path(place)
    store = harness.demo_path(folder, tmp_path_factory.mktemp("demo"))
    text = (folder / "heldout.txt").read_text(encoding="utf-8")
    with load(store, backend="native" if harness.native_kernels() else "reference") as model:
        ids = np.array(model.encode(text), np.int32)
        yield Demo(folder, text, ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW), model)


def test_demo_perplexity(demo: Demo) -> None:
    """W8A8 changes the perplexity of the bf16 checkpoint in transformers by less than 0.5 %."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = reference.load(demo.folder, dtype)
        found[f"transformers, {dtype}"] = demo.perplexity(lambda ids, model=model: reference.logits(model, ids))
    bf16, float32 = found.values()
    target = found[f"W8A8, {demo.model.backend.__name__}"] = demo.perplexity(demo.target)
    for name, value in found.items():
        print(
            f"\n{name}: perplexity {value:.4f}, {value / bf16 - 1:+.3%} of bf16, {value / float32 - 1:+.3%} of float32",
            end="",
        )
    assert abs(target / bf16 - 1) < 0.005
    assert abs(target / float32 - 1) < 0.005


def test_evaluate_agrees(demo: Demo) -> None:
    """``elmoe eval`` reports the perplexity that this file computes from the logits."""
    assert evaluate(demo.model, demo.text, WINDOW, 2).target == pytest.approx(demo.perplexity(demo.target, 2), rel=1e-6)
