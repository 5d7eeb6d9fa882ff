"""A kernel backend that computes everything, then goes on with random tokens, as llama.cpp's bench programs do; it counts
how many experts a layer runs per step."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Backend, Routings, Sample, SamplingParameters
from elmoe.engine.observe import ObservedBackend
from elmoe.engine.request import Request
from elmoe.models.spec import ModelSpec

PROMPT = 4


class RandomTokens(ObservedBackend):
    """The kernels with random samples; ``routed`` holds the (layers, tokens, k) experts of every pass."""

    def __init__(self, backend: Backend, spec: ModelSpec) -> None:
        super().__init__(backend, lambda name, began, ended: None)
        self._vocabulary = spec.vocabulary
        self._rng = np.random.default_rng(0)
        self._tokens: list[int] = []
        self.routed: list[NDArray[np.int32]] = []

    def forward(self, *arguments: Any, **named: Any) -> Routings:
        """Compute layers for real, and count."""
        routings = self._backend.forward(*arguments, **named)
        self.routed.append(routings.experts)
        return routings

    def sample(self, logits: NDArray[np.float32], parameters: SamplingParameters, position: int) -> Sample:
        """Sample for real, then take any token."""
        real: Sample = self._backend.sample(logits, parameters, position)
        if not self._tokens:
            self._tokens = self._rng.integers(self._vocabulary, size=4096).tolist()
        return Sample(self._tokens.pop(), real.confidence, real.logprob)

    def requests(self, count: int, prompt: int, tokens: int) -> list[Request]:
        """Requests with random prompts."""
        prompts = self._rng.integers(self._vocabulary, size=(count, prompt)).tolist()
        return [Request(tuple(ids), tokens, SamplingParameters(), ignore_eos=True) for ids in prompts]

    def experts_per_step(self, batch: int) -> float:
        """Mean number of distinct experts of a layer in the steps of ``batch`` tokens so far; forgets them."""
        counts = [len(np.unique(layer)) for experts in self.routed if experts.shape[1] == batch for layer in experts]
        self.routed.clear()
        return float(np.mean(counts)) if counts else float("nan")
