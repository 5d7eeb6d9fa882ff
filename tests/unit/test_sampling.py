"""Sampling: the generator against NumPy's, each processor by itself, and the distribution it promises."""

from __future__ import annotations

import numpy as np
import pytest

from elmoe.bitslice.sampling import SamplingParameters, gumbel_noise, philox, sample


def logits_of(probabilities: list[float]) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def draws(logits: np.ndarray, count: int = 3000, **parameters: float) -> np.ndarray:
    chosen = [sample(logits, SamplingParameters(seed=7, **parameters), position).token for position in range(count)]
    return np.bincount(chosen, minlength=len(logits)) / count


@pytest.mark.parametrize("seed,choice,position,token", [(0, 0, 1, 0), (5, 7, 9, 3), (2**63, 1, 10**6, 151_000)])
def test_philox_equals_numpys(seed, choice, position, token):
    generator = np.random.Philox(
        key=np.array([seed, choice], np.uint64), counter=np.array([position - 1, token, 0, 0], np.uint64)
    )  # NumPy increments the counter before the first block
    assert philox(seed, choice, position, np.array([token]))[0] == generator.random_raw(1)[0]


def test_noise_is_gumbel():
    noise = gumbel_noise(SamplingParameters(seed=1), 3, np.arange(50_000))
    assert abs(noise.mean() - 0.5772) < 0.02 and abs(noise.var() - np.pi**2 / 6) < 0.05


def test_greedy_takes_the_lowest_of_equals():
    result = sample(np.float32([1, 3, 3, 0]), SamplingParameters(), 5)
    assert result.token == 1 and result.confidence < 0.5
    assert abs(result.logprob - np.log(result.confidence)) < 1e-6


def test_the_distribution_is_the_softmax():
    assert np.abs(draws(logits_of([0.5, 0.3, 0.15, 0.05]), temperature=1.0) - [0.5, 0.3, 0.15, 0.05]).max() < 0.03


def test_temperature_sharpens():
    expected = np.array([0.5, 0.3, 0.2]) ** 2
    assert np.abs(draws(logits_of([0.5, 0.3, 0.2]), temperature=0.5) - expected / expected.sum()).max() < 0.03


def test_top_k_keeps_the_best_and_breaks_ties_by_id():
    frequencies = draws(np.float32([0, 1, 1, 1]), count=400, temperature=1.0, top_k=2)
    assert frequencies[0] == 0 and frequencies[3] == 0 and frequencies[1] > 0 and frequencies[2] > 0


def test_top_p_keeps_the_smallest_sufficient_prefix():
    frequencies = draws(logits_of([0.1, 0.5, 0.4]), count=400, temperature=1.0, top_p=0.6)
    assert frequencies[0] == 0 and frequencies[2] > 0
    assert draws(logits_of([0.1, 0.5, 0.4]), count=100, temperature=1.0, top_p=1e-6)[1] == 1


def test_min_p_drops_the_improbable():
    frequencies = draws(logits_of([0.62, 0.3, 0.08]), count=400, temperature=1.0, min_p=0.2)
    assert frequencies[2] == 0 and frequencies[1] > 0


def test_a_sample_depends_on_seed_and_position_only():
    logits = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    tokens = {
        sample(logits, SamplingParameters(1.0, seed=seed), position).token for seed in range(5) for position in range(5)
    }
    assert len(tokens) > 10
    assert sample(logits, SamplingParameters(1.0, seed=3), 8) == sample(logits, SamplingParameters(1.0, seed=3), 8)
    assert gumbel_noise(SamplingParameters(seed=1, choice=0), 0, np.arange(3)).tolist() != (
        gumbel_noise(SamplingParameters(seed=1, choice=1), 0, np.arange(3)).tolist()
    )


def test_logprob_is_of_the_unprocessed_target():
    logits = np.random.default_rng(1).standard_normal(200).astype(np.float32)
    result = sample(logits, SamplingParameters(0.7, top_k=5, seed=2), 11)
    reference = logits.astype(np.float64)
    expected = reference[result.token] - reference.max() - np.log(np.exp(reference - reference.max()).sum())
    assert abs(result.logprob - expected) < 1e-6
