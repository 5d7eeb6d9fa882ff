"""Driving a store of random weights by a recorded trace: bytes, reads and kernels are real; tokens, routing and acceptance
are the trace's, the same for every run. Results are labelled ``replayed``.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Backend, Draft, Routings, Sample, SamplingParameters
from elmoe.engine.request import Request
from elmoe.engine.statistics import Phase
from elmoe.errors import TraceError
from elmoe.models.spec import ModelSpec
from elmoe.trace.draft_facts import DraftFacts

PERMUTATION_SEED = 20260414
"""Of the fixed permutation of experts under which an odd layer repeats the even layer before it."""


class ReplayBackend:
    """A kernel backend, and the engine's ``script``, that computes everything and then says what the trace says.

    Layers 2l and 2l+1 replay the trace's layer l (modulo its layers), the second under a fixed permutation of experts; each
    token runs the best ``top_k`` of the recorded ranking with weights from its recorded scores. A draft takes the best
    resident ones of that ranking and fills up with other residents. Of several ``traces`` of the same sequences, recorded
    with different shares of resident MSB slices, a step replays the nearest: acceptance depends on what was resident.
    """

    def __init__(self, backend: Backend, spec: ModelSpec, traces: Sequence[DraftFacts]) -> None:
        facts = traces[0]
        ranks = facts.target_routes.shape[-1]
        if facts.experts != spec.experts or ranks < spec.top_k:
            raise TraceError(
                f"the trace ranks {ranks} of {facts.experts} experts, the store uses {spec.top_k} of {spec.experts}",
                "record the trace on a model with as many experts and at least half the top-k",
            )
        if int(facts.tokens.max()) >= spec.vocabulary:
            raise TraceError(f"the trace has token {int(facts.tokens.max())}, the store's vocabulary is {spec.vocabulary}")
        self._backend, self._facts = backend, facts
        self._traces = {trace.resident: trace for trace in traces}
        rng = np.random.Generator(np.random.PCG64(PERMUTATION_SEED))
        self._permutation = rng.permutation(spec.experts).astype(np.int32)
        self._phase = ""
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

    def begin(self, phase: Phase, rows: list[tuple[int, int, int]], sampled: int, resident: float) -> None:
        """See ``elmoe.engine.passes.Script``: look the pass's facts up, in the trace of the nearest resident share."""
        facts = self._traces[min(self._traces, key=lambda share: abs(share - resident))]
        requests, last, positions = (np.array(column) for column in zip(*rows, strict=True))
        sequences = np.array(self._sequences)[requests]
        index = (sequences, last, positions - last)
        self._phase, draft = phase, phase == "draft"
        if int(index[2].max()) >= facts.depths + (not draft):
            raise TraceError(f"the trace holds drafts of {facts.depths} tokens", "lower --draft-length, or record it anew")
        self._routes = (facts.draft_routes if draft else facts.target_routes)[index].astype(np.int32)
        self._scores = (facts.draft_scores if draft else facts.target_scores)[index].astype(np.float32)
        tokens = (facts.draft_tokens if draft else facts.target_tokens)[index].tolist()
        confidences = facts.confidences[index].tolist() if draft else [1.0] * len(rows)
        where = zip(sequences.tolist(), positions.tolist(), strict=True)
        self._samples = deque(list(zip(where, tokens, confidences, strict=True))[:sampled])

    def embed(self, *arguments: Any, **named: Any) -> NDArray[np.float32]:
        """See ``Backend``."""
        return self._backend.embed(*arguments, **named)

    def forward(self, *arguments: Any, draft: Draft | None = None, **named: Any) -> Routings:
        """The real layers, whose routers are overruled: see ``Backend``."""

        def routed(row: int, routings: Routings) -> None:
            self.routed(row, routings, draft)

        return self._backend.forward(*arguments, draft=draft, routed=routed, **named)

    def routed(self, row: int, routings: Routings, draft: Draft | None) -> None:
        """Overwrite a row's real routing by what the trace says; ranks beyond the trace's are -1."""
        source = row // 2 % self._routes.shape[1]
        ranked, scores = self._routes[:, source], self._scores[:, source]
        if row % 2:
            ranked = self._permutation[ranked]
        tokens, wanted = routings.experts[row].shape
        if draft is None:
            chosen = ranked[:, :wanted]
        else:
            allowed = draft.allowed[row]
            preference = np.zeros((tokens, len(allowed)), np.float32)
            np.put_along_axis(preference, ranked, 1 + scores, axis=1)
            preference[:, allowed == 0] = -1
            count = min(wanted, int(np.count_nonzero(allowed)))
            chosen = np.argsort(-preference, axis=1, kind="stable")[:, :count].astype(np.int32)
        weights = np.full((tokens, self._permutation.size), 1e-6, np.float32)
        np.put_along_axis(weights, ranked, scores, axis=1)
        experts = np.sort(chosen, axis=1)
        values = np.take_along_axis(weights, experts, axis=1)
        values /= values.sum(axis=1, keepdims=True)
        for target, said, rest in (
            (routings.ranked, ranked, -1), (routings.scores, scores, 0),
            (routings.experts, experts, -1), (routings.weights, values, 0),
        ):  # fmt: skip
            width = min(said.shape[1], target.shape[2])
            target[row, :, :width], target[row, :, width:] = said[:, :width], rest

    def committed_digests(self) -> dict[tuple[int, int], bytes]:
        """Hashes of the logits by (sequence, position), and forget them: what runs of the same trace must agree on."""
        digests, self.digests = self.digests, {}
        return digests

    def logits(self, *arguments: Any, **named: Any) -> NDArray[np.float32]:
        """The real logits; their hash at a position stands until the position is computed again."""
        logits: NDArray[np.float32] = self._backend.logits(*arguments, **named)
        if self._phase not in ("draft", "prefill"):
            for row, (where, _, _) in zip(logits, self._samples, strict=True):
                self.digests[where] = hashlib.blake2b(row.tobytes(), digest_size=16).digest()
        return logits

    def sample(
        self, logits: NDArray[np.float32], parameters: SamplingParameters, position: int,
        adjusted: NDArray[np.float32] | None = None,
    ) -> Sample:  # fmt: skip
        """Sample for real, then say what the trace says."""
        real = self._backend.sample(logits, parameters, position, adjusted)
        _, token, confidence = self._samples.popleft()
        if token < 0:
            raise TraceError("the replay asked for a draft longer than the trace holds", "lower --draft-length")
        return Sample(token, confidence, real.logprob)
