"""Own elementary functions against NumPy's, and the canonical reductions against their written order."""

from __future__ import annotations

import numpy as np

from elmoe.bitslice.arithmetic import exp, lane_sum, log, sine_cosine
from elmoe.bitslice.rotary import rotary_tables


def test_exp():
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    assert np.max(np.abs(exp(x).astype(np.float64) / np.exp(x.astype(np.float64)) - 1)) < 1.2e-7
    assert exp(np.float32([0.0, -0.0])).tolist() == [1.0, 1.0]
    assert exp(np.float32([-87.5, -1e30, -np.inf])).tolist() == [0.0, 0.0, 0.0]
    assert np.isfinite(exp(np.float32([1e30]))).all()


def test_log():
    x = np.concatenate([np.random.default_rng(0).random(100_000) * 100, 10.0 ** np.arange(-300, 300)])
    expected = np.log(x)
    assert np.all(np.abs(log(x) - expected) <= 4e-16 * np.abs(expected) + 1e-300)
    assert log(np.array([1.0]))[0] == 0


def test_sine_and_cosine():
    x = np.random.default_rng(0).random(100_000) * 1e6
    sine, cosine = sine_cosine(x)
    assert np.abs(sine - np.sin(x)).max() < 1e-15 and np.abs(cosine - np.cos(x)).max() < 1e-15


def test_lane_sum_is_the_documented_order():
    for length in (1, 15, 16, 17, 33, 64):
        x = np.random.default_rng(length).standard_normal(length).astype(np.float32)
        lanes = [np.float32(0)] * 16
        for i, value in enumerate(x):
            lanes[i % 16] = lanes[i % 16] + value
        for half in (8, 4, 2, 1):
            lanes = [lanes[i] + lanes[i + half] for i in range(half)]
        assert lane_sum(x) == lanes[0]


def test_rotary_tables():
    cosine, sine = rotary_tables(300, 32, 10000.0)
    frequencies = (10000.0 ** (-np.arange(0, 32, 2) / 32)).astype(np.float32)
    angles = (np.arange(300, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    assert cosine.shape == (300, 16)
    assert np.abs(cosine - np.cos(angles)).max() < 3e-5 and np.abs(sine - np.sin(angles)).max() < 3e-5
    longer = rotary_tables(600, 32, 10000.0)
    assert np.array_equal(longer[0][:300], cosine) and np.array_equal(longer[1][:300], sine)
