"""Freeze transformers' logits and tokens of every family: ``python -m tools.golden.make_families`` writes
``tests/golden/families.npz``. What the file has of the same weights stays as it is. Needs the parity extra."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from tests.family_configs import CONFIGS
from tests.parity import harness
from tests.parity.family_checkpoints import GENERATED, POSITIONS, PROMPT, convert, digest, token_ids
from tests.parity.tiny_checkpoints import write_folder
from tests.parity.transformers_reference import greedy, logits

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden" / "families.npz"


def frozen(name: str) -> dict[str, np.ndarray]:
    """What is kept of one configuration."""
    ids = token_ids()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        with convert(name, folder) as reader:
            values = harness.dequantized_tensors(reader)
        write_folder(folder / "dequantized", CONFIGS[name] | {"dtype": "float32"}, values, "float32")
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "dequantized", dtype=torch.float64, attn_implementation="eager", experts_implementation="eager",
            output_loading_info=True,
        )  # fmt: skip
        assert not any(info.values()), info
        return {
            "checkpoint": np.array(digest(name)),
            "logits": logits(model.eval(), ids)[list(POSITIONS)].astype(np.float32),
            "generated": np.array(greedy(model, ids[:PROMPT], GENERATED), np.int32),
        }


def kept(name: str) -> dict[str, np.ndarray] | None:
    """What the file has of a configuration; None where that is nothing, or of other weights."""
    with np.load(FILE) as data:
        if f"{name}.checkpoint" not in data or data[f"{name}.checkpoint"].item() != digest(name):
            return None
        return {key: data[f"{name}.{key}"] for key in ("checkpoint", "logits", "generated")}


if __name__ == "__main__":
    found = {name: kept(name) or frozen(name) for name in CONFIGS}
    np.savez_compressed(FILE, **{f"{name}.{key}": value for name in CONFIGS for key, value in found[name].items()})
