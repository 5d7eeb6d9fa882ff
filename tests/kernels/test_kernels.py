"""Every native function against its NumPy definition, bit for bit, on every variant and several thread counts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from elmoe import bitslice, kernels
from elmoe.bitslice import (
    ExpertLayout,
    NestedMatrix,
    RouterWeights,
    SamplingParameters,
)
from elmoe.errors import KernelError, NumericsError

TOKENS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()


def normal(rng: np.random.Generator, *shape: int, magnitude: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * magnitude).astype(np.float32)


@pytest.mark.parametrize("rows,columns", [(1, 1), (15, 31), (16, 32), (17, 33), (33, 70), (160, 256)])
def test_matmul(machine, rows, columns):
    rng = np.random.default_rng(rows)
    matrix = NestedMatrix.from_weights(normal(rng, rows, columns))
    draft_only = replace(matrix, lo=None)
    for tokens in TOKENS:
        x = normal(rng, tokens, columns)
        assert same_bits(kernels.nested_matmul(matrix, x), bitslice.nested_matmul(matrix, x))
        for offset in (8.0, 0.0, 3.0):
            expected = bitslice.nested_matmul(matrix, x, True, offset=offset)
            assert same_bits(kernels.nested_matmul(draft_only, x, True, offset), expected)


@pytest.mark.parametrize("rows,columns", [(16, 512), (17, 513), (40, 1056)])
def test_matmul_of_many_tokens(machine, rows, columns):
    """Token counts and widths on both sides of the borders of tiles, spans of groups and tiles computed together."""
    rng = np.random.default_rng(columns)
    matrix = NestedMatrix.from_weights(normal(rng, rows, columns))
    x = normal(rng, 273, columns)
    expected = {draft: bitslice.nested_matmul(matrix, x, draft, offset=8.0) for draft in (False, True)}
    for tokens in (8, 11, 12, 13, 16, 17, 24, 25, 47, 49, 64, 65, 129, 241, 255, 256, 257, 273):
        for draft in (False, True):
            assert same_bits(kernels.nested_matmul(matrix, x[:tokens], draft), expected[draft][:tokens])


def test_matmul_of_all_codes_and_extreme_values(machine):
    """All 256 codes (-128 too), subnormal and huge scales, zero groups, activations from subnormal to huge."""
    codes = np.tile(np.arange(-128, 128).astype(np.int8), (20, 1))
    scales = np.ones((20, 8), np.float16)
    scales[:, 1], scales[:, 2], scales[:, 3] = 6e-8, 65504, 0
    scales[3] = np.float16(2e-6)
    matrix = NestedMatrix.from_codes(codes, scales)
    rng = np.random.default_rng(0)
    for magnitude in (1e-44, 1e-38, 1e-20, 1.0, 1e30):
        x = normal(rng, 5, 256, magnitude=magnitude)
        x[1, 32:64] = 0
        x[2] = 0
        for draft in (False, True):
            with np.errstate(over="ignore"):
                expected = bitslice.nested_matmul(matrix, x, draft, offset=8.0)
            assert same_bits(kernels.nested_matmul(matrix, x, draft), expected)
            many = np.tile(x, (4, 1))
            assert same_bits(kernels.nested_matmul(matrix, many, draft), np.tile(expected, (4, 1)))


def test_the_largest_sums_of_a_group_fit(machine):
    """All nibbles 15 times all activation codes 127 or -127: what partial sums in 16 bits must hold."""
    matrix = NestedMatrix.from_codes(np.full((20, 64), 127, np.int8), np.ones((20, 2), np.float16))
    x = np.stack([np.full(64, sign, np.float32) for sign in (1, -1, 1, -1, 1)])
    for draft in (False, True):
        assert same_bits(kernels.nested_matmul(matrix, x, draft), bitslice.nested_matmul(matrix, x, draft, offset=8.0))


def test_values_at_the_rounding_border_are_rounded_to_even(machine):
    matrix = NestedMatrix.from_weights(np.eye(32, dtype=np.float32))
    x = np.zeros((1, 32), np.float32)
    x[0] = np.arange(32) - 16 + 0.5
    x[0, 0] = 127  # scale 1: all others lie on .5
    assert same_bits(kernels.nested_matmul(matrix, x), bitslice.nested_matmul(matrix, x))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_activations_are_refused(machine, bad):
    matrix = NestedMatrix.from_weights(np.ones((16, 64), np.float32))
    for tokens in (1, 12):
        x = np.ones((tokens, 64), np.float32)
        x[-1, 40] = bad
        with pytest.raises(NumericsError, match="NaN or infinite"):
            kernels.nested_matmul(matrix, x)


@pytest.mark.parametrize("size", [1, 15, 16, 17, 48, 192, 2048])
def test_rms_norm(machine, size):
    rng = np.random.default_rng(size)
    x, weight = normal(rng, 3, size), normal(rng, size)
    assert same_bits(kernels.rms_norm(x, weight, 1e-6), bitslice.rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("experts,top_k,hidden", [(8, 2, 48), (64, 4, 192), (5, 5, 33), (128, 8, 64)])
@pytest.mark.parametrize("normalize", [True, False])
def test_route(machine, experts, top_k, hidden, normalize):
    rng = np.random.default_rng(experts)
    weights = RouterWeights(normal(rng, hidden) + 1, normal(rng, experts, hidden), 1e-6, top_k, normalize)
    everything = replace(weights, ranked=experts)
    for tokens in (1, 3, 17, 40):
        x = normal(rng, tokens, hidden)
        mask = (rng.random(experts) < 0.4).astype(np.uint8)
        mask[0] = 1
        one = np.zeros(experts, np.uint8)
        one[-1] = 1
        for arguments in ((), (mask,), (mask, 1), (mask, None, False), (one,), (np.ones(experts, np.uint8), top_k, False)):
            ours, theirs = kernels.route(weights, x, *arguments), bitslice.route(weights, x, *arguments)
            for field in ("hidden", "ranked", "scores", "experts", "weights"):
                assert same_bits(getattr(ours, field), getattr(theirs, field)), field
            all_ours, all_theirs = kernels.route(everything, x, *arguments), bitslice.route(everything, x, *arguments)
            for field in ("hidden", "ranked", "scores", "experts", "weights"):
                assert same_bits(getattr(all_ours, field), getattr(all_theirs, field)), field
            assert all_ours.ranked.shape == (tokens, experts)
            assert same_bits(np.ascontiguousarray(all_ours.ranked[:, : ours.ranked.shape[1]]), ours.ranked)
            assert same_bits(all_ours.experts, ours.experts) and same_bits(all_ours.weights, ours.weights)


def test_route_breaks_ties_by_id_and_survives_underflow(machine):
    weights = RouterWeights(np.ones(16, np.float32), np.zeros((8, 16), np.float32), 1e-6, 3, True)
    x = np.ones((1, 16), np.float32)
    assert kernels.route(weights, x).experts.tolist() == [[0, 1, 2]]
    router = np.full((8, 16), -100, np.float32)
    router[0] = 100  # all others underflow to probability 0
    steep = replace(weights, router=router)
    mask = np.array([0, 0, 1, 1, 1, 0, 0, 0], np.uint8)
    ours, theirs = kernels.route(steep, x, mask), bitslice.route(steep, x, mask)
    assert same_bits(ours.weights, theirs.weights) and abs(ours.weights.sum() - 1) < 1e-6
    for backend in (kernels, bitslice):
        with pytest.raises(NumericsError, match="no expert"):
            backend.route(weights, x, np.zeros(8, np.uint8))
        with pytest.raises(NumericsError, match="router"):
            backend.route(weights, x * np.nan)


def packed_experts(rng, layout: ExpertLayout, count: int):
    records, addresses = [], np.zeros((count, 2), np.int64)
    for expert in range(count):
        pair = layout.pack({name: NestedMatrix.from_weights(normal(rng, *layout.shape(name), magnitude=0.2))
                            for name in ("gate", "up", "down")})  # fmt: skip
        records.append(pair)
        addresses[expert] = [record.ctypes.data for record in pair]
    return records, addresses


@pytest.mark.parametrize("hidden,width,count,k", [(48, 40, 6, 2), (192, 96, 16, 4), (33, 17, 3, 3), (64, 64, 1, 1)])
def test_expert_ffn(machine, hidden, width, count, k):
    rng = np.random.default_rng(hidden)
    layout = ExpertLayout(hidden, width)
    records, addresses = packed_experts(rng, layout, count)
    assert len(records) == count
    for tokens in TOKENS:
        ids = np.sort(np.argsort(rng.random((tokens, count)), axis=1)[:, :k], axis=1).astype(np.int32)
        weights, inputs, x = np.abs(normal(rng, tokens, k)), normal(rng, tokens, hidden), normal(rng, tokens, hidden)
        for draft, offset in ((False, 8.0), (True, 8.0), (True, 0.0)):
            ours, theirs = x.copy(), x.copy()
            kernels.expert_ffn(layout, addresses, inputs, ids, weights, ours, draft, offset)
            bitslice.expert_ffn(layout, addresses, inputs, ids, weights, theirs, draft, offset)
            assert same_bits(ours, theirs)


def test_a_layer_computed_in_stretches_has_the_same_bits(machine):
    """Experts 0..2, then 3..7, chained from zero and added at the end, equal one call."""
    rng = np.random.default_rng(1)
    layout = ExpertLayout(48, 40)
    records, addresses = packed_experts(rng, layout, 8)
    assert len(records) == 8
    ids = np.sort(np.argsort(rng.random((7, 8)), axis=1)[:, :3], axis=1).astype(np.int32)
    weights, inputs, x = np.abs(normal(rng, 7, 3)), normal(rng, 7, 48), normal(rng, 7, 48)
    for draft in (False, True):
        whole = x.copy()
        kernels.expert_ffn(layout, addresses, inputs, ids, weights, whole, draft)
        for backend in (kernels, bitslice):
            total, stretches = np.zeros_like(x), x.copy()
            for low, high in ((0, 3), (3, 3), (3, 8)):
                part = np.where((ids >= low) & (ids < high), ids, -1).astype(np.int32)
                backend.expert_ffn(layout, addresses, inputs, part, weights, total, draft, 8.0, True)
            stretches += total
            assert same_bits(stretches, whole)


def test_expert_ffn_needs_its_slices(machine):
    layout = ExpertLayout(48, 32)
    records, addresses = packed_experts(np.random.default_rng(0), layout, 3)
    assert len(records) == 3
    ids, weights = np.array([[0, 2]], np.int32), np.ones((1, 2), np.float32)
    x = np.ones((1, 48), np.float32)
    without_lsb, without_msb = addresses.copy(), addresses.copy()
    without_lsb[2, 1] = without_msb[0, 0] = 0
    for backend in (kernels, bitslice):
        backend.expert_ffn(layout, without_lsb, x, ids, weights, x.copy(), True)
        with pytest.raises(NumericsError, match="expert 2: the LSB slice is not resident"):
            backend.expert_ffn(layout, without_lsb, x, ids, weights, x.copy())
        with pytest.raises(NumericsError, match="expert 0: the MSB slice is not resident"):
            backend.expert_ffn(layout, without_msb, x, ids, weights, x.copy(), True)
    for bad in (-2, 3):
        with pytest.raises(ValueError, match="out of range"):
            kernels.expert_ffn(layout, addresses, x, np.array([[bad]], np.int32), weights[:, :1], x.copy())
    with pytest.raises(KernelError, match="integral offset"):
        kernels.expert_ffn(layout, addresses, x, ids, weights, x.copy(), True, 7.5)


def test_embed_and_logits(machine):
    rng = np.random.default_rng(0)
    matrix = NestedMatrix.from_weights(normal(rng, 97, 70))
    scales = matrix.scales.copy()
    scales[1, :, 3] = 3e-7
    matrix = replace(matrix, scales=scales)
    ids = np.array([0, 19, 96, 15, 16, 17], np.int32)
    assert same_bits(kernels.embed(matrix, ids), bitslice.embed(matrix, ids))
    scales = scales.copy()
    scales[2, :, 1], scales[2, :, 2] = np.inf, np.nan  # of a damaged file: not finite on either side
    for backend in (kernels, bitslice):
        with np.errstate(invalid="ignore"):
            rows = backend.embed(replace(matrix, scales=scales), np.array([33, 34, 35], np.int32))
        assert not np.isfinite(rows[:2]).any() and np.isfinite(rows[2]).all()
    for bad in (-1, 97):
        for backend in (kernels, bitslice):
            with pytest.raises(NumericsError, match="token id"):
                backend.embed(matrix, np.array([bad], np.int32))
    norm = normal(rng, 70)
    for tokens in (1, 4, 9):
        x = normal(rng, tokens, 70)
        assert same_bits(kernels.logits(norm, 1e-6, matrix, x), bitslice.logits(norm, 1e-6, matrix, x))
    for backend in (kernels, bitslice):
        with pytest.raises(NumericsError):
            backend.logits(norm, 1e-6, matrix, x * np.nan)


@pytest.mark.parametrize("vocabulary", [1, 7, 97, 1000])
def test_sample(machine, vocabulary):
    rng = np.random.default_rng(vocabulary)
    for case in range(60):
        logits = normal(rng, vocabulary, magnitude=float(rng.choice([0.1, 2.0, 30.0])))
        if case % 5 == 0:
            logits = np.round(logits)  # ties
        parameters = SamplingParameters(
            float(rng.choice([0.0, 0.3, 1.0, 1.7])), int(rng.choice([0, 1, 5, 40])), float(rng.choice([1.0, 0.9, 0.3])),
            float(rng.choice([0.0, 0.05, 0.5])), int(rng.integers(-(2**40), 2**62)), int(rng.integers(0, 3)),
        )  # fmt: skip
        position = int(rng.integers(0, 5000))
        assert kernels.sample(logits, parameters, position) == bitslice.sample(logits, parameters, position)
        adjusted = logits + normal(rng, vocabulary, magnitude=3.0)
        adjusted[rng.random(vocabulary) < rng.choice([0, 0.5, 1.0])] = -np.inf
        adjusted[rng.integers(vocabulary)] = logits[0]
        expected = bitslice.sample(logits, parameters, position, adjusted)
        assert kernels.sample(logits, parameters, position, adjusted) == expected
        assert np.isfinite(adjusted[expected.token])
        assert kernels.sample(logits, parameters, position, logits.copy()) == kernels.sample(logits, parameters, position)


def test_concurrent_calls():
    """Two Python threads get right results."""
    rng = np.random.default_rng(0)
    matrix = NestedMatrix.from_weights(normal(rng, 2048, 1024))
    x = normal(rng, 64, 1024)
    expected = kernels.nested_matmul(matrix, x)
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            if not np.array_equal(kernels.nested_matmul(matrix, x), expected):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    assert not wrong


def test_other_threads_make_progress_while_kernels_run():
    """With turns that Python never ends by itself, a second thread gets one only where a kernel releases the lock."""
    matrix = NestedMatrix.from_weights(normal(np.random.default_rng(0), 2048, 1024))
    x = normal(np.random.default_rng(1), 64, 1024)
    ticks, done = [0], threading.Event()

    def count() -> None:
        while not done.is_set():
            ticks[0] += 1
            time.sleep(0)  # ends its turn

    kernels.nested_matmul(matrix, x)
    counter, interval, deadline = threading.Thread(target=count), sys.getswitchinterval(), time.monotonic() + 60
    counter.start()
    sys.setswitchinterval(1000)
    try:
        first = ticks[0]
        while ticks[0] < first + 5 and time.monotonic() < deadline:
            kernels.nested_matmul(matrix, x)
        found = ticks[0] - first
    finally:
        sys.setswitchinterval(interval)
        done.set()
        counter.join()
    assert found >= 5


def test_changing_threads_between_calls_is_safe():
    matrix = NestedMatrix.from_weights(normal(np.random.default_rng(0), 512, 256))
    x = normal(np.random.default_rng(1), 3, 256)
    expected = bitslice.nested_matmul(matrix, x)
    for threads in (1, 5, 2, 16, 1, 3, 2):
        kernels.set_threads(threads)
        for _ in range(30):
            assert same_bits(kernels.nested_matmul(matrix, x), expected)
    assert kernels.threads() == 2
    for bad in (0, 65):
        with pytest.raises(KernelError):
            kernels.set_threads(bad)


def test_the_rounding_mode_of_the_caller_is_kept():
    """A caller that flushes subnormals gets the same bits, and its setting back."""
    code = """
import ctypes, numpy as np
from elmoe import kernels, bitslice
from elmoe.bitslice import NestedMatrix
libm = ctypes.CDLL("libm.so.6")
matrix = NestedMatrix.from_weights(np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32))
x = (np.random.default_rng(1).standard_normal((2, 64)) * 1e-42).astype(np.float32)
expected = bitslice.nested_matmul(matrix, x)
FE_UPWARD = 0x800
assert libm.fesetround(FE_UPWARD) == 0
ours = kernels.nested_matmul(matrix, x)
mode = libm.fegetround()
libm.fesetround(0)
assert mode == FE_UPWARD and ours.tobytes() == expected.tobytes()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stream_read_reads_every_byte(machine):
    data = np.random.default_rng(0).integers(0, 256, 1 << 20, dtype=np.uint8)
    words = int(data.view(np.uint64).sum(dtype=np.uint64))
    assert kernels.stream_read(data) == words


def test_a_variant_of_another_processor_is_refused():
    with pytest.raises(KernelError, match="sve2"):
        kernels.set_variant("sve2")
