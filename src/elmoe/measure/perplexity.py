"""Perplexity of the target and of a draft on a text, teacher-forced in windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.arithmetic import exp, lane_sum, log
from elmoe.engine.decoder import AllExperts, Draft, Tokens
from elmoe.engine.kv import KVPool
from elmoe.engine.session import Session
from elmoe.errors import RequestError

CHUNK = 128
"""Tokens computed in one pass."""


@dataclass(frozen=True)
class Perplexity:
    """``nats``: mean cross-entropy per token of the target and of the draft; ``agreement``: share of positions at which
    both have the same most likely token; ``tokens``: positions scored."""

    target_nats: float
    draft_nats: float
    agreement: float
    tokens: int

    @property
    def target(self) -> float:
        """exp(nats) of the target."""
        return float(np.exp(self.target_nats))

    @property
    def draft(self) -> float:
        """exp(nats) of the draft."""
        return float(np.exp(self.draft_nats))


class TeacherForcing:
    """Logits of given tokens on a store that is wholly in memory, in passes of ``CHUNK`` tokens.

    ``counts`` (MoE layers, experts): how often the target used each expert since it was last set to 0.
    """

    def __init__(self, session: Session, window: int) -> None:
        spec = session.reader.spec
        self._decoder = session.engine._decoder
        self._decoder.reserve_positions(window)
        self._pool = KVPool(spec, 1, window)
        self._pool.reserve(0, window)
        self._source = AllExperts(session.reader)
        self.counts = np.zeros((len(spec.moe_layers), spec.experts), np.int64)

    def logits(self, tokens: NDArray[np.int32], draft: Draft | None = None) -> Iterator[NDArray[np.float32]]:
        """(up to ``CHUNK``, vocabulary) logits behind each of at most ``window`` tokens, which start at position 0."""
        for start in range(0, len(tokens), CHUNK):
            positions = np.arange(start, min(start + CHUNK, len(tokens)), dtype=np.int32)
            batch = Tokens(tokens[positions], np.zeros_like(positions), positions)
            logits, routings = self._decoder.forward(batch, self._pool.cache, self._source, draft)
            if draft is None:
                for counts, experts in zip(self.counts, routings.experts, strict=True):
                    counts += np.bincount(experts.ravel(), minlength=len(counts))
            yield logits


def evaluate(
    session: Session,
    text: str,
    window: int = 256,
    windows: int | None = None,
    share: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Score a text in windows of ``window`` tokens that do not overlap.

    :param share: share of each layer's experts the draft may use: those the target used most in the window before
        (all of them in the first).
    :raises RequestError: the text is shorter than one window, or the window is longer than the context.
    """
    spec = session.reader.spec
    if not 2 <= window <= spec.max_positions:
        raise RequestError(f"a window of {window} tokens does not fit the context of {spec.max_positions}")
    ids = np.array(session.encode(text), np.int32)
    count = len(ids) // window if windows is None else min(windows, len(ids) // window)
    if count == 0:
        raise RequestError(f"the text has {len(ids)} tokens, a window needs {window}", "give a longer text or --window")
    source = TeacherForcing(session, window)
    keep = max(spec.top_k, round(share * spec.experts))
    allowed = np.ones((len(spec.moe_layers), spec.experts), np.uint8)
    sums = np.zeros(2)
    agreed = scored = 0
    for index in range(count):
        tokens = ids[index * window : (index + 1) * window]
        counts = np.zeros((len(spec.moe_layers), spec.experts), np.int64)
        best = []
        for which, draft in enumerate((None, Draft(allowed, spec.top_k))):
            parts = []
            for start, logits in zip(range(0, window - 1, CHUNK), source.logits(tokens[:-1], draft), strict=True):
                following = tokens[start + 1 : start + 1 + len(logits)]
                top = logits.max(axis=1, keepdims=True)
                total = log(lane_sum(exp(logits - top).astype(np.float64)))
                sums[which] += float((total - (logits - top)[np.arange(len(logits)), following]).sum())
                parts.append(logits.argmax(axis=1))
            best.append(np.concatenate(parts))
        agreed += int((best[0] == best[1]).sum())
        scored += window - 1
        order = np.argsort(-counts, axis=1, kind="stable")[:, :keep]
        allowed = np.zeros_like(allowed)
        np.put_along_axis(allowed, order, 1, axis=1)
        if progress is not None:
            progress(index + 1, count)
    return Perplexity(sums[0] / scored, sums[1] / scored, agreed / scored, scored)
