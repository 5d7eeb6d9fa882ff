"""The machines a kernel test runs on: every variant of this processor, with one to three threads."""

import pytest

from elmoe import kernels


@pytest.fixture(params=[(v, t) for v in kernels.variants() for t in (1, 2, 3)], ids=lambda p: f"{p[0]}-{p[1]}")
def machine(request):
    variant, threads = request.param
    kernels.set_variant(variant)
    kernels.set_threads(threads)
    yield variant
    kernels.set_variant(None)
    kernels.set_threads(2)
