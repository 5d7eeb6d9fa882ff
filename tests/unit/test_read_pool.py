"""The native pool of reads: bytes, priorities, throttle, faults."""

from __future__ import annotations

import errno
import os
from time import perf_counter, sleep

import numpy as np
import pytest

from elmoe.kernels.reads import ReadPool

SIZE = 1 << 16


@pytest.fixture
def file(tmp_path):
    data = np.random.default_rng(0).bytes(16 * SIZE)
    (tmp_path / "data").write_bytes(data)
    handle = os.open(tmp_path / "data", os.O_RDONLY)
    yield handle, data
    os.close(handle)


def read_all(pool: ReadPool, handle: int, order: list[int], priority: int = 0) -> tuple[np.ndarray, list[int]]:
    memory = np.zeros((16, SIZE), np.uint8)
    tickets = pool.submit(
        [handle] * len(order),
        [i * SIZE for i in order],
        [SIZE] * len(order),
        [memory[i].ctypes.data for i in order],
        priority,
    )
    return memory, tickets


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("delay", [0.0, 0.003])
def test_reads_arrive_where_they_were_asked(file, threads, delay):
    handle, data = file
    pool = ReadPool(threads)
    pool.inject_delay(delay, 3)
    memory, tickets = read_all(pool, handle, list(range(15, -1, -1)))
    assert pool.wait(tickets) == [] and memory.tobytes() == data
    assert pool.bytes_read() == 16 * SIZE
    assert all(pool.done(ticket) for ticket in tickets)


def test_urgent_reads_go_first_and_a_planned_one_can_be_hastened(file):
    handle, _ = file
    for seconds in (0.01, 0.1, 1.0, 10.0):  # that the first read takes; longer where this process was not served meanwhile
        pool = ReadPool(1)
        pool.record(True)
        pool.set_bandwidth(SIZE / seconds)
        memory, first = read_all(pool, handle, [0])  # occupies the device while the others queue up
        planned = pool.submit(
            [handle] * 3, [SIZE, 2 * SIZE, 3 * SIZE], [SIZE] * 3, [memory[i].ctypes.data for i in (1, 2, 3)], 5
        )
        urgent = pool.submit([handle], [4 * SIZE], [SIZE], [memory[4].ctypes.data], 0)
        pool.hasten([planned[2]], 1)
        queued = not pool.done(first[0])
        pool.set_bandwidth(0)
        pool.wait([*first, *planned, *urgent])
        if queued:
            break
    assert [event[4] for event in pool.take_events()] == [0, 0, 1, 5, 5]


def test_the_throttle_is_one_device_for_all_threads(file):
    handle, _ = file
    pool = ReadPool(4)
    pool.set_bandwidth(16 * SIZE / 0.2)
    began = perf_counter()
    _, tickets = read_all(pool, handle, list(range(16)))
    pool.wait(tickets)
    elapsed = perf_counter() - began
    assert elapsed > 0.19
    busy = pool.busy_seconds()
    assert 0.19 < busy <= elapsed + 0.01
    sleep(0.02)
    assert pool.busy_seconds() == busy  # nothing is in flight


@pytest.mark.parametrize("error", [errno.EIO, errno.ENODATA])
def test_one_failure_is_one_ticket(file, error):
    handle, _ = file
    pool = ReadPool(1)
    pool.inject_failure(error, 2)
    _, tickets = read_all(pool, handle, [0, 1, 2, 3])
    assert pool.wait(tickets) == [(tickets[2], error)]


def test_a_read_beyond_the_end_is_a_failure(file):
    handle, _ = file
    pool = ReadPool(2)
    memory = np.zeros(SIZE, np.uint8)
    tickets = pool.submit([handle], [16 * SIZE - 100], [SIZE], [memory.ctypes.data], 0)
    assert pool.wait(tickets) == [(tickets[0], errno.ENODATA)]


def test_a_pool_that_goes_away_finishes_first(file):
    handle, data = file
    pool = ReadPool(2)
    pool.inject_delay(0.002, 1)
    memory, _ = read_all(pool, handle, list(range(16)))
    del pool
    assert memory.tobytes() == data


def test_bad_arguments_are_refused(file):
    with pytest.raises(ValueError):
        ReadPool(0)
    with pytest.raises(ValueError):
        ReadPool(1).submit([file[0]], [0, 1], [1], [1], 0)
