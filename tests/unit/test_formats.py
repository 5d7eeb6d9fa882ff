"""Formats of weights: what they hold, how they compute, and that their bytes are what the kernels expect."""

from itertools import product

import numpy as np
import pytest

from elmoe.bitslice.formats import StackedMatrix, dequantized_rows, format_of, from_sections, matmul, quantized, sections_of
from elmoe.bitslice.formats.packing import pack_lanes, unpack_lanes
from elmoe.bitslice.formats.planes6 import PlanesMatrix, pack_pairs, unpack_pairs
from elmoe.bitslice.formats.table4 import TableMatrix, power_scales
from elmoe.bitslice.matmul import quantize_activations
from elmoe.errors import ModelError, NumericsError
from elmoe.models.formats import FORMATS, joined_formats, split_formats
from elmoe.models.sizes import Precision

SHAPES = ((1, 32), (17, 33), (48, 256), (40, 300), (16, 512))
OTHERS = [name for name in FORMATS if name != "nested8"]


def weights_of(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def decibel(weights: np.ndarray, found: np.ndarray) -> float:
    return 10 * np.log10((weights**2).sum() / ((weights - found) ** 2).sum())


def test_bits_and_slices_are_those_of_the_design():
    expected = {
        "nested8": (4.5, 4.0), "affine4_0": (4.5,), "affine4_1": (5.0,), "affine4_k": (4.625,), "table4_nl": (4.5,),
        "table4_xs": (4.3125,), "table4_mx": (4.25,), "planes6": (4.5625, 2.0),
    }  # fmt: skip
    assert {name: format.bits for name, format in FORMATS.items()} == expected
    assert {name for name, format in FORMATS.items() if format.slices == 2} == {"nested8", "planes6"}
    mixed = Precision.of([("affine4_k", 64), ("affine4_k", 64), ("planes6", 64)])
    assert mixed == Precision(((2 * 4.625 + 4.5625) / 3, 2 / 3), (1.0, 1 / 3)) and mixed.bytes_of(96) == pytest.approx(
        (64 * 4.625 + 32 * 6.5625) / 8
    )


def test_formats_of_parts_are_joined_and_split():
    assert joined_formats(["nested8"] * 3) == "nested8" and joined_formats(["nested8", "planes6"]) == "nested8+planes6"
    assert [one.name for one in split_formats("planes6", 3)] == ["planes6"] * 3
    assert [one.name for one in split_formats("planes6+nested8", 2)] == ["planes6", "nested8"]
    for name, parts in (("planes6+nested8", 3), ("nested9", 1), ("", 1)):
        with pytest.raises(ModelError):
            split_formats(name, parts)


@pytest.mark.parametrize(("name", "shape"), list(product(FORMATS, SHAPES)))
def test_sections_have_the_declared_sizes_and_rebuild_the_matrix(name, shape):
    matrix = quantized(FORMATS[name], weights_of(*shape))
    sections, sizes = sections_of(matrix), FORMATS[name].bytes_of(*shape)
    assert list(sections) == list(sizes) and {key: array.nbytes for key, array in sections.items()} == sizes
    raw = {key: array.reshape(-1).view(np.uint8) for key, array in sections.items()}
    again = from_sections(FORMATS[name], *shape, raw)
    assert np.array_equal(again.dequantize(), matrix.dequantize()) and format_of(again) is FORMATS[name]
    assert matrix.dequantize().shape == shape
    picked = np.array([0, shape[0] - 1, 0], np.int32)
    assert np.array_equal(dequantized_rows(matrix, picked), matrix.dequantize()[picked])


@pytest.mark.parametrize(
    ("name", "least"),
    [("nested8", 42), ("affine4_0", 18.5), ("affine4_1", 20), ("affine4_k", 19.5), ("table4_nl", 19.5), ("table4_xs", 19.5),
     ("table4_mx", 16), ("planes6", 30)],
)  # fmt: skip
def test_the_quantisers_lose_little(name, least):
    weights = weights_of(64, 1024)
    assert decibel(weights, quantized(FORMATS[name], weights).dequantize()) > least
    zeros = quantized(FORMATS[name], np.zeros((3, 40), np.float32))
    assert not zeros.dequantize().any() and not matmul(zeros, weights_of(2, 40)).any()
    with pytest.raises(NumericsError, match="'blk'"):
        quantized(FORMATS[name], np.full((2, 32), np.nan, np.float32), "blk")


@pytest.mark.parametrize(("name", "shape"), list(product(OTHERS, SHAPES)))
def test_the_product_is_near_that_of_the_dequantised_matrix(name, shape):
    matrix, x = quantized(FORMATS[name], weights_of(*shape)), weights_of(5, shape[1], 1)
    activations = quantize_activations(x)
    exact = (activations.codes.reshape(5, -1, 32) * activations.scales[:, :, None]).reshape(5, -1)[:, : shape[1]]
    for draft in (False, True):
        dense = matrix.dequantize(draft).astype(np.float64)
        found = matmul(matrix, x, draft)
        assert found.dtype == np.float32 and np.allclose(found, exact @ dense.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_a_token_does_not_depend_on_the_others(name):
    matrix, x = quantized(FORMATS[name], weights_of(40, 300)), weights_of(9, 300, 1)
    together = matmul(matrix, x)
    assert all(np.array_equal(matmul(matrix, x[i : i + 1])[0], together[i]) for i in range(9))


def test_a_chain_of_a_minimum_rounds_the_difference_once():
    """By hand, in scalars: the order of the design."""
    matrix, x = quantized(FORMATS["affine4_1"], weights_of(1, 96)), weights_of(1, 96, 1)
    activations, total = quantize_activations(x), np.float32(0)
    codes = matrix.nibbles[0]
    for g in range(3):
        own, theirs = codes[32 * g : 32 * g + 32].astype(int), activations.codes[0, 32 * g : 32 * g + 32].astype(int)
        scale, least = (np.float32(matrix.sections[key][0, g, 0]) for key in ("scales", "minima"))
        sx = activations.scales[0, g]
        first = np.float32((own * theirs).sum()) * np.float32(scale * sx)
        second = least * np.float32(sx * np.float32(theirs.sum()))
        total = np.float32(total + np.float32(first - second))
    assert matmul(matrix, x)[0, 0] == total


def test_planes_of_six_bits():
    pairs = np.random.default_rng(0).integers(0, 4, (32, 96)).astype(np.uint8)
    assert np.array_equal(unpack_pairs(pack_pairs(pairs)), pairs)
    plane = pack_pairs(np.arange(32, dtype=np.uint8)[None] // 4 % 4)  # column c holds c // 4 % 4
    assert plane[0, 0, 0] == (0 | 0 << 2 | 1 << 4 | 1 << 6) and plane[0, 0, 64] == (2 | 2 << 2 | 3 << 4 | 3 << 6)
    # The largest integers that can meet: the bound of the module, below 2^24.
    codes, steps = np.full((16, 32), -32, np.int8), np.full((16, 1, 2), -128, np.int8)
    matrix = PlanesMatrix.from_codes(32, codes, np.ones((16, 1), np.float16), steps)
    result = matmul(matrix, np.full((1, 32), -127, np.float32))
    assert (result == np.float32(-2 * 128 * 16 * 32 * 127)).all()


def test_a_draft_of_six_bits_reads_the_upper_plane_alone():
    matrix = quantized(FORMATS["planes6"], weights_of(16, 64))
    only = PlanesMatrix(matrix.format, 16, 64, {key: one for key, one in matrix.sections.items() if key != "lo"})
    x = weights_of(3, 64, 1)
    assert np.array_equal(matmul(only, x, draft=True), matmul(matrix, x, draft=True))
    assert decibel(matrix.dequantize(), only.dequantize(draft=True)) > 17
    with pytest.raises(NumericsError, match="LSB"):
        matmul(only, x)
    for offset, inside in ((0.0, 0), (7.5, 1), (8.0, 2), (16.0, 4)):
        codes = (matrix.nibbles * 4 - 32.0 + inside).astype(np.float32)
        assert np.array_equal(matrix._values(True, offset).reshape(16, 64), codes)


def test_scales_that_are_powers_of_two():
    exponents = np.arange(255, dtype=np.uint8)
    assert np.array_equal(power_scales(exponents), np.ldexp(np.float32(1), exponents.astype(int) - 128))
    matrix = quantized(FORMATS["table4_mx"], weights_of(16, 64))
    broken = matrix.sections["steps"].copy()
    broken[0, 0, 3] = 255
    with pytest.raises(NumericsError, match="255"):
        TableMatrix(matrix.format, 16, 64, matrix.sections | {"steps": broken})


def test_lanes_lie_value_by_value():
    values = np.arange(20 * 3 * 2).reshape(20, 3, 2)
    packed = pack_lanes(values)
    assert packed.shape == (2, 3, 32) and np.array_equal(unpack_lanes(packed)[:20], values)
    assert np.array_equal(packed[0, 1, :16], values[:16, 1, 0]) and np.array_equal(packed[0, 1, 16:], values[:16, 1, 1])


def test_a_stack_is_its_parts_one_below_the_other():
    parts = tuple(quantized(FORMATS[name], weights_of(32, 64, seed)) for seed, name in enumerate(("affine4_k", "planes6")))
    stacked, x = StackedMatrix(parts), weights_of(3, 64, 9)
    assert stacked.rows == 64 and stacked.columns == 64 and stacked.dequantize().shape == (64, 64)
    assert np.array_equal(matmul(stacked, x)[:, 32:], matmul(parts[1], x))
    with pytest.raises(NumericsError, match="stacked"):
        StackedMatrix((quantized(FORMATS["planes6"], weights_of(8, 64)), parts[0]))


def test_a_section_that_does_not_fit_is_refused():
    matrix = quantized(FORMATS["affine4_k"], weights_of(16, 64))
    with pytest.raises(NumericsError, match="'minima'"):
        type(matrix)(matrix.format, 16, 64, {key: one for key, one in matrix.sections.items() if key != "minima"})
    with pytest.raises(NumericsError, match="'hi'"):
        type(matrix)(matrix.format, 32, 64, matrix.sections)
