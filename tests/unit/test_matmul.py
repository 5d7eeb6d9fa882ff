"""The matmul's definition against a scalar loop, and its independence of what else is in the call."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe.bitslice import NestedMatrix, nested_matmul, quantize_activations
from elmoe.errors import NumericsError


@pytest.mark.parametrize("rows,columns", [(1, 1), (16, 32), (17, 33), (33, 70)])
@pytest.mark.parametrize("draft,offset", [(False, None), (True, 8.0), (True, 7.5), (True, 0.0)])
def test_matmul_is_the_documented_chain(rows, columns, draft, offset):
    rng = np.random.default_rng(rows)
    matrix = NestedMatrix.from_weights(rng.standard_normal((rows, columns)).astype(np.float32))
    x = rng.standard_normal((3, columns)).astype(np.float32)
    result = nested_matmul(matrix, x, draft, offset)
    quantised = quantize_activations(x)
    for token in range(3):
        for row in range(rows):
            total = np.float32(0)
            for group in range(matrix.scales.shape[1]):
                span = slice(32 * group, 32 * group + 32)
                codes = matrix.codes[row, span].astype(np.float64)
                if draft:
                    codes = np.floor((codes + 128) / 16) * 16 - 128 + offset
                dot = np.float32((codes * quantised.codes[token, span]).sum())
                scale = matrix.row_scales[row, group] * quantised.scales[token, group]
                total = np.float32(total + np.float32(dot * scale))
            assert total == result[token, row]


def test_a_token_does_not_depend_on_its_neighbours():
    rng = np.random.default_rng(0)
    matrix = NestedMatrix.from_weights(rng.standard_normal((40, 96)).astype(np.float32))
    x = rng.standard_normal((9, 96)).astype(np.float32)
    together = nested_matmul(matrix, x)
    for token in range(9):
        assert np.array_equal(nested_matmul(matrix, x[token : token + 1])[0], together[token])


def test_activations_of_degenerate_groups():
    x = np.zeros((1, 64), np.float32)
    x[0, 32:] = np.float32(1e-45)
    quantised = quantize_activations(x)
    assert not quantised.codes[0].any() and quantised.scales[0, 0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_activations_are_refused(bad):
    with pytest.raises(NumericsError):
        quantize_activations(np.array([[1.0, bad]], np.float32))
