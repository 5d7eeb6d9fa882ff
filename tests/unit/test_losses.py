"""What a conversion loses and takes: decibels of known errors, seconds, and the formats that can be asked for."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe.convert.effort import conversion_seconds
from elmoe.convert.losses import SAMPLED_ROWS, FormatChoice, Losses
from elmoe.errors import ConvertError


class Stored:
    """A matrix whose values in the store are given."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def row_blocks(self, first: int, last: int) -> Stored:
        return Stored(self.values[first:last])

    def dequantize(self) -> np.ndarray:
        return self.values


def lines(*tensors: tuple[str, np.ndarray, np.ndarray]) -> list[str]:
    losses = Losses()
    for name, weights, stored in tensors:
        losses.quantised("BF16", "nested8", name, weights.astype(np.float32), Stored(stored.astype(np.float32)))
    return losses.lines()


def test_an_error_of_a_tenth_is_20_decibels():
    two = np.full((4, 8), 2.0)
    assert lines(("a", two, 0.9 * two)) == ["BF16 -> nested8: 20.0 dB (1 tensor)"]
    assert lines(("a", two, 0.99 * two)) == ["BF16 -> nested8: 40.0 dB (1 tensor)"]
    assert lines(("a", two, two)) == ["BF16 -> nested8: exact (1 tensor)"]
    assert lines(("a", np.zeros((4, 8)), two)) == ["BF16 -> nested8: 0.0 dB (1 tensor)"]


def test_tensors_count_once_and_by_the_energy_of_their_first_rows():
    two, wrong = np.full((SAMPLED_ROWS + 5, 8), 2.0), np.full((SAMPLED_ROWS + 5, 8), 2.0)
    wrong[SAMPLED_ROWS:] = 100.0
    assert lines(("a", two, wrong), ("a", two, wrong), ("b", two, wrong)) == ["BF16 -> nested8: exact (2 tensors)"]
    small = np.full((1, 8), 2.0)
    assert lines(("a", small, 0.9 * small), ("b", small, small)) == ["BF16 -> nested8: 23.0 dB (2 tensors)"]


@pytest.mark.parametrize(
    ("texts", "experts", "matrices"),
    [
        (["affine4_1"], "affine4_1", "affine4_1"),
        (["experts=affine4_1"], "affine4_1", None),
        (["nested8", "matrices=affine4_1"], "nested8", "affine4_1"),
        (["experts=nested8+nested8+affine4_1"], "nested8+nested8+affine4_1", None),
    ],
)
def test_formats_are_of_the_kind_that_is_named(texts, experts, matrices):
    choice = FormatChoice.parse(texts)
    assert (choice.experts, choice.matrices) == (experts, matrices)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("heads=nested8", "no format 'heads=nested8'"), ("=nested8", "no format '=nested8'"), ("nested7", "no format"),
        ("experts=nested8+nested8", "gives 2 formats"), ("matrices=nested8+nested8+nested8", "gives 3 formats"),
        ("nested8+nested8+nested8", "gives 3 formats"), ("experts=", "no format"),
    ],
)  # fmt: skip
def test_formats_that_there_are_not_are_refused(text, named):
    with pytest.raises(ConvertError, match=named) as error:
        FormatChoice.parse([text])
    assert error.value.hint


def test_weights_that_are_quantised_anew_take_longest_and_each_takes_its_time():
    exact, floats, anew = (conversion_seconds(*(10**9 * (kind == i) for i in range(3))) for kind in (1, 0, 2))
    assert 0 < exact < floats < anew
    assert conversion_seconds(10**9, 10**9, 10**9) == pytest.approx(exact + floats + anew)
