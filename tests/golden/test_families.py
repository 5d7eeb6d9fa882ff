"""Frozen results of transformers for every family: logits and greedy tokens of tiny checkpoints. Needs no torch.

``tools/golden/make_families.py`` regenerates the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from elmoe import bitslice
from tests.family_configs import CONFIGS
from tests.parity import float_backend, harness
from tests.parity.bounds import FAMILY_BOUND
from tests.parity.family_checkpoints import GENERATED, POSITIONS, PROMPT, convert, digest, token_ids


@dataclass(frozen=True)
class Golden:
    reader: Any
    logits: np.ndarray
    generated: tuple[int, ...]


@pytest.fixture(scope="module")
def file() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "families.npz") as data:
        return {key: data[key] for key in data.files}


@pytest.fixture(scope="module", params=CONFIGS)
def golden(request: pytest.FixtureRequest, file, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Golden]:
    name = request.param
    assert digest(name) == file[f"{name}.checkpoint"].item(), "the checkpoint generator changed: regenerate the file"
    with convert(name, tmp_path_factory.mktemp(name)) as reader:
        yield Golden(reader, file[f"{name}.logits"], tuple(file[f"{name}.generated"].tolist()))


def test_float_backend(golden: Golden) -> None:
    found = harness.decoder_logits(golden.reader, float_backend, token_ids(), 50)[list(POSITIONS)]
    assert harness.relative_error(found, golden.logits) < FAMILY_BOUND


def test_w8a8(golden: Golden) -> None:
    """INT8 activations stay near in most positions, and native kernels have bitslice's bits."""
    found = harness.decoder_logits(golden.reader, bitslice, token_ids()[: POSITIONS[-1] + 1], 50)
    errors = harness.position_errors(found[list(POSITIONS)], golden.logits)
    assert np.median(errors) < 0.1
    kernels = harness.native_kernels()
    if kernels is not None:
        assert np.array_equal(harness.decoder_logits(golden.reader, kernels, token_ids(), 33), found)


def test_greedy_tokens(golden: Golden) -> None:
    options = {"fast_memory": 0.5, "draft_length": 3} if golden.reader.spec.moe_layers else {}
    results, _ = harness.greedy(golden.reader, float_backend, [token_ids()[:PROMPT]], GENERATED, **options)
    assert results[0].tokens == golden.generated
