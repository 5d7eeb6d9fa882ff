"""GGUF's quantised types: exact in the formats of a store, there and back, and what happens to all others."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as TensorType

from elmoe.bitslice import format_of, quantized
from elmoe.bitslice.formats import concatenated
from elmoe.convert import convert_checkpoint, gguf_import
from elmoe.convert.checkpoint import E4M3
from elmoe.convert.gguf_blocks import EXACT, FLOATS, SUPPORTED, dequantized, nearest_format, read_blocks
from elmoe.convert.gguf_writing import tensor_bytes, write_blocks
from elmoe.convert.losses import FormatChoice
from elmoe.errors import ConvertError, NumericsError
from elmoe.models.formats import FORMATS
from elmoe.models.load import load_model
from elmoe.store import open_store
from tests.checkpoints import random_weights, tiny_config, write_checkpoint
from tests.unit.test_gguf import export, gguf_shapes, tensors, wide_config, write_gguf

HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
          "Q5_0": (0,), "Q5_1": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "IQ2_XXS": (0,), "IQ3_S": (0,),
          "TQ2_0": (64,)}  # fmt: skip
"""Where a block has its fp16 scales."""
WIDE = {"hidden_size": 256, "moe_intermediate_size": 256, "intermediate_size": 256, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 16}  # fmt: skip
"""Columns of all matrices are multiples of 256."""
WIDE_METADATA = {"embedding_length": 256, "expert_feed_forward_length": 256, "feed_forward_length": 256,
                 "attention.head_count": 16, "attention.head_count_kv": 16, "attention.key_length": 16,
                 "attention.value_length": 16}  # fmt: skip


def random_rows(kind: TensorType, rows: int, columns: int, seed: int = 0, largest: float = 0.0) -> np.ndarray:
    """Random bytes: all codes and sub-scales; scales of any finite size, 0, negative, subnormal, unless ``largest``."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.frombuffer(rng.bytes(rows * columns // block * size), np.uint8).copy().reshape(rows, -1, size)
    for at in HALVES.get(kind.name, ()):
        shape = raw.shape[:2]
        if largest:
            halves = (rng.uniform(0.2, 1, shape) * largest).astype(np.float16)
        else:
            halves = rng.integers(0, 1 << 16, shape).astype(np.uint16).view(np.float16)
            odd = np.array([0, -0.0, 6e-8, -6e-8, 65504, -65504, 1], np.float16)
            halves = np.where(np.isfinite(halves), halves, odd[rng.integers(0, len(odd), shape)])
            halves[rng.random(shape) < 0.2] = odd[rng.integers(0, len(odd))]
        raw[:, :, at : at + 2] = halves[:, :, None].view(np.uint8)
    if kind == TensorType.MXFP4:
        raw[:, :, 0] = rng.integers(118, 124, raw.shape[:2]) if largest else rng.integers(0, 255, raw.shape[:2])
    return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", list(EXACT), ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows,columns", [(1, 256), (16, 512), (37, 768)])
def test_values_and_bytes_are_those_of_the_file(kind, rows, columns):
    for seed in range(8):
        raw = random_rows(kind, rows, columns, seed)
        with np.errstate(over="ignore"):
            expected = gguf.quants.dequantize(raw, kind)
        matrix = read_blocks(kind, raw, columns, "w")
        assert format_of(matrix).name == EXACT[kind] and expected.dtype == np.float32
        assert np.array_equal(matrix.dequantize(), expected)
        assert np.array_equal(write_blocks(matrix, 0, rows, "w"), raw)
        if rows > 16:
            assert np.array_equal(write_blocks(matrix, 16, rows, "w"), raw[16:])


@pytest.mark.parametrize("kind", list(EXACT), ids=lambda kind: kind.name)
def test_what_llama_cpp_quantised_has_its_values(kind):
    """Blocks by llama-quantize, and float32 values by llama.cpp's own code (tools/golden/make_llama_cpp_blocks.py)."""
    frozen = np.load(Path(__file__).parents[1] / "golden" / "llama_cpp_blocks.npz")
    raw, values = frozen[f"{kind.name} blocks"], frozen[f"{kind.name} values"]
    matrix = read_blocks(kind, raw, values.shape[1], "w")
    assert np.array_equal(matrix.dequantize(), values) and np.unique(values).size > 50
    assert np.array_equal(write_blocks(matrix, 0, len(raw), "w"), raw)


@pytest.mark.parametrize("kind", list(EXACT), ids=lambda kind: kind.name)
def test_all_codes_with_extreme_scales(kind):
    """Every byte in every place beside scales of 0, the least, the largest and negative ones."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    for byte in range(256):
        raw = np.full((5, size), byte, np.uint8)
        for at in HALVES.get(kind.name, ()):
            raw[:, at : at + 2] = np.array([0, 6e-8, -6e-8, 65504, -65504], np.float16)[:, None].view(np.uint8)
        if kind == TensorType.MXFP4:
            raw[:, 0] = (0, 1, 2, 127, 254)
        matrix = read_blocks(kind, raw, gguf.GGML_QUANT_SIZES[kind][0], "w")
        with np.errstate(over="ignore"):
            assert np.array_equal(matrix.dequantize(), gguf.quants.dequantize(raw, kind))
        assert np.array_equal(write_blocks(matrix, 0, 5, "w"), raw)


@pytest.mark.parametrize("kind", list(EXACT), ids=lambda kind: kind.name)
def test_scales_that_are_no_numbers_are_refused(kind):
    raw = random_rows(kind, 4, 256)
    if kind == TensorType.MXFP4:
        raw[2, 17 * 3] = 255
    else:
        raw[2, HALVES[kind.name][0] : HALVES[kind.name][0] + 2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    with pytest.raises(NumericsError, match=r"'blk\.0\.w'.*(NaN|255)"):
        read_blocks(kind, raw, 256, "blk.0.w")


def test_every_other_type_has_a_nearest_format():
    expected = {"Q5_0": "nested8", "Q5_K": "nested8", "Q2_K": "affine4_k", "Q3_K": "affine4_k", "IQ2_XXS": "affine4_k",
                "IQ3_S": "affine4_k", "TQ2_0": "affine4_k", "BF16": "nested8", "F32": "nested8"}  # fmt: skip
    assert {name: nearest_format(TensorType[name]) for name in expected} == expected
    for kind in SUPPORTED:
        if kind in EXACT or kind in FLOATS or kind.name not in HALVES:
            continue
        raw = random_rows(kind, 16, 512, largest=0.01)
        weights = dequantized(kind, raw, 512)
        matrix = quantized(FORMATS[nearest_format(kind)], weights)
        noise = ((matrix.dequantize() - weights) ** 2).sum() / (weights**2).sum()
        assert 10 * np.log10(noise) < (-40 if nearest_format(kind) == "nested8" else -17), kind.name


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_laid_one_below_the_other(name):
    weights = np.random.default_rng(0).standard_normal((75, 512)).astype(np.float32)
    for cuts in ((32, 75), (17, 20, 75)):
        parts = [quantized(FORMATS[name], weights[low:high]) for low, high in zip((0, *cuts), cuts, strict=False)]
        whole = concatenated(parts)
        assert np.array_equal(whole.dequantize(), quantized(FORMATS[name], weights).dequantize())


def test_what_a_type_cannot_hold_is_not_exported():
    with pytest.raises(ConvertError, match=r"'w' has 96 columns, Q4_K needs a multiple of 256"):
        tensor_bytes("w", (4, 96), TensorType.Q4_K)
    matrix = quantized(FORMATS["affine4_k"], np.ones((16, 256), np.float32))
    matrix.sections["steps"][0, 0, 0] = 64
    with pytest.raises(ConvertError, match="sub-scales"):
        write_blocks(matrix, 0, 16, "w")


def parts_of(kinds: dict[str, TensorType], default: TensorType, seed: int = 0) -> dict:
    """Tensors of a wide model; ``kinds``: types by a part of the name."""
    rng, parts = np.random.default_rng(seed), {}
    for name, (shape, plain) in gguf_shapes(wide_config(**WIDE)).items():
        if plain:
            parts[name] = TensorType.F32, rng.standard_normal(shape, np.float32)
            continue
        kind = next((kind for key, kind in kinds.items() if key in name), default)
        rows = int(np.prod(shape[:-1]))
        raw = random_rows(kind, rows, shape[-1], seed + len(parts), largest=2e-4)
        parts[name] = kind, raw.reshape(*shape[:-1], -1)
    return parts


def write_wide(path: Path, parts: dict) -> Path:
    return write_gguf(path, parts, metadata=WIDE_METADATA)


def as_stored(path: Path) -> dict[str, np.ndarray]:
    """Values of every tensor of a GGUF file as the package reads them."""
    return {
        one.name: gguf.quants.dequantize(one.data, one.tensor_type).reshape(one.shape[::-1])
        for one in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("kind", list(EXACT), ids=lambda kind: kind.name)
def test_a_file_of_one_type_goes_there_and_back(tmp_path, kind):
    first, lines = write_wide(tmp_path / "first.gguf", parts_of({}, kind)), []
    convert_checkpoint(first, tmp_path / "store", told=lines.extend)
    assert lines == [f"{kind.name} -> {EXACT[kind]}: exact ({lines[0].split('(')[1]}"]
    with open_store(tmp_path / "store") as reader:
        reader.verify()
        assert np.array_equal(reader.matrix("embedding").dequantize(), as_stored(first)["token_embd.weight"])
        layout = reader.expert_layout(0)
        assert len(next(reader.expert_records(0))) == FORMATS[EXACT[kind]].slices == (2 if layout.lsb_bytes else 1)
    model = load_model(tmp_path / "store")
    assert model.expert.expert_bits == FORMATS[EXACT[kind]].bits and model.head_precision.bits == model.expert.expert_bits
    assert tensors(export(tmp_path / "store", tmp_path / "second.gguf")) == tensors(first)


def test_a_mixed_file_keeps_each_tensor_and_tells_the_rest(tmp_path):
    """As Q4_K_M has it: value and down projections of some layers in Q6_K; and types that no format holds."""
    kinds = {"blk.0.attn_v": TensorType.Q6_K, "blk.0.ffn_down": TensorType.Q6_K, "attn_output": TensorType.Q5_K,
             "blk.1.ffn_up": TensorType.Q3_K, "output.weight": TensorType.Q6_K}  # fmt: skip
    first, lines = write_wide(tmp_path / "first.gguf", parts_of(kinds, TensorType.Q4_K)), []
    convert_checkpoint(first, tmp_path / "store", told=lines.extend)
    told = {line.split(":")[0]: line.split(": ")[1] for line in lines}
    assert list(told) == ["Q3_K -> affine4_k", "Q4_K -> affine4_k", "Q5_K -> nested8", "Q6_K -> planes6"]
    assert told["Q4_K -> affine4_k"].startswith("exact") and told["Q6_K -> planes6"].startswith("exact")
    assert float(told["Q5_K -> nested8"].split()[0]) > 40 and float(told["Q3_K -> affine4_k"].split()[0]) > 17
    values = as_stored(first)
    with open_store(tmp_path / "store") as reader:
        assert reader.formats["layers.0.experts"] == "affine4_k+affine4_k+planes6"
        assert reader.formats["layers.1.experts"] == "affine4_k"
        assert reader.formats["layers.0.query_key_value"] == "affine4_k+affine4_k+planes6"
        stacked = np.concatenate([values[f"blk.0.attn_{name}.weight"] for name in "qkv"])
        assert np.array_equal(reader.matrix("layers.0.query_key_value").dequantize(), stacked)
        layout = reader.expert_layout(0)
        for expert, records in enumerate(reader.expert_records(0)):
            for projection, matrix in layout.unpack(*records).items():
                assert np.array_equal(matrix.dequantize(), values[f"blk.0.ffn_{projection}_exps.weight"][expert])
        assert layout.lsb_bytes and not reader.expert_layout(1).lsb_bytes
    model = load_model(tmp_path / "store")
    assert model.layers[0].expert_bits == ((2 * 4.625 + 4.5625) / 3, 2 / 3) and model.layers[1].expert_bits == (4.625,)
    back = tensors(export(tmp_path / "store", tmp_path / "second.gguf"))
    same = [name for name, found in tensors(first).items() if back[name] == found]
    assert len(same) == len(back) - 2 - 3 + 1  # all but two outputs and one up projection of layer 1


@pytest.mark.parametrize(
    ("texts", "experts", "others"),
    [
        (["affine4"], "affine4_k", "affine4_k"), (["experts=table4"], "table4_nl", "nested8"),
        (["planes6", "experts=affine4_1"], "affine4_1", "planes6"), (["matrices=table4_mx"], "nested8", "table4_mx"),
        (["experts=affine4+affine4+planes6"], "affine4_k+affine4_k+planes6", "nested8"),
    ],
)  # fmt: skip
def test_formats_can_be_chosen(tmp_path, texts, experts, others):
    source, lines = write_checkpoint(tmp_path / "source", tiny_config(mlp_only_layers=[1])), []
    convert_checkpoint(source, tmp_path / "store", choice=FormatChoice.parse(texts), told=lines.extend)
    with open_store(tmp_path / "store") as reader:
        found = dict(reader.formats)
        assert found.pop("layers.0.experts") == experts
        assert {found[name] for name in ("embedding", "layers.0.query_key_value", "layers.1.dense_ffn")} == {others}
        reader.verify()
    assert {line.split(":")[0].split("-> ")[1] for line in lines} == {*experts.split("+"), others}
    assert all("dB" in line for line in lines)


def test_the_command_tells_formats_and_refuses_others(tmp_path):
    source = str(write_checkpoint(tmp_path / "source", tiny_config()))

    def convert(name: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "elmoe", "convert", source, str(tmp_path / name), *options]
        return subprocess.run(command, capture_output=True, text=True)

    done = convert("one", "--format", "experts=affine4", "--json")
    assert done.returncode == 0, done.stderr
    assert any("-> affine4_k:" in line for line in json.loads(done.stdout)["formats"])
    done = convert("two", "--format", "heads=affine4")
    assert done.returncode and "experts=..., matrices=..." in done.stderr and not (tmp_path / "two").exists()
    for text in ("nested9", "=", "experts="):
        with pytest.raises(ConvertError, match="no format"):
            FormatChoice.parse([text])
    for text, count in (("experts=affine4+affine4", 2), ("affine4+affine4+planes6", 3), ("matrices=table4+table4", 2)):
        with pytest.raises(ConvertError, match=f"gives {count} formats"):
            FormatChoice.parse([text])


def test_a_conversion_with_other_formats_begins_anew(tmp_path):
    source = write_checkpoint(tmp_path / "source", tiny_config())

    def stop(done: int, total: int) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "store", stop)
    convert_checkpoint(source, tmp_path / "store", choice=FormatChoice.parse(["affine4"]))
    with open_store(tmp_path / "store") as reader:
        assert set(reader.formats.values()) == {"float32", "affine4_k"}
        reader.verify()


def fp8_checkpoint(folder: Path, config: dict, weights: dict[str, np.ndarray], block: tuple[int, int]) -> dict:
    """A checkpoint whose matrices but router and embedding are FP8 with block scales; returns the values it means."""
    values, tensors_, means = E4M3.copy(), {}, dict(weights)
    values[np.isnan(values)] = np.inf
    order = np.argsort(np.where(np.isinf(values), 1e9, values), kind="stable")[:254]
    for name, full in weights.items():
        if full.ndim != 2 or "gate.weight" in name or "embed" in name:
            tensors_[name] = "F32", full
            continue
        grid = tuple(-(-side // one) for side, one in zip(full.shape, block, strict=True))
        scales = np.random.default_rng(len(name)).uniform(1e-3, 2e-3, grid).astype(np.float32)
        wide = np.repeat(np.repeat(scales, block[0], 0), block[1], 1)[: full.shape[0], : full.shape[1]]
        nearest = np.abs(full.reshape(-1, 1) / wide.reshape(-1, 1) - values[order]).argmin(axis=1)
        codes = order[nearest].astype(np.uint8).reshape(full.shape)
        tensors_[name], tensors_[name + "_scale_inv"] = ("F8_E4M3", codes), ("F32", scales)
        means[name] = E4M3[codes] * wide
    write_checkpoint(
        folder, config | {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}, weights
    )
    header, parts, end = {}, [], 0
    for name, (dtype, array) in tensors_.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        parts.append(array.tobytes())
        end += array.nbytes
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))
    return means


def test_fp8_with_block_scales_is_what_its_values_are(tmp_path):
    config = tiny_config()
    means = fp8_checkpoint(tmp_path / "fp8", config, random_weights(config), (16, 32))
    write_checkpoint(tmp_path / "plain", config, means)
    lines: list[str] = []
    convert_checkpoint(tmp_path / "fp8", tmp_path / "store", told=lines.extend)
    convert_checkpoint(tmp_path / "plain", tmp_path / "expected")
    for file in ("dense.bin", "layer-000.experts", "layer-001.experts"):
        assert (tmp_path / "store" / file).read_bytes() == (tmp_path / "expected" / file).read_bytes()
    assert any(line.startswith("F8_E4M3 -> nested8:") for line in lines)
    broken = tmp_path / "fp8" / "config.json"
    text = broken.read_text()
    for changes, message in (("[16, 16]", "scale_inv"), ("[0, 32]", "quantization_config"), ("null", "quantization_config")):
        broken.write_text(text.replace("[16, 32]", changes))
        assert changes in broken.read_text()
        with pytest.raises(ConvertError, match=message):
            convert_checkpoint(tmp_path / "fp8", tmp_path / "other")


def test_codes_of_fp8():
    assert E4M3[[0x00, 0x01, 0x08, 0x38, 0x7E, 0xC0]].tolist() == [0, 2**-9, 2**-6, 1, 448, -2]
    assert np.isnan(E4M3[[0x7F, 0xFF]]).all() and np.isfinite(E4M3).sum() == 254


def test_the_time_of_a_conversion_follows_the_types(monkeypatch):
    """Weights by what is done with them; vectors take no time."""
    kinds = {
        "a": ("Q4_0", (3, 32)),
        "b": ("F16", (5, 32)),
        "c": ("BF16", (7, 32)),
        "d": ("Q5_0", (11, 32)),
        "e": ("F32", (32,)),
    }
    file = SimpleNamespace(
        names=lambda: set(kinds), tensor=lambda name: SimpleNamespace(type=TensorType[kinds[name][0]], shape=kinds[name][1])
    )
    source = object.__new__(gguf_import.GgufSource)
    source._file = file
    monkeypatch.setattr(gguf_import, "conversion_seconds", lambda **counts: counts)
    assert source.seconds() == {"exact": 3 * 32, "floats": 12 * 32, "requantised": 11 * 32}
