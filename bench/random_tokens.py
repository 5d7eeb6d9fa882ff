"""A kernel backend that computes everything, then goes on with random tokens, as llama.cpp's bench programs do; it counts
how many experts a layer runs per step."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import RouterWeights, Routing, SamplingParameters
from elmoe.bitslice.sampling import Sample
from elmoe.engine.request import Request
from elmoe.models.spec import ModelSpec

PROMPT = 4


class RandomTokens(SimpleNamespace):
    """The kernels with random samples; ``routed`` holds the (layers, tokens, k) experts of every call."""

    def __init__(self, backend: ModuleType, spec: ModelSpec) -> None:
        names = ("embed", "attention_block", "expert_ffn", "rms_norm", "logits", "LayerStack")
        super().__init__(**{name: getattr(backend, name) for name in names})
        self._backend, self._vocabulary = backend, spec.vocabulary
        self._rng = np.random.default_rng(0)
        self._tokens: list[int] = []
        self.routed: list[NDArray[np.int32]] = []

    def route(self, router: RouterWeights, x: NDArray[np.float32], *more: Any) -> Routing:
        """Route for real, and count."""
        routing: Routing = self._backend.route(router, x, *more)
        self.routed.append(routing.experts[None])
        return routing

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """Compute layers for real, and count."""
        facts = self._backend.forward(*arguments, **named)
        self.routed.append(facts[2])
        return facts

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
