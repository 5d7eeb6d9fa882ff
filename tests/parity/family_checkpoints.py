"""Checkpoints of the configurations of ``tests/family_configs.py``, written without torch: the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.checkpoints import checkpoint_shapes
from tests.family_configs import CONFIGS
from tests.parity import harness
from tests.parity.tiny_checkpoints import random_tensor, write_folder

POSITIONS = (0, 20, 45, 63, 64, 99)
"""Whose logits are frozen, of 100 tokens."""
PROMPT, GENERATED = 50, 24


def tensors(name: str) -> dict[str, NDArray[np.float32]]:
    """Weights whose attention is peaked, whose norms are not all one and whose biases are not zero."""
    found = {}
    for tensor, shape in checkpoint_shapes(CONFIGS[name]).items():
        if tensor.endswith("norm.weight"):
            deviation, mean = 0.2, 1.0
        elif tensor.rpartition(".")[2] in ("bias", "sinks") or tensor.endswith("_bias"):
            deviation, mean = 0.3, 0.0
        elif len(shape) == 3:  # experts, transposed
            deviation, mean = float(np.sqrt(1 / shape[1])), 0.0
        else:
            deviation, mean = float(np.sqrt((9 if "embed" in tensor or "lm_head" in tensor else 1) / shape[-1])), 0.0
        found[tensor] = random_tensor(11, f"{name} {tensor}", shape, deviation, mean)
    return found


def digest(name: str) -> str:
    """A hash of a configuration and its weights, to tell a changed generator from a changed engine."""
    state = hashlib.blake2b(json.dumps(CONFIGS[name], sort_keys=True).encode(), digest_size=16)
    for tensor, values in tensors(name).items():
        state.update(tensor.encode() + np.ascontiguousarray(values, "<f4").tobytes())
    return state.hexdigest()


def convert(name: str, folder: Path) -> Any:
    """An open store of a configuration's checkpoint."""
    write_folder(folder / "source", CONFIGS[name], tensors(name), "float32")
    return harness.convert(folder / "source", folder / "store")


def token_ids() -> NDArray[np.int32]:
    """The 100 tokens."""
    uniform = random_tensor(3, "tokens of families", (100,), 1000.0)
    return (1 + np.abs(uniform).astype(np.int64) % 299).astype(np.int32)
