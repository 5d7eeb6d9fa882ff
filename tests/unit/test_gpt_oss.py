"""GPT-OSS's checkpoints in MXFP4: values by an independent reading, GGUF twins, what is refused."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from elmoe.bitslice.moe import expert_matrices
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.losses import FormatChoice
from elmoe.errors import ConvertError, ModelError, NumericsError
from elmoe.models import spec_of_config
from elmoe.models.support import check_supported
from elmoe.store import open_store
from tests.checkpoints import random_weights, write_tokenizer
from tests.family_configs import CONFIGS

CONFIG = CONFIGS["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
EXPERTS, HIDDEN, WIDTH = CONFIG["num_local_experts"], CONFIG["hidden_size"], CONFIG["intermediate_size"]
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""Of the codes of e2m1."""


def packed_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """All tensors, experts as random blocks and scales."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, values in random_weights(CONFIG).items():
        if not name.endswith(("gate_up_proj", "down_proj")) or ".experts." not in name:
            found[name] = values
            continue
        experts, columns, rows = values.shape
        found[name + "_blocks"] = rng.integers(0, 256, (experts, rows, columns // 32, 16), dtype=np.uint8)
        found[name + "_scales"] = rng.integers(118, 124, (experts, rows, columns // 32), dtype=np.uint8)
    return found


def write_packed(folder, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    write_tokenizer(folder / "tokenizer.json")
    header, data = {}, b""
    for name, values in tensors.items():
        blob = np.ascontiguousarray(values).tobytes()
        kind = {"uint8": "U8", "float32": "F32"}[str(values.dtype)]
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [len(data), len(data) + len(blob)]}
        data += blob
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return folder


def values_of(blocks, scales):
    """(rows, columns) of one expert: byte by byte the lower code, then the upper one."""
    pairs = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1).reshape(*scales.shape, 32)
    return (pairs * 2.0 ** (scales.astype(float)[..., None] - 127)).reshape(len(scales), -1)


def test_experts_keep_their_values(tmp_path):
    tensors, lines = packed_tensors(), []
    convert_checkpoint(write_packed(tmp_path / "source", tensors), tmp_path / "store", told=lines.extend)
    assert any(line.startswith("MXFP4 -> table4_mx: exact") for line in lines)
    with open_store(tmp_path / "store") as reader:
        assert reader.formats["layers.3.experts"] == "table4_mx"
        for layer in (0, 3):
            prefix = f"model.layers.{layer}.mlp.experts."
            layout, addresses = reader.expert_layout(layer), reader.expert_addresses(layer)
            for expert in range(EXPERTS):
                found = expert_matrices(layout, addresses, expert, False)
                fused, down = (
                    values_of(tensors[f"{prefix}{name}_blocks"][expert], tensors[f"{prefix}{name}_scales"][expert])
                    for name in ("gate_up_proj", "down_proj")
                )
                assert np.array_equal(found["gate"].dequantize(), fused[::2])
                assert np.array_equal(found["up"].dequantize(), fused[1::2])
                assert np.array_equal(found["down"].dequantize(), down)
            bias = tensors[f"{prefix}gate_up_proj_bias"]
            assert np.array_equal(reader.array(f"layers.{layer}.expert_gate_bias"), bias[:, ::2])
            assert np.array_equal(reader.array(f"layers.{layer}.expert_up_bias"), bias[:, 1::2])
        export_store(reader, tmp_path / "model.gguf")
    convert_checkpoint(tmp_path / "model.gguf", tmp_path / "twin")
    for file in (tmp_path / "store").glob("layer-*.experts"):
        assert file.read_bytes() == (tmp_path / "twin" / file.name).read_bytes()


def test_another_format_can_be_asked_for(tmp_path):
    lines = []
    convert_checkpoint(
        write_packed(tmp_path / "source", packed_tensors()), tmp_path / "store", choice=FormatChoice.parse(["nested8"]),
        told=lines.extend,
    )  # fmt: skip
    assert any(line.startswith("MXFP4 -> nested8: ") and "dB" in line for line in lines)


def changed(name, change):
    tensors = packed_tensors()
    tensors[name] = change(tensors[name])
    return {key: value for key, value in tensors.items() if value is not None}


GATE = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        (GATE + "_scales", lambda x: np.full_like(x, 255), "E8M0 scale of 255"),
        (GATE + "_scales", lambda x: x[:, 1:], r"gate_up_proj_scales' has shape \[6, 63, 2\], the config says \[6, 64, 2\]"),
        (GATE + "_scales", lambda x: None, r"gate_up_proj_scales' is missing"),
        (GATE + "_blocks", lambda x: x.astype(np.float32), r"gate_up_proj_blocks' has dtype F32"),
        (GATE + "_bias", lambda x: x[:, ::2], r"gate_up_proj_bias' has shape \[6, 32\], the config says \[6, 64\]"),
        ("model.layers.0.self_attn.sinks", lambda x: None, r"self_attn\.sinks' is missing"),
        ("model.layers.0.mlp.router.weight", lambda x: x.astype(np.uint8), "has dtype U8"),
    ],
)
def test_damaged_tensors_are_named(tmp_path, name, change, named):
    with pytest.raises((ConvertError, NumericsError), match=named):
        convert_checkpoint(write_packed(tmp_path / "source", changed(name, change)), tmp_path / "store")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'"),
        ({"head_dim": 24}, "'head_dim' 24"),
    ],
)
def test_options_that_are_not_computed_are_refused_by_name(changes, named):
    with pytest.raises(ModelError, match=named):
        check_supported(spec_of_config(CONFIG | changes))
