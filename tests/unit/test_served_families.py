"""Every family that the engine runs: the same text on both backends, readers and in every mode, and GGUF files and back."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import SamplingParameters
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.gguf_file import GgufFile
from elmoe.convert.source import open_source
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import ConvertError
from elmoe.models import spec_of_config
from elmoe.schema.hardware import load_hardware
from elmoe.sim.grid import Grid, run_grid
from elmoe.sim.recorded import Counts, predict
from elmoe.store import open_direct, open_store
from elmoe.trace import TraceRecorder, read_trace
from tests.checkpoints import random_weights, write_checkpoint
from tests.family_configs import CONFIGS
from tests.unit.test_dense import rewritten

REQUESTS = [
    Request((5, 6, 7), 10),
    Request(tuple(range(1, 140)), 12, ignore_eos=True),
    Request((9,), 8, SamplingParameters(temperature=0.8, seed=3)),
]
WAYS = (
    {"mode": "plain", "batch": 3},
    {"mode": "elastic", "fast_memory": 0.4, "draft_length": 3, "batch": 2, "prefill_chunk": 7},
)
NOT_IN_GGUF = {
    "qwen2_yarn": "YaRN|rope scaling",
    "olmoe": "4 heads of queries share 2",
    "olmoe_normalized": "norm_topk_prob is true",
    "qwen2_moe_dense_layers": "the layers differ",
    "qwen2_windows": "the layers differ",
    "dots1_windows": "4 heads of queries share 2",
    "gpt_oss_options": "not every second layer",
    "qwen2_moe_windows": "the layers differ",
    "mixtral_window": "a window of 70 positions",
    "deepseek_v2_groups": "group_limited_greedy",
    "deepseek_v3_halves": "pairs halves",
    "glm4_moe_lite_options": "the rope scaling is llama3",
}
"""What GGUF's architectures cannot say."""


def store(folder, name):
    convert_checkpoint(write_checkpoint(folder / "source", CONFIGS[name]), folder / "store")
    return folder / "store"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_way_to_serve_gives_the_same_text(tmp_path, name):
    path, outputs = store(tmp_path, name), []
    sparse = bool(spec_of_config(CONFIGS[name]).moe_layers)
    for reader in (open_store(path), open_direct(path)):
        with reader:
            for backend in (bitslice, kernels):
                if reader.kind == "direct" and backend is bitslice:
                    continue
                for way in WAYS if sparse else [{"mode": "plain", "batch": 3}, {"prefill_chunk": 7}]:
                    engine = Engine(reader, backend, EngineOptions(keep_kv_digest=True, **way))
                    outputs.append(engine.generate(REQUESTS)[0])
                    assert engine.statistics.draft_slow_reads == 0
    assert all(output == outputs[0] for output in outputs)
    assert all(result.kv_digest for result in outputs[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_gguf_and_back(tmp_path, name):
    path = store(tmp_path, name)
    with open_store(path) as reader:
        if name in NOT_IN_GGUF:
            with pytest.raises(ConvertError, match=NOT_IN_GGUF[name]):
                export_store(reader, tmp_path / "model.gguf")
            return
        export_store(reader, tmp_path / "model.gguf")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "back")
    for file in path.iterdir():
        if file.suffix in (".bin", ".experts"):
            assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes(), file.name
    with open_store(path) as one, open_store(tmp_path / "back") as other:
        assert one.spec == other.spec


@pytest.mark.parametrize("name", ["glm4_moe", "dots1", "deepseek_v3"])
def test_groups_of_a_gguf_file_are_those_that_llama_cpp_takes(tmp_path, name):
    """One or none whatever is kept of them, all kept as one; of several it must say how many are kept."""
    config = CONFIGS[name] | {"n_group": 2, "topk_group": 2, "rope_scaling": None}
    convert_checkpoint(write_checkpoint(tmp_path / "source", config), tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        export_store(reader, tmp_path / "model.gguf")
    written = GgufFile(tmp_path / "model.gguf").metadata
    count, kept = (f"{written['general.architecture']}.expert_group_{what}" for what in ("count", "used_count"))
    assert written[count] == written[kept] == 1
    for values in ((0, 0), (1, 0), (1, 4), (4, 2)):
        other = rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", tuple(zip((count, kept), values, strict=True)))
        router = open_source(other).spec.moe(2).router
        assert (router.groups, router.kept_groups) == (values if values[0] > 1 else (1, 1))
    rewritten(tmp_path / "model.gguf", tmp_path / "other.gguf", ((count, 4),), without=(kept,))
    with pytest.raises(ConvertError, match=r"expert_group_used_count' is missing"):
        open_source(tmp_path / "other.gguf")


@pytest.mark.parametrize("name", ["gpt_oss", "qwen2_moe_windows", "olmoe", "deepseek_v2_groups", "deepseek_v3"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_simulator_predicts_hits_and_bytes(tmp_path, name, share):
    """Each kind of attention and of experts: exactly, from a recorded run."""
    options = EngineOptions(mode="elastic", fast_memory=share, batch=2, draft_length=3, all_ranks=True)
    with open_store(store(tmp_path, name)) as reader:
        engine = Engine(reader, kernels, options)
        with TraceRecorder(tmp_path / "run.trace", reader.spec, {}, all_ranks=True) as recorder:
            _, statistics = engine.generate(REQUESTS, recorder=recorder)
        sizes = engine.fitting.sizes(REQUESTS)
        predicted = predict(read_trace(tmp_path / "run.trace"), engine.fitting.slots(sizes), sizes, options.residency).phases
    for phase, counters in statistics.phases.items():
        mine = predicted.get(phase, Counts())
        for count in ("tokens", "msb_hits", "msb_misses", "lsb_hits", "lsb_misses", "fast_bytes", "slow_bytes"):
            assert getattr(mine, count) == getattr(counters, count), (phase, count)
    row = run_grid(Grid((load_hardware("xpu"),), (str(tmp_path / "store"),), ("mt_bench",), (1,), ("ar",)), workers=1)[0]
    assert row["tokens_per_second"] > 0


@pytest.mark.parametrize("name", ["glm4_moe", "glm4_moe_lite"])
def test_layers_that_predict_further_tokens_are_named_as_left_out(tmp_path, name):
    config = CONFIGS[name] | {"num_nextn_predict_layers": 1}
    further = {"model.layers.3.eh_proj.weight": np.zeros((64, 128), np.float32)}
    folder = write_checkpoint(tmp_path / "source", config, random_weights(config) | further)
    source = open_source(folder)
    source.check()
    assert source.left_out == ("model.layers.3.eh_proj.weight",)
    other = write_checkpoint(tmp_path / "other", CONFIGS[name], random_weights(config) | further)
    with pytest.raises(ConvertError, match=r"does not have: 'model\.layers\.3\.eh_proj\.weight'"):
        open_source(other).check()


@pytest.mark.parametrize(("name", "kind"), [("glm4_moe", "glm4moe"), ("glm4_moe_lite", "deepseek2")])
def test_layers_that_predict_further_tokens_are_left_out_of_gguf_files_too(tmp_path, name, kind):
    path = store(tmp_path, name)
    with open_store(path) as reader:
        export_store(reader, tmp_path / "model.gguf")
    extra = [("blk.3.nextn.eh_proj.weight", np.zeros((64, 128), np.float32))]
    metadata = [(f"{kind}.block_count", 4), (f"{kind}.nextn_predict_layers", 1)]
    source = open_source(rewritten(tmp_path / "model.gguf", tmp_path / "more.gguf", metadata, extra))
    source.check()
    assert source.left_out == ("blk.3.nextn.eh_proj.weight",) and len(source.spec.layers) == 3
    for wrong in (4, 1 << 20):
        metadata[1] = (f"{kind}.nextn_predict_layers", wrong)
        with pytest.raises(ConvertError, match=f"nextn_predict_layers' is {wrong}"):
            open_source(rewritten(tmp_path / "model.gguf", tmp_path / f"{wrong}.gguf", metadata, extra))
