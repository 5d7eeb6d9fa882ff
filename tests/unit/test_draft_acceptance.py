"""The acceptance of draft tokens: by confidence and by the covered share, from the assumption to what is seen."""

from __future__ import annotations

import pytest

from elmoe.policy.acceptance import Acceptance, confidence_bin


def test_each_confidence_bin_is_learned():
    acceptance = Acceptance()
    for _ in range(400):
        acceptance.observe(0.95, True, 1.0)
        acceptance.observe(0.1, False, 1.0)
    assert acceptance.of(0.92) > 0.95 and acceptance.of(0.2) < 0.05


@pytest.mark.parametrize(("edge", "index"), [(0.3, 1), (0.5, 2), (0.7, 3), (0.9, 4), (0.97, 5)])
def test_a_bin_begins_at_its_edge(edge, index):
    assert confidence_bin(edge) == index and confidence_bin(edge - 1e-9) == index - 1
    assert confidence_bin(0.0) == 0 and confidence_bin(1.0) == 5


def test_a_bin_begins_between_the_confidence_and_certainty():
    acceptance = Acceptance()
    expected = [acceptance.of(confidence) for confidence in (0.1, 0.4, 0.6, 0.8, 0.95, 0.99)]
    assert expected == sorted(expected) and expected[0] > 0.7 and expected[-1] < 1
    assert expected == pytest.approx([1 - 0.25 * (1 - middle) for middle in (0.15, 0.4, 0.6, 0.8, 0.935, 0.985)])


def test_a_bin_weighs_its_assumption_as_four_tokens_and_forgets_slowly():
    acceptance = Acceptance()
    acceptance.observe(0.0, False, 1.0)
    assumed = 4 * (1 - 0.25 * 0.85)
    assert acceptance.of(0.0) == pytest.approx(0.995 * assumed / (0.995 * 4 + 1))


def test_the_curve_falls_by_its_spread_with_what_residents_do_not_cover():
    acceptance = Acceptance()
    assert [acceptance.expected(covered) for covered in (1.0, 0.5, 0.0)] == pytest.approx([0.95, 0.65, 0.35])
    assert Acceptance(0.7, 0.0).expected(0.0) == pytest.approx(0.7)


def test_the_curve_learns_its_scale():
    acceptance = Acceptance()
    for token in range(10_000):
        acceptance.observe(0.5, token % 50 != 0, 0.8)
    assert acceptance.expected(0.8) == pytest.approx(0.98, abs=0.005)


def test_the_curve_weighs_its_assumption_as_four_rejections():
    acceptance = Acceptance()
    acceptance.observe(0.5, False, 0.75)  # assumed rejection: 0.2
    scale = (0.9967 * 4 + 1) / (0.9967 * 4 + 0.2)
    assert acceptance.expected(0.75) == pytest.approx(1 - 0.2 * scale)


def test_an_expectation_never_is_certain():
    sure, hopeless = Acceptance(1.0, 0.0), Acceptance(0.0, 0.0)
    assert sure.expected(1.0) == 0.995 and hopeless.expected(1.0) == 0.02
    accepted, rejected = Acceptance(0.5, 0.0), Acceptance(0.99, 0.0)
    for _ in range(5000):
        accepted.observe(0.5, True, 1.0)
        rejected.observe(0.5, False, 1.0)
    assert accepted.expected(1.0) == pytest.approx(1 - 0.1 * 0.5)
    assert rejected.expected(1.0) == pytest.approx(1 - 20 * 0.01)
