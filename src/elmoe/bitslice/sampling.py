"""Reproducible sampling: the token is a function of the logits, the tokens before it, the seed and the position alone.

Processors in order: logit bias and penalties (``history``), the grammar's mask, temperature, top-k, top-p, min-p. The token
is the argmax over the surviving ids of log-probability plus Gumbel noise ``-log(-log u)``, ``u = (k + 1/2) * 2^-52``, where
``k`` are the upper 52 bits of the first word of Philox4x64-10 (Salmon et al., SC'11) with key (seed, choice) and counter
(position, token id, 0, 0). Draft and target draw the same noise, so an accepted draft token is the one plain decoding would
have sampled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.arithmetic import exp, lane_sum, log

PHILOX_MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
PHILOX_WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_MASK32 = np.uint64(0xFFFFFFFF)
_WORD = 1 << 64


@dataclass(frozen=True)
class SamplingParameters:
    """``temperature`` 0 is argmax; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off. ``choice``: index among the
    alternatives of one request. Penalties and ``logit_bias``, pairs of a token id and what is added to its logit: see
    ``History``; 0, 0, 1 and none are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    choice: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def penalizes(self) -> bool:
        """Whether tokens so far change the logits."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)


@dataclass(frozen=True)
class Sample:
    """``confidence``: probability of the token after bias, penalties, mask and temperature (at temperature 0: of the plain
    softmax). ``logprob``: natural log of its unprocessed probability, float64."""

    token: int
    confidence: float
    logprob: float


def _multiply_high_low(constant: int, x: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The 128-bit product of a constant and x as (high, low) words."""
    a_low, a_high = np.uint64(constant & 0xFFFFFFFF), np.uint64(constant >> 32)
    x_low, x_high = x & _MASK32, x >> np.uint64(32)
    low_low, low_high, high_low = a_low * x_low, a_low * x_high, a_high * x_low
    middle = (low_low >> np.uint64(32)) + (low_high & _MASK32) + (high_low & _MASK32)
    high = a_high * x_high + (low_high >> np.uint64(32)) + (high_low >> np.uint64(32)) + (middle >> np.uint64(32))
    return high, np.uint64(constant) * x


def philox(seed: int, choice: int, position: int, tokens: NDArray[np.int64]) -> NDArray[np.uint64]:
    """First output word of Philox4x64-10 for every token id."""
    counter = [
        np.full(tokens.shape, position, np.uint64), tokens.astype(np.uint64),
        np.zeros(tokens.shape, np.uint64), np.zeros(tokens.shape, np.uint64),
    ]  # fmt: skip
    key = [seed % _WORD, choice % _WORD]
    for _ in range(10):
        high0, low0 = _multiply_high_low(PHILOX_MULTIPLIERS[0], counter[0])
        high1, low1 = _multiply_high_low(PHILOX_MULTIPLIERS[1], counter[2])
        counter = [
            high1 ^ counter[1] ^ np.uint64(key[0]), low1, high0 ^ counter[3] ^ np.uint64(key[1]), low0,
        ]  # fmt: skip
        key = [(key[0] + PHILOX_WEYL[0]) % _WORD, (key[1] + PHILOX_WEYL[1]) % _WORD]
    return counter[0]


def gumbel_noise(parameters: SamplingParameters, position: int, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """``-log(-log u)`` for every token id at a position."""
    k = philox(parameters.seed, parameters.choice, position, tokens) >> np.uint64(12)
    u = (k.astype(np.float64) + 0.5) * 2.0**-52
    return -log(-log(u))


def sample(
    logits: NDArray[np.float32], parameters: SamplingParameters, position: int, adjusted: NDArray[np.float32] | None = None
) -> Sample:
    """Sample one token from finite logits (vocabulary,) float32 for the given absolute position.

    :param adjusted: the logits behind bias, penalties and mask, which are drawn from in place of ``logits``; -inf excludes
        an id, and one at least is finite. The log-probability stays that of ``logits``.

    top-k keeps the highest logits (ties: lowest id first). Probabilities are ``exp32(float32(z - z_max))`` of
    ``z = float64(logit) / temperature``, summed over ids in 16 float64 lanes. top-p walks down by (logit descending, id
    ascending) with a sequential float64 sum and stops when it reaches ``top_p`` of the sum over the survivors of top-k;
    min-p drops what lies below ``min_p`` times the highest probability. Ties of the argmax go to the lowest id.
    """
    target, likeliest = logits, int(np.argmax(logits))
    plain = exp(logits - logits[likeliest]).astype(np.float64)
    target_sum = plain_sum = lane_sum(plain)
    best = likeliest
    if adjusted is not None:
        logits, best = adjusted, int(np.argmax(adjusted))
        plain = exp(logits - logits[best]).astype(np.float64)
        plain_sum = lane_sum(plain)
    ids = np.arange(logits.size)

    def result(token: int, confidence: float) -> Sample:
        logprob = (float(target[token]) - float(target[likeliest])) - float(log(np.array([target_sum]))[0])
        return Sample(token, confidence, logprob)

    if parameters.temperature == 0:
        return result(best, float(plain[best] / plain_sum))
    z = logits.astype(np.float64) / parameters.temperature
    z = z - z[best]
    weights = exp(z.astype(np.float32)).astype(np.float64)
    alive = np.ones(logits.size, bool)
    order = np.argsort(-logits, kind="stable")
    if 0 < parameters.top_k < logits.size:
        alive[order[parameters.top_k :]] = False
    total = lane_sum(np.where(alive, weights, 0.0))
    if parameters.top_p < 1:
        limit, reached = parameters.top_p * total, 0.0
        for rank, token in enumerate(order):
            if not alive[token] or reached >= limit:
                alive[order[rank:]] = False
                break
            reached = reached + weights[token]
    if parameters.min_p > 0:
        alive &= weights >= parameters.min_p
    survivors = ids[alive]
    noisy = z[survivors] + gumbel_noise(parameters, position, survivors)
    token = int(survivors[np.argmax(noisy)])
    return result(token, float(weights[token] / total))
