"""The machines a kernel test runs on: every variant of this processor, with one and three threads (full tier: two too)."""

import pytest

from elmoe import kernels

MACHINES = [
    pytest.param((variant, threads), id=f"{variant}-{threads}", marks=[pytest.mark.full] if threads == 2 else [])
    for variant in kernels.variants()
    for threads in (1, 2, 3)
]


@pytest.fixture(params=MACHINES)
def machine(request):
    variant, threads = request.param
    kernels.set_variant(variant)
    kernels.set_threads(threads)
    yield variant
    kernels.set_variant(None)
    kernels.set_threads(2)
