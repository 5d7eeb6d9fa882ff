"""The packed formats in every variant against their NumPy definition, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import (
    AttentionWeights,
    ExpertLayout,
    KVCache,
    Places,
    StackedMatrix,
    from_sections,
    quantized,
    rotary_tables,
)
from elmoe.errors import NumericsError
from elmoe.models.formats import FORMATS

OTHERS = [name for name in FORMATS if name != "nested8"]
TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 16, 17, 31, 33, 64)
MIXES = (("affine4_k", "affine4_k", "planes6"), ("table4_mx",) * 3, ("nested8", "affine4_0", "table4_xs"),
         ("planes6", "table4_nl", "affine4_1"))  # fmt: skip


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def random_matrix(rng: np.random.Generator, name: str, rows: int, columns: int):
    """Every code, step and finite half: negative, zero and subnormal scales among them."""
    format, sections = FORMATS[name], {}
    for section in format.sections:
        raw = np.frombuffer(rng.bytes(section.bytes_of(rows, columns)), np.uint8).copy()
        if section.dtype == "f2":
            halves = raw.view(np.uint16)
            halves[halves & 0x7C00 == 0x7C00] &= 0xBFFF
            halves[:: rng.integers(3, 40)] &= 0x83FF
        elif name == "table4_mx" and section.name == "steps":
            raw = np.where(raw == 255, np.uint8(0), np.where(raw > 200, np.uint8(120), raw))
        sections[section.name] = raw
    return from_sections(format, rows, columns, sections)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("rows,columns", [(1, 1), (17, 33), (33, 300), (48, 512)])
def test_matmul(machine, name, rows, columns):
    rng = np.random.default_rng(rows)
    matrix = random_matrix(rng, name, rows, columns)
    x = normal(rng, 64, columns) * np.exp2(rng.integers(-30, 8, (64, 1))).astype(np.float32)
    x[5, : columns // 2] = 0
    expected = {draft: bitslice.matmul(matrix, x, draft, offset=8.0) for draft in (False, True)}
    for tokens in TOKENS:
        for draft in (False, True):
            assert same_bits(kernels.matmul(matrix, x[:tokens], draft), expected[draft][:tokens])
    if name == "planes6":
        only = replace(matrix, sections={key: one for key, one in matrix.sections.items() if key != "lo"})
        for offset in (0.0, 3.0, 7.0, 16.0):
            assert same_bits(kernels.matmul(only, x[:9], True, offset), bitslice.matmul(only, x[:9], True, offset=offset))
        with pytest.raises(NumericsError, match="LSB"):
            kernels.matmul(only, x)


@pytest.mark.parametrize("name", OTHERS)
def test_the_largest_sums(machine, name):
    """All codes and activations at their ends, so that every sum reaches its bound."""
    for code, sign in ((0x00, -1), (0xFF, 1), (0x00, 1), (0xFF, -1), (0x88, 1), (0x77, -1)):
        format, sections = FORMATS[name], {}
        for section in format.sections:
            fill = {"hi": code, "lo": code, "steps": 0x80 if section.dtype == "i1" else 0xC8}.get(section.name)
            size = section.bytes_of(16, 512)
            sections[section.name] = (
                np.full(size // 2, 1, np.float16).view(np.uint8) if fill is None else np.full(size, fill, np.uint8)
            )
        matrix = from_sections(format, 16, 512, sections)
        x = np.full((3, 512), sign * 127, np.float32)
        x[1, ::2] *= -1
        x[2, 16:] = 0
        for draft in (False, True):
            assert same_bits(kernels.matmul(matrix, x, draft), bitslice.matmul(matrix, x, draft, offset=8.0))


@pytest.mark.parametrize("name", list(FORMATS))
def test_embed_and_logits(machine, name):
    rng = np.random.default_rng(3)
    matrix = random_matrix(rng, name, 53, 300)
    ids = np.array([0, 52, 16, 15, 0, 33], np.int32)
    assert same_bits(kernels.embed(matrix, ids), bitslice.embed(matrix, ids))
    assert same_bits(bitslice.embed(matrix, ids), matrix.dequantize()[ids])
    matrix = quantized(FORMATS[name], normal(rng, 53, 300))
    x, norm = normal(rng, 5, 300), normal(rng, 300)
    assert same_bits(kernels.logits(norm, 1e-6, matrix, x), bitslice.logits(norm, 1e-6, matrix, x))


@pytest.mark.parametrize("names", MIXES, ids="+".join)
def test_experts_of_several_formats(machine, names):
    rng = np.random.default_rng(len(names[0]))
    layout = ExpertLayout(264, 48, tuple(FORMATS[name] for name in names))
    records, addresses = [], np.zeros((6, 2), np.int64)
    for expert in range(6):
        matrices = {
            projection: quantized(format, normal(rng, *layout.shape(projection)) / 16)
            for projection, format in zip(("gate", "up", "down"), layout.formats, strict=True)
        }
        records.append(layout.pack(matrices))
        addresses[expert, : len(records[-1])] = [record.ctypes.data for record in records[-1]]
    assert len(records[0]) == (2 if layout.lsb_bytes else 1) == (2 if {"nested8", "planes6"} & set(names) else 1)
    for tokens in (1, 2, 5, 9, 17, 33):
        ids = np.sort(np.argsort(rng.random((tokens, 6)), axis=1)[:, :3], axis=1).astype(np.int32)
        weights, inputs, x = np.abs(normal(rng, tokens, 3)), normal(rng, tokens, 264), normal(rng, tokens, 264)
        for draft, offset in ((False, 8.0), (True, 8.0), (True, 0.0)):
            places = addresses.copy()
            if draft:
                places[:, 1] = 0
            ours, theirs = x.copy(), x.copy()
            kernels.expert_ffn(layout, places, inputs, ids, weights, ours, draft, offset)
            bitslice.expert_ffn(layout, places, inputs, ids, weights, theirs, draft, offset)
            assert same_bits(ours, theirs)
    if layout.lsb_bytes:
        addresses[ids[0, 0], 1] = 0
        for backend in (kernels, bitslice):
            with pytest.raises(NumericsError, match="LSB slice is not resident"):
                backend.expert_ffn(layout, addresses, inputs, ids, weights, x.copy())


def test_attention_of_several_formats(machine):
    rng, hidden, heads, kv_heads, head_dim = np.random.default_rng(7), 96, 4, 2, 16
    parts = tuple(
        quantized(FORMATS[name], normal(rng, rows * head_dim, hidden) / 10)
        for name, rows in (("affine4_k", heads), ("table4_nl", kv_heads), ("planes6", kv_heads))
    )
    output = quantized(FORMATS["affine4_1"], normal(rng, hidden, heads * head_dim) / 10)
    weights = AttentionWeights(
        normal(rng, hidden), StackedMatrix(parts), normal(rng, head_dim), normal(rng, head_dim), output, heads, kv_heads,
        head_dim, 1e-6,
    )  # fmt: skip
    cosine, sine = rotary_tables(64, head_dim, 10000.0)
    results = []
    for backend in (kernels, bitslice):
        cache = KVCache(
            np.zeros((1, 1, kv_heads, 4, head_dim, 16), np.float16), np.zeros((1, 1, kv_heads, 64, head_dim), np.float16),
            np.zeros((1, 1), np.int32),
        )  # fmt: skip
        x = np.random.default_rng(1).standard_normal((5, hidden)).astype(np.float32)
        places = Places(np.zeros(5, np.int32), np.arange(5, dtype=np.int32))
        backend.attention_block(weights, x, cache, 0, places, cosine, sine)
        results.append((x.tobytes(), cache.keys.tobytes(), cache.values.tobytes()))
    assert results[0] == results[1]


def test_matrices_that_do_not_fit_are_refused():
    native, hi = kernels._native, np.zeros((1, 1, 256), np.uint8)
    scales, steps = np.zeros((1, 1, 16), np.uint16), np.zeros((1, 1, 16), np.uint8)
    assert native.Matrix(16, 32, "table4_mx", hi, None, None, None, steps)
    for arguments in (
        ("table4_mx", hi, None, scales, None, steps), ("table4_mx", hi, None, None, None, None),
        ("affine4_0", hi, hi, scales, None, None), ("affine4_1", hi, None, scales, None, None),
        ("planes6", hi, None, scales, None, steps), ("nested9", hi, None, scales, None, None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"do not fit|no format"):
            native.Matrix(16, 32, *arguments)
    with pytest.raises(ValueError, match="outside its record"):
        native.Expert(32, 32, ["planes6"] * 3, [[0, 0, 0, 0, 0]] * 3, 1 << 20, 100)
    with pytest.raises(NumericsError, match="several formats"):
        kernels.embed(StackedMatrix((quantized(FORMATS["planes6"], np.ones((16, 32), np.float32)),)), np.zeros(1, np.int32))
