"""A kernel backend that computes everything, then goes on with random tokens, as llama.cpp's bench programs do; it counts
how many experts a layer runs per step."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import RouterWeights, Routing, SamplingParameters
from elmoe.bitslice.sampling import Sample
from elmoe.engine.request import Request
from elmoe.schema.model import ModelSchema

PROMPT = 4


class RandomTokens(SimpleNamespace):
    """The kernels with random samples; ``distinct`` holds (tokens in the call, distinct experts) of every routing."""

    def __init__(self, backend: ModuleType, schema: ModelSchema) -> None:
        names = ("embed", "attention_block", "expert_ffn", "rms_norm", "logits")
        super().__init__(**{name: getattr(backend, name) for name in names})
        self._backend, self._vocabulary = backend, schema.vocabulary
        self._rng = np.random.default_rng(0)
        self.distinct: list[tuple[int, int]] = []

    def route(self, router: RouterWeights, x: NDArray[np.float32], *more: Any) -> Routing:
        """Route for real, and count."""
        routing: Routing = self._backend.route(router, x, *more)
        self.distinct.append((len(x), len(np.unique(routing.experts))))
        return routing

    def sample(self, logits: NDArray[np.float32], parameters: SamplingParameters, position: int) -> Sample:
        """Sample for real, then take any token."""
        real: Sample = self._backend.sample(logits, parameters, position)
        return replace(real, token=int(self._rng.integers(self._vocabulary)))

    def requests(self, count: int, prompt: int, tokens: int) -> list[Request]:
        """Requests with random prompts."""
        prompts = self._rng.integers(self._vocabulary, size=(count, prompt)).tolist()
        return [Request(tuple(ids), tokens, SamplingParameters(), ignore_eos=True) for ids in prompts]

    def experts_per_step(self, batch: int) -> float:
        """Mean number of distinct experts of a layer in the steps of ``batch`` tokens so far; forgets them."""
        counts = [distinct for tokens, distinct in self.distinct if tokens == batch]
        self.distinct.clear()
        return float(np.mean(counts)) if counts else float("nan")
