"""Every family that the engine runs: the same text on both backends, readers and in every mode, and GGUF files and back."""

from __future__ import annotations

import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import SamplingParameters
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.errors import ConvertError
from elmoe.models import spec_of_config
from elmoe.store import open_direct, open_store
from tests.checkpoints import write_checkpoint
from tests.family_configs import CONFIGS

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
    "olmoe_normalized": "norm_topk_prob is true",
    "qwen2_moe_dense_layers": "the layers differ",
    "qwen2_windows": "the layers differ",
    "gpt_oss_options": "not every second layer",
    "qwen2_moe_windows": "the layers differ",
    "mixtral_window": "a window of 70 positions",
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
