"""One pass of the model over rows of sequences: forward, sample, and tell those who watch."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import Backend, Report, Sample
from elmoe.bitslice.arithmetic import exp, lane_sum, log
from elmoe.engine.decoder import Decoder, Draft, Places, Routings
from elmoe.engine.kv_cache import PagedCache
from elmoe.engine.request import Alternatives
from elmoe.engine.sequence import Proposals, Sequence
from elmoe.engine.statistics import Phase
from elmoe.engine.tier import ExpertTier


class Row(NamedTuple):
    """A token to compute: its sequence, its position in the text and its id. ``cell``: where in the sequence's pages its
    keys and values lie; None is the cell of its position. ``parent``: the row of this pass with the token before it; None
    where the tokens before it are in the cells of their positions. The rows of a chain leave both out."""

    sequence: Sequence
    position: int
    token: int
    cell: int | None = None
    parent: int | None = None


def places_of(rows: list[Row]) -> Places:
    """Where the rows' tokens are."""
    slots = np.array([row.sequence.entry.row for row in rows], np.int32)
    positions = np.array([row.position for row in rows], np.int32)
    for row in rows:
        if row.cell is not None:
            cells = [one.position if one.cell is None else one.cell for one in rows]
            parents = [-1 if one.parent is None else one.parent for one in rows]
            return Places(slots, positions, np.array(cells, np.int32), np.array(parents, np.int32))
    return Places(slots, positions)


def drafted_up_to(index: int, rows: list[Row], proposals: Proposals) -> list[int]:
    """The tokens behind the committed ones up to a row's own: of its branch in this pass, and before it of the chain that
    ``proposals`` hold."""
    row, branch = rows[index], []
    while row.parent is not None:
        branch.append(row.token)
        row = rows[row.parent]
    depth = row.position + 1 - len(row.sequence.tokens)
    if depth > 0:
        branch.append(row.token)
        branch += proposals[row.sequence].tokens[: depth - 1][::-1] if depth > 1 else []
    return branch[::-1]


@dataclass(slots=True)
class Pass:
    """What a pass computed. The first ``sampled`` rows have samples, for the positions behind them; rows of prompts follow.
    ``proposals``: what is drafted so far, or verified.
    ``began``, ``ended``: seconds on the steady clock, of which ``waited`` for reads; ``step`` counts the engine's steps."""

    phase: Phase
    step: int
    rows: list[Row]
    proposals: Proposals
    sampled: int
    samples: list[Sample]
    routings: Routings
    resident: NDArray[np.bool_]
    began: float
    ended: float
    waited: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended - self.began


class Observer(Protocol):
    """Told of every pass, and of kernel calls where ``kernels`` says so. What it does has no effect on results."""

    kernels: bool

    def on_pass(self, done: Pass) -> None:
        """A pass has ended."""
        ...

    def on_kernel(self, name: str, began: float, ended: float) -> None:
        """A span of computation within a pass."""
        ...


class Script(Protocol):
    """Told what each pass computes before it runs (a replay overrides routing and samples by it)."""

    def begin(self, phase: Phase, rows: list[tuple[int, int, int]], sampled: int, resident: float) -> None:
        """A pass of (sequence index, position of the last committed token, position computed) rows begins, of which the
        first ``sampled`` are sampled; a row of a prompt has its own position for the last. The share ``resident`` of MSB
        slices is in the fast tier."""
        ...


class Passes:
    """Runs passes on a decoder, a cache and a source of experts."""

    def __init__(
        self, decoder: Decoder, backend: Backend, cache: PagedCache, tier: ExpertTier, script: Script | None
    ) -> None:
        self._decoder, self._backend, self._cache, self._tier, self._script = decoder, backend, cache, tier, script
        self.observers: list[Observer] = []
        self._report: Report | None = None
        self.step = 0
        self.logits: NDArray[np.float32]  # of the last pass, (sampled, vocabulary)

    def watch(self, observers: list[Observer]) -> None:
        """Tell these from now on; the first that wants kernel calls gets them."""
        self.observers, self.step = observers, 0
        self._report = next((one.on_kernel for one in observers if one.kernels), None)

    def run(
        self, phase: Phase, rows: list[Row], proposals: Proposals, sampled: int | None = None, draft: Draft | None = None
    ) -> Pass:
        """Compute rows and sample the first ``sampled`` of them (None: all).

        :raises NumericsError: a value is not finite. :raises RequestError: a grammar cannot be followed.
        :raises KernelError: the rows are no chain, and the backend needs one.
        """
        count = len(rows) if sampled is None else sampled
        began, waited = perf_counter(), self._tier.waited
        ids, places = np.array([row.token for row in rows], np.int32), places_of(rows)
        if self._script is not None:
            told = [
                (row.sequence.index, len(row.sequence.tokens) - 1 if i < count else row.position, row.position)
                for i, row in enumerate(rows)
            ]
            self._script.begin(phase, told, count, float(self._tier.resident.msb.mean()))
        wanted = None if count == len(rows) else np.arange(count)
        self.logits, routings = self._decoder.forward(
            ids, places, self._cache.kernels, self._tier, draft, wanted, self._report
        )
        sample = self._backend.sample
        samples = [
            sample(self.logits[i], row.sequence.sampling, row.position + 1)
            if not row.sequence.adjusts
            else self._sample_adjusted(i, rows, proposals)
            for i, row in enumerate(rows[:count])
        ]
        ended, resident = perf_counter(), self._tier.resident.msb
        done = Pass(
            phase, self.step, rows, proposals, count, samples, routings, resident, began, ended, self._tier.waited - waited
        )
        for observer in self.observers:
            observer.on_pass(done)
        return done

    def _sample_adjusted(self, index: int, rows: list[Row], proposals: Proposals) -> Sample:
        """Sample a row of a sequence that adjusts what is drawn from."""
        row, logits = rows[index], self.logits[index]
        adjusted = row.sequence.adjust(logits, drafted_up_to(index, rows, proposals))
        return self._backend.sample(logits, row.sequence.sampling, row.position + 1, adjusted)


def most_likely(logits: NDArray[np.float32], count: int) -> Alternatives:
    """The ``count`` most likely tokens and their log-probabilities, best first, ties to the lowest id; a token's
    log-probability is that of ``bitslice.sample``, bit for bit."""
    best = float(logits.max())
    total = float(log(np.array([lane_sum(exp(logits - np.float32(best)).astype(np.float64))]))[0])
    order = np.argsort(-logits, kind="stable")[:count]
    return tuple((int(token), (float(logits[token]) - best) - total) for token in order)
