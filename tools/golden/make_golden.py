"""Regenerate tests/golden: transformers' logits and tokens of tiny checkpoints, and the demo model's bits.

Needs the parity extra: ``.venv/bin/python -m tools.golden.make_golden``. Look at ``git diff --stat`` afterwards: a changed
file means changed numerics, and that needs a reason in the commit. ``--measure`` prints the table of
tests/parity/bounds.py instead; ``--demo`` writes demo.json only and needs no torch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from tests.parity import float_backend, harness
from tests.parity.tiny_checkpoints import (
    RECIPES,
    Recipe,
    config,
    digest,
    recipe,
    token_sequence,
    write_folder,
)

from elmoe import bitslice

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden"
TINY = ("gqa_tied", "mha_odd_widths", "dense_layers_bf16", "sparse_step_shards")
DEMO = (
    ("greedy", "It is a truth universally acknowledged, that", {}),
    ("sampled", "The whale", {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "seed": 7}),
)


def measure() -> None:
    """Print bounds.MEASURED; the float backend stands in for transformers, which it equals to 1e-6."""
    for each in RECIPES:
        with tempfile.TemporaryDirectory() as folder:
            reader = harness.convert_recipe(each, Path(folder))
            ids = token_sequence(each)
            exact = harness.decoder_logits(reader, float_backend, ids)
            w8a8 = harness.decoder_logits(reader, bitslice, ids)
            found = harness.measure(w8a8, exact, harness.int8_float_logits(reader, ids))
            reader.close()
        print(f'    "{each.name}": Measured({found.maximum:.3f}, {found.rms:.3f}, {found.median:.3f}, {found.agreeing}),')


def make_tiny(each: Recipe) -> None:
    """One checkpoint's npz."""
    from tests.parity import transformers_reference as reference

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reader = harness.convert_recipe(each, folder)
        values = harness.dequantized_tensors(reader)
        weights = harness.weights_digest(reader)
        reader.close()
        write_folder(folder / "dequantized", config(each, "float32"), values, "float32")
        model = reference.load(folder / "dequantized")
        ids = token_sequence(each)
        np.savez_compressed(
            GOLDEN / f"{each.name}.npz",
            checkpoint=np.array(digest(each)),
            weights=np.array(weights),
            ids=ids,
            logits=reference.logits(model, ids).astype(np.float32),
            generated=np.array(reference.greedy(model, ids[:12], 40), np.int32),
        )


def make_demo() -> None:
    """demo.json; float64 survives JSON exactly."""
    backend = harness.native_kernels() or bitslice
    cases = []
    for name, prompt, sampling in DEMO:
        result = harness.demo_result(prompt, sampling, 32, backend, mode="plain")
        cases.append({"name": name, "prompt": prompt, "sampling": sampling, "count": 32, "result": result})
    (GOLDEN / "demo.json").write_text(json.dumps(cases, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--demo", action="store_true")
    arguments = parser.parse_args()
    if arguments.measure:
        measure()
    else:
        if not arguments.demo:
            for tiny in TINY:
                make_tiny(recipe(tiny))
        make_demo()
