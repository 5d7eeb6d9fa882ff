"""The nested INT8 format: every code, awkward shapes, degenerate groups, bad weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elmoe.bitslice.nested import NestedMatrix, draft_values, pack_plane, quantize, recombine, split, unpack_plane
from elmoe.errors import NumericsError

ALL_CODES = np.arange(-128, 128).astype(np.int8)


def test_split_and_recombine_all_codes():
    hi, lo = split(ALL_CODES)
    assert hi.max() == 15 and lo.max() == 15
    assert np.array_equal(recombine(hi, lo), ALL_CODES)
    assert np.array_equal(16 * (hi.astype(int) - 8) + lo, ALL_CODES)


def test_draft_is_a_prefix_of_the_full_sum():
    """q = 8 * (2 h + 1) + (lo - 8) with h = hi - 8: the augmented draft is the full code without its last term."""
    hi, lo = split(ALL_CODES)
    h = hi.astype(int) - 8
    assert np.array_equal(8 * (2 * h + 1) + (lo.astype(int) - 8), ALL_CODES)
    assert np.array_equal(draft_values(ALL_CODES, 4), 8 * (2 * h + 1))


@pytest.mark.parametrize("bits", [8, 6, 5, 4, 3, 2])
def test_draft_values_stay_within_half_a_step(bits):
    step = 2 ** (8 - bits)
    error = draft_values(ALL_CODES, bits) - ALL_CODES.astype(np.float32)
    assert np.abs(error).max() <= step / 2 and len(np.unique(draft_values(ALL_CODES, bits))) == 2**bits
    truncated = ALL_CODES.astype(np.float32) - draft_values(ALL_CODES, bits, 0)
    assert truncated.min() == 0 and truncated.max() == (step - 1 if bits < 8 else 0)


def test_the_unbiased_offset_has_no_mean_error():
    assert np.mean(draft_values(ALL_CODES, 4, 7.5) - ALL_CODES) == 0


@pytest.mark.parametrize("bits,offset", [(0, None), (9, None), (4, -1), (4, 17), (4, 0.3)])
def test_bad_drafts_are_refused(bits, offset):
    with pytest.raises(NumericsError):
        draft_values(ALL_CODES, bits, offset)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**31), st.sampled_from([1e-6, 1.0, 1e4]))
def test_quantisation_error_is_half_a_step(rows, columns, seed, magnitude):
    weights = (np.random.default_rng(seed).standard_normal((rows, columns)) * magnitude).astype(np.float32)
    matrix = NestedMatrix.from_weights(weights)
    assert matrix.dequantize().shape == (rows, columns)
    scale = np.repeat(matrix.row_scales[:rows], 32, axis=1)[:, :columns]
    # absmax may exceed 127 s by the rounding of s (2^-11), which clips
    assert np.all(np.abs(matrix.dequantize() - weights) <= 0.5 * scale + np.abs(weights) * 2.0**-10)


@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_planes_round_trip(blocks, groups, seed):
    nibbles = np.random.default_rng(seed).integers(0, 16, (16 * blocks, 32 * groups)).astype(np.uint8)
    assert np.array_equal(unpack_plane(pack_plane(nibbles)), nibbles)


def test_plane_layout_is_the_documented_one():
    nibbles = np.random.default_rng(3).integers(0, 16, (32, 64)).astype(np.uint8)
    plane = pack_plane(nibbles)
    for block, group, j, n, i in ((0, 0, 0, 0, 0), (1, 1, 3, 15, 3), (1, 0, 2, 7, 1)):
        byte = plane[block, group, 64 * j + 4 * n + i]
        assert byte & 15 == nibbles[16 * block + n, 32 * group + 4 * j + i]
        assert byte >> 4 == nibbles[16 * block + n, 32 * group + 16 + 4 * j + i]


def test_packing_keeps_codes_of_minus_128():
    codes = np.tile(ALL_CODES, (3, 1))
    matrix = NestedMatrix.from_codes(codes, np.ones((3, 8), np.float16))
    assert np.array_equal(matrix.codes[:3], codes) and matrix.dequantize().min() == -128
    assert not matrix.codes[3:].any()


def test_zero_groups_have_scale_and_codes_zero():
    weights = np.zeros((2, 64), np.float32)
    weights[1, 40] = 3.0
    codes, scales = quantize(weights)
    assert scales[0, 0] == 0 and not codes[0].any() and codes[1, 40] == 127


@pytest.mark.parametrize("magnitude", [1e-7, 6e-8 * 127, 3e-6, 7.6e-6, 1.2e-5, 1e-4])
def test_subnormal_scales_never_clip(magnitude):
    weights = (np.linspace(-1, 1, 32, dtype=np.float32) * np.float32(magnitude))[None]
    codes, scales = quantize(weights)
    assert scales[0, 0] > 0
    error = np.abs(codes.astype(np.float32) * scales.astype(np.float32)[:, :1] - weights)
    assert error.max() <= 0.5001 * float(scales[0, 0])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_weights_name_the_tensor(bad):
    weights = np.zeros((2, 32), np.float32)
    weights[1, 3] = bad
    with pytest.raises(NumericsError, match=r"layers\.3\.router"):
        quantize(weights, "layers.3.router")


def test_overflowing_scale_is_an_error():
    with pytest.raises(NumericsError, match="too large"):
        quantize(np.full((1, 32), 1e9, np.float32), "w")


def test_signal_to_noise_of_the_drafts():
    """The figures the design quotes for Gaussian weights: 15.6 dB truncated, 21.0 dB augmented."""
    weights = np.random.default_rng(0).standard_normal((64, 3200)).astype(np.float32)
    matrix = NestedMatrix.from_weights(weights)

    def decibel(offset: float) -> float:
        noise = matrix.dequantize(4, offset) - weights
        return 10 * np.log10((weights**2).sum() / (noise**2).sum())

    assert abs(decibel(0) - 15.6) < 0.2 and abs(decibel(8) - 21.0) < 0.2
