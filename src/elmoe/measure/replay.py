"""Driving a store of random weights by a recorded trace: bytes, reads and kernels are real; tokens, routing and acceptance
are the trace's, the same for every run. Results are labelled ``replayed``.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import RouterWeights, Routing, SamplingParameters
from elmoe.bitslice.sampling import Sample
from elmoe.engine.request import Request
from elmoe.engine.statistics import Phase
from elmoe.errors import TraceError
from elmoe.models.spec import ModelSpec
from elmoe.trace.draft_facts import DraftFacts

PERMUTATION_SEED = 20260414
"""Of the fixed permutation of experts under which an odd layer repeats the even layer before it."""


class ReplayBackend(SimpleNamespace):
    """A kernel backend, and the engine's ``script``, that computes everything and then says what the trace says.

    Layers 2l and 2l+1 replay the trace's layer l (modulo its layers), the second under a fixed permutation of experts; each
    token runs the best ``top_k`` of the recorded ranking with weights from its recorded scores. A draft takes the best
    resident ones of that ranking and fills up with other residents. Of several ``traces`` of the same sequences, recorded
    with different shares of resident MSB slices, a step replays the nearest: acceptance depends on what was resident.
    """

    def __init__(self, backend: ModuleType, spec: ModelSpec, traces: Sequence[DraftFacts]) -> None:
        facts = traces[0]
        ranks = facts.target_routes.shape[-1]
        if facts.experts != spec.experts or ranks < spec.top_k:
            raise TraceError(
                f"the trace ranks {ranks} of {facts.experts} experts, the store uses {spec.top_k} of {spec.experts}",
                "record the trace on a model with as many experts and at least half the top-k",
            )
        if int(facts.tokens.max()) >= spec.vocabulary:
            raise TraceError(f"the trace has token {int(facts.tokens.max())}, the store's vocabulary is {spec.vocabulary}")
        super().__init__(**{name: getattr(backend, name) for name in ("embed", "attention_block", "expert_ffn", "rms_norm")})
        self._backend, self._facts, self._top_k = backend, facts, spec.top_k
        self._traces = {trace.resident: trace for trace in traces}
        rng = np.random.Generator(np.random.PCG64(PERMUTATION_SEED))
        self._permutation = rng.permutation(spec.experts).astype(np.int32)
        self._layers = len(spec.moe_layers)
        self._layer, self._phase = 0, ""
        self._routes = np.empty((0, 0, 0), np.int32)
        self._scores = np.empty((0, 0, 0), np.float32)
        self._samples: deque[tuple[tuple[int, int], int, float]] = deque()
        self.digests: dict[tuple[int, int], bytes] = {}

    def requests(self, sequences: list[int], max_tokens: int) -> list[Request]:
        """The trace's sequences as requests; TraceError where one is too short."""
        requests = []
        for index in sequences:
            prompt = int(self._facts.prompts[index])
            if self._facts.length(index) < prompt + max_tokens:
                raise TraceError(
                    f"sequence {index} of the trace has {self._facts.length(index)} tokens, not {prompt + max_tokens}",
                    "record a longer trace, or replay fewer tokens",
                )
            tokens = tuple(self._facts.tokens[index, :prompt].tolist())
            requests.append(Request(tokens, max_tokens, SamplingParameters(), ignore_eos=True))
        self._sequences = sequences
        return requests

    def begin(self, phase: Phase, rows: list[tuple[int, int, int]], resident: float) -> None:
        """See ``elmoe.engine.engine.Script``: look the pass's facts up, in the trace of the nearest resident share."""
        facts = self._traces[min(self._traces, key=lambda share: abs(share - resident))]
        requests, last, positions = (np.array(column) for column in zip(*rows, strict=True))
        sequences = np.array(self._sequences)[requests]
        start = positions if phase == "prefill" else last
        index = (sequences, start, positions - start)
        self._layer, self._phase, draft = 0, phase, phase == "draft"
        if int(index[2].max()) >= facts.depths + (not draft):
            raise TraceError(f"the trace holds drafts of {facts.depths} tokens", "lower --draft-length, or record it anew")
        self._routes = (facts.draft_routes if draft else facts.target_routes)[index].astype(np.int32)
        self._scores = (facts.draft_scores if draft else facts.target_scores)[index].astype(np.float32)
        tokens = (facts.draft_tokens if draft else facts.target_tokens)[index].tolist()
        confidences = facts.confidences[index].tolist() if draft else [1.0] * len(rows)
        where = zip(sequences.tolist(), positions.tolist(), strict=True)
        self._samples = deque() if phase == "prefill" else deque(zip(where, tokens, confidences, strict=True))

    def route(
        self, router: RouterWeights, x: NDArray[np.float32], allowed: NDArray[np.uint8] | None = None,
        top_k: int | None = None, rescale: bool = True,
    ) -> Routing:  # fmt: skip
        """Route for real, then say what the trace says."""
        layer, self._layer = self._layer, self._layer + 1
        real = self._backend.route(router, x) if allowed is None else self._backend.route(router, x, allowed, top_k, rescale)
        source = layer // 2 % self._routes.shape[1]
        ranked, scores = self._routes[:, source], self._scores[:, source]
        if layer % 2:
            ranked = self._permutation[ranked]
        if allowed is None:
            chosen = ranked[:, : self._top_k]
        else:
            preference = np.zeros((len(x), len(allowed)), np.float32)
            np.put_along_axis(preference, ranked, 1 + scores, axis=1)
            preference[:, allowed == 0] = -1
            count = min(top_k or self._top_k, int(allowed.sum()))
            chosen = np.argsort(-preference, axis=1, kind="stable")[:, :count].astype(np.int32)
        weights = np.full((len(x), self._permutation.size), 1e-6, np.float32)
        np.put_along_axis(weights, ranked, scores, axis=1)
        experts = np.ascontiguousarray(np.sort(chosen, axis=1))
        values = np.take_along_axis(weights, experts, axis=1)
        values /= values.sum(axis=1, keepdims=True)
        return replace(real, ranked=ranked, scores=scores, experts=experts, weights=values)

    def committed_digests(self) -> dict[tuple[int, int], bytes]:
        """Hashes of the logits by (sequence, position), and forget them: what runs of the same trace must agree on."""
        digests, self.digests = self.digests, {}
        return digests

    def logits(self, *arguments: Any) -> NDArray[np.float32]:
        """The real logits; their hash at a position stands until the position is computed again."""
        logits: NDArray[np.float32] = self._backend.logits(*arguments)
        if self._phase not in ("draft", "prefill"):
            for row, (where, _, _) in zip(logits, self._samples, strict=True):
                self.digests[where] = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        return logits

    def sample(self, logits: NDArray[np.float32], parameters: SamplingParameters, position: int) -> Sample:
        """Sample for real, then say what the trace says."""
        real = self._backend.sample(logits, parameters, position)
        _, token, confidence = self._samples.popleft()
        if token < 0:
            raise TraceError("the replay asked for a draft longer than the trace holds", "lower --draft-length")
        return Sample(token, confidence, real.logprob)
