"""The prefetch distance is measured, can be pinned, and changes no bit."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe import kernels
from elmoe.bitslice import NestedMatrix
from elmoe.engine import prefetch_distance
from elmoe.errors import KernelError
from tests.tiny import TinyReader, tiny_spec


@pytest.fixture(autouse=True)
def restored():
    distance = kernels.prefetch()
    yield
    kernels.set_prefetch(distance)


def test_no_result_depends_on_it():
    rng = np.random.default_rng(0)
    matrix = NestedMatrix.from_weights(rng.standard_normal((100, 300)).astype(np.float32))
    x = rng.standard_normal((3, 300)).astype(np.float32)
    results = set()
    for distance in (0, 64, 1024, 65536):
        kernels.set_prefetch(distance)
        assert kernels.prefetch() == distance
        results.add(kernels.nested_matmul(matrix, x).tobytes())
    assert len(results) == 1
    with pytest.raises(KernelError, match="prefetch distance of -1"):
        kernels.set_prefetch(-1)


def test_the_fastest_distance_is_taken(monkeypatch):
    """Kernels that are told to be slow at all distances but one."""
    reader = TinyReader(tiny_spec(layers=12))
    monkeypatch.setattr(prefetch_distance, "LEAST_BYTES", 0)
    monkeypatch.setattr(prefetch_distance, "LEAST_RATE", 0.0)
    clock = iter(np.cumsum([0.0 if i % 2 == 0 else 1.0 for i in range(1000)]).tolist())
    kernels.set_prefetch(2048)
    monkeypatch.setattr(prefetch_distance, "perf_counter", lambda: next(clock))
    assert prefetch_distance.choose_prefetch_distance(reader) == dict.fromkeys(prefetch_distance.DISTANCES, 1.0)
    assert kernels.prefetch() == 2048  # no other one is faster

    now = 0.0

    def by_distance() -> float:
        nonlocal now
        now += 0.5 if kernels.prefetch() == 4096 else 1.0
        return now

    monkeypatch.setattr(prefetch_distance, "perf_counter", by_distance)
    assert prefetch_distance.choose_prefetch_distance(reader)[4096] == 0.5
    assert kernels.prefetch() == 4096


def test_small_stores_and_slow_reads_measure_nothing(monkeypatch):
    reader = TinyReader(tiny_spec())
    kernels.set_prefetch(2048)
    with monkeypatch.context() as any_rate:
        any_rate.setattr(prefetch_distance, "LEAST_RATE", 0.0)
        assert prefetch_distance.choose_prefetch_distance(reader) == {}
    monkeypatch.setattr(prefetch_distance, "LEAST_BYTES", 0)
    monkeypatch.setattr(prefetch_distance, "LEAST_RATE", 1e18)
    assert prefetch_distance.choose_prefetch_distance(reader) == {}
    assert kernels.prefetch() == 2048


def test_a_distance_that_the_user_chose_stays(monkeypatch):
    monkeypatch.setattr(prefetch_distance, "LEAST_BYTES", 0)
    monkeypatch.setattr(prefetch_distance, "LEAST_RATE", 0.0)
    monkeypatch.setattr(kernels, "PREFETCH_PINNED", True)
    kernels.set_prefetch(1024)
    assert prefetch_distance.choose_prefetch_distance(TinyReader(tiny_spec())) == {} and kernels.prefetch() == 1024
