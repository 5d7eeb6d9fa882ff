"""What conversions compute natively, against its definition in NumPy, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe.bitslice import NestedMatrix
from elmoe.bitslice.nested import pack_plane, quantize, split
from elmoe.errors import NumericsError
from elmoe.kernels.packing import paired_groups_plane, pairs_plane, quantized, split_codes
from elmoe.models.formats import FORMATS

SHAPES = [(1, 1), (15, 2), (16, 1), (17, 3), (48, 8)]
"""Rows and groups."""


def padded(values: np.ndarray) -> np.ndarray:
    return np.pad(values, ((0, -len(values) % 16), (0, 0)))


def columns_of(pairs: np.ndarray) -> np.ndarray:
    """Nibbles (rows, groups * 32) of bytes of column pairs (rows, groups, 16)."""
    return np.concatenate([pairs & 15, pairs >> 4], axis=2).reshape(len(pairs), -1)


@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
@pytest.mark.parametrize(("offset", "per_block"), [(2, 1), (8, 8), (1, 1)])
def test_pairs_lie_in_the_plane_that_nibbles_are_packed_to(rows, blocks, offset, per_block):
    raw = np.random.default_rng(rows).integers(0, 256, (rows, blocks, offset + 16 * per_block), np.uint8)
    pairs = raw[:, :, offset:].reshape(rows, -1, 16)
    plane = pairs_plane(raw.reshape(rows, -1), raw.shape[2], offset)
    assert np.array_equal(plane, pack_plane(padded(columns_of(pairs))))


@pytest.mark.parametrize(("rows", "blocks"), SHAPES)
def test_nibbles_of_two_groups_lie_in_a_plane(rows, blocks):
    raw = np.random.default_rng(rows).integers(0, 256, (rows, blocks, 16 + 128), np.uint8)
    codes = raw[:, :, 16:].reshape(rows, -1, 1, 32)
    nibbles = np.concatenate([codes & 15, codes >> 4], axis=2).reshape(rows, -1)
    assert np.array_equal(paired_groups_plane(raw.reshape(rows, -1), 144, 16), pack_plane(padded(nibbles)))


@pytest.mark.parametrize(("rows", "groups"), SHAPES)
def test_codes_are_split_as_defined(rows, groups):
    raw = np.random.default_rng(rows).integers(0, 256, (rows, groups, 34), np.uint8)
    codes = raw[:, :, 2:].reshape(rows, -1).view(np.int8)
    hi, lo = (pack_plane(part) for part in split(padded(codes)))
    found = split_codes(raw.reshape(rows, -1), 34, 2)
    assert np.array_equal(found[0], hi) and np.array_equal(found[1], lo)


def hard_weights(rows: int, columns: int) -> np.ndarray:
    """Of all magnitudes: zeros, ties, groups whose scale is subnormal or 0 in fp16."""
    rng = np.random.default_rng(columns)
    weights = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-12, 5, (rows, 1))
    weights[rng.random((rows, columns)) < 0.1] = 0
    weights[::3] = np.rint(weights[::3] * 4) / 8
    weights[::5, 0] = 127
    weights[1::7] = rng.choice([0.5, -0.5, 1.5, 2.5, -126.5, 127.0, -0.0], (len(weights[1::7]), columns))
    weights[2::7] *= 3e-6 / np.abs(weights[2::7]).max(initial=1e-30)
    return weights.astype(np.float32)


@pytest.mark.parametrize("rows", [1, 16, 33, 200])
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 96, 256])
def test_weights_are_quantised_as_defined(rows, columns):
    weights = hard_weights(rows, columns)
    expected, found = NestedMatrix.from_weights(weights), quantized(FORMATS["nested8"], weights, "w")
    for name in ("hi", "lo", "scales"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name
    assert (found.rows, found.columns) == (rows, columns)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 1e9])
def test_bad_weights_are_refused_as_defined(bad):
    weights = np.zeros((20, 70), np.float32)
    weights[17, 69] = bad
    with pytest.raises(NumericsError) as expected:
        quantize(weights, "layer.weight")
    with pytest.raises(NumericsError) as found:
        quantized(FORMATS["nested8"], weights, "layer.weight")
    assert str(found.value) == str(expected.value) and "layer.weight" in str(found.value)


def test_rows_that_are_not_whole_blocks_are_refused():
    with pytest.raises(ValueError, match="whole blocks"):
        pairs_plane(np.zeros((4, 35), np.uint8), 18, 2)
