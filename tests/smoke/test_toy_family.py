"""A family of models is one file: tests/toy_family.py, through conversion, engine, synthetic stores and the simulator."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from elmoe import bitslice, kernels, models
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.engine.engine import Engine, EngineOptions
from elmoe.engine.request import Request
from elmoe.models import spec_of_config
from elmoe.schema.hardware import load_hardware
from elmoe.sim.grid import Grid, run_grid
from elmoe.store import open_store
from elmoe.store.synthetic import synthesize
from tests import toy_family
from tests.checkpoints import write_checkpoint

REQUESTS = [Request((5, 6, 7), 8), Request((9, 3), 5)]


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(models.FAMILIES, "toy", toy_family.FAMILY)


def test_the_family_is_one_small_file():
    assert len(Path(toy_family.__file__).read_text(encoding="utf-8").splitlines()) < 80


def test_a_checkpoint_is_converted_and_decoded(tmp_path):
    source = write_checkpoint(tmp_path / "source", toy_family.CONFIG)
    convert_checkpoint(source, tmp_path / "store")
    outputs = []
    with open_store(tmp_path / "store") as reader:
        assert reader.spec == spec_of_config(toy_family.CONFIG) and reader.spec.dense_layers == (0,)
        for backend in (bitslice, kernels):
            for mode in ("plain", "elastic"):
                engine = Engine(reader, backend, EngineOptions(mode=mode, batch=2, fast_memory=0.5))
                outputs.append(engine.generate(REQUESTS)[0])
    assert all(output == outputs[0] for output in outputs)


def test_its_gguf_gives_the_same_store(tmp_path):
    convert_checkpoint(write_checkpoint(tmp_path / "source", toy_family.CONFIG), tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        export_store(reader, tmp_path / "toy.gguf")
    convert_checkpoint(tmp_path / "toy.gguf", tmp_path / "back")
    for name in ("dense.bin", "layer-001.experts"):
        assert (tmp_path / "store" / name).read_bytes() == (tmp_path / "back" / name).read_bytes()


def test_a_synthetic_store_decodes(tmp_path):
    synthesize(tmp_path / "store", spec_of_config(toy_family.CONFIG))
    with open_store(tmp_path / "store") as reader:
        results, _ = Engine(reader, kernels, EngineOptions(mode="plain")).generate(REQUESTS)
    assert all(np.isfinite(result.logprobs).all() for result in results)


def test_the_simulator_prices_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(toy_family.CONFIG))
    (row,) = run_grid(Grid((load_hardware("xpu"),), (str(tmp_path),), ("mt_bench",), (1,), ("ar",)), workers=1)
    assert row["model"] == tmp_path.name and row["tokens_per_second"] > 0


def test_the_configuration_is_written_as_it_is_read(tmp_path):
    assert spec_of_config(json.loads(json.dumps(toy_family.CONFIG))) == spec_of_config(toy_family.CONFIG)
