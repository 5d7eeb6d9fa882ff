"""A sample of the losslessness grid on the demo model (all of it: ``make full-grid``)."""

from __future__ import annotations

import pytest

from elmoe.llm import load
from tests import lossless

COUNT = 24
# A stride coprime to the grid's sides meets every value of every axis.
SAMPLE = lossless.grid()[::23]


@pytest.fixture(scope="module")
def demo():
    with load("demo") as model:
        yield model, {t: lossless.reference(model, COUNT, t) for t in lossless.TEMPERATURES}


def test_the_sample_meets_every_setting():
    for name, values in (
        ("draft_length", lossless.DRAFT_LENGTHS), ("budget", lossless.BUDGETS), ("batch", lossless.BATCHES),
        ("threads", lossless.THREADS), ("temperature", lossless.TEMPERATURES),
    ):  # fmt: skip
        assert {getattr(case, name) for case in SAMPLE} == set(values)


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_elastic_output_is_the_plain_output(demo, case):
    model, expected = demo
    results, facts = lossless.run(model, case, COUNT)
    assert results == expected[case.temperature]
    assert facts["draft_slow_reads"] == 0 and facts["drafted_tokens"] > 0 and facts["accepted_tokens"] > 0
