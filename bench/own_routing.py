"""Systems that decode by the model's own routing and sampling, for `offload.py`: what they sample must agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Output, Request
from elmoe.store import MemoryReader


def random_prompts(vocabulary: int, count: int, length: int) -> list[list[int]]:
    """Ids that a model of random weights is prompted with."""
    found: list[list[int]] = np.random.default_rng(0).integers(vocabulary, size=(count, length)).tolist()
    return found


def by_its_own(
    reader: MemoryReader, memory: MemoryReader, prompts: Sequence[Sequence[int]], temperature: float
) -> tuple[Any, Any]:
    """(engine maker over the direct reader, all-resident engine maker); outcomes are tokens and log-probabilities by
    sequence and position."""
    asked: list[int] = []

    def requests(sequences: list[int], tokens: int) -> list[Request]:
        asked[:] = sequences
        return [
            Request(tuple(prompts[i]), tokens, SamplingParameters(temperature, seed=i), ignore_eos=True) for i in sequences
        ]

    def make(options: EngineOptions, source: MemoryReader = reader) -> tuple[Engine, Any, Any]:
        engine = Engine(source, kernels, options)
        kept: dict[tuple[int, int], tuple[int, float]] = {}
        serve = engine.run

        def run(*arguments: Any, **named: Any) -> Iterator[list[Output]]:
            done: Counter[int] = Counter()
            for outputs in serve(*arguments, **named):
                for output in outputs:
                    sequence = asked[output.request]
                    for it in zip(output.tokens, output.logprobs, strict=True):
                        kept[sequence, done[sequence]] = it
                        done[sequence] += 1
                yield outputs

        engine.run = run  # type: ignore[method-assign, assignment]

        def outcome() -> dict[tuple[int, int], tuple[int, float]]:
            found = kept.copy()
            kept.clear()
            return found

        return engine, requests, outcome

    return make, lambda options: make(options, memory)
