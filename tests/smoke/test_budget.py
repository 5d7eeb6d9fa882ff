"""The fast-memory budget is a promise: a store larger than it is served within it, and not by the page cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elmoe.store.synthetic import synthesize
from tests.tiny import tiny_spec

BUDGET, SLACK = 160 << 20, 300 << 20
SPEC = tiny_spec(
    vocabulary=512, hidden=1024, layers=6, heads=8, kv_heads=8, head_dim=128, experts=32, top_k=4, expert_width=1024,
    max_positions=4096, tied_embeddings=False,
)  # fmt: skip
PROGRAM = """
import json, sys
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.llm import load
from elmoe.store import peak_memory
options = EngineOptions(sys.argv[2], int(sys.argv[3]), batch=4, staging_experts=8)
with load(sys.argv[1], options) as model:
    prompts = [tuple((7 * i + at) % 512 for at in range(300)) for i in range(4)]  # more than the largest chunk together
    requests = [Request(prompt, 12) for prompt in prompts]
    results, statistics = model.engine.generate(requests)
    print(json.dumps({"peak": peak_memory(), "tier": model.tier, "read": statistics.read_bytes}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("budget") / "store"
    synthesize(path, SPEC, 1, lambda done, total: None)
    return path


@pytest.mark.parametrize("mode", ["plain", pytest.param("cache", marks=pytest.mark.full), "elastic"])
def test_peak_memory_stays_within_the_budget_and_300_megabytes(store, mode):
    size = sum(file.stat().st_size for file in store.iterdir())
    assert size > BUDGET + SLACK  # the store mapped into memory would not pass
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(store), mode, str(BUDGET)], capture_output=True, text=True, check=True
    )
    data = json.loads(run.stdout)
    assert data["tier"].startswith("enforced budget")
    assert data["peak"] <= BUDGET + SLACK
    assert data["read"] > size / 2  # a prompt touches most experts, and all of them came from disk
