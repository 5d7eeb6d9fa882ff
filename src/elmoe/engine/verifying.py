"""Verifying: a pass of the target over every drafted position and one more, beside chunks of prompts; then judgement."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from elmoe.engine.passes import Pass, Passes, Row, most_likely
from elmoe.engine.scheduler import Batch, Scheduler
from elmoe.engine.sequence import Proposals, Sequence, judge
from elmoe.engine.tier import ExpertTier
from elmoe.errors import NumericsError, RequestError


@dataclass(slots=True)
class Verdict:
    """What the target says of one sequence: rows of the pass whose samples stand, the confidence of each judged draft token
    with whether it is accepted, and how many tokens were drafted."""

    rows: range
    judged: list[tuple[float, bool]]
    drafted: int


@dataclass
class Outcome:
    """What a step computed. ``passes``: one, or one per sequence where a sequence failed."""

    batch: Batch
    verdicts: dict[Sequence, Verdict]
    passes: list[Pass] = field(default_factory=list)
    drafted: int = 0
    """Tokens drafted in all."""
    routing: NDArray[np.int32] | None = None
    """(layers, tokens, k) of the tokens that the last pass committed, by sequence, behind them those of prompts; None where
    the tier does not learn."""


class Verifier:
    """Runs the target."""

    def __init__(
        self, passes: Passes, scheduler: Scheduler, tier: ExpertTier, eos: tuple[int, ...], limit: int | None
    ) -> None:
        self._passes, self._scheduler, self._tier, self._eos, self._limit = passes, scheduler, tier, eos, limit

    def run(self, batch: Batch, proposals: Proposals) -> Outcome:
        """Forward, judge, and append the tokens that stand. A value that is not finite, or a grammar that cannot be
        followed, ends the request it belongs to; the others are then computed one by one, which gives the same bits."""
        outcome = Outcome(batch, {})
        try:
            self._pass(batch, proposals, outcome)
        except (NumericsError, RequestError):
            self._tier.abandon_pass()
            for one in batch.decoding:  # without drafts: a token that the target would not have drawn may be what failed
                self._alone(one, Batch([one], []), outcome)
            for chunk in batch.chunks:
                self._alone(chunk.sequence, Batch([], [chunk]), outcome)
        return outcome

    def _alone(self, sequence: Sequence, batch: Batch, outcome: Outcome) -> None:
        """A pass of one sequence; it fails if that still cannot be computed."""
        try:
            self._pass(batch, {}, outcome)
        except (NumericsError, RequestError) as error:
            self._tier.abandon_pass()
            self._scheduler.fail(sequence, error)

    def _pass(self, batch: Batch, proposals: Proposals, outcome: Outcome) -> None:
        """One pass; its verdicts go to the outcome, its tokens to the sequences."""
        rows: list[Row] = []
        spans: dict[Sequence, range] = {}
        for sequence in batch.decoding:
            position, start = len(sequence.tokens) - 1, len(rows)
            rows.append(Row(sequence, position, sequence.tokens[-1]))
            if sequence in proposals:
                rows += [Row(sequence, position + i, token) for i, token in enumerate(proposals[sequence].tokens, 1)]
            spans[sequence] = range(start, len(rows))
        sampled = len(rows)
        for chunk in batch.chunks:
            rows += [Row(chunk.sequence, at, chunk.sequence.tokens[at]) for at in range(chunk.first, chunk.last)]
        sure = [span[0] for span in spans.values()] + list(range(sampled, len(rows)))
        phase = "prefill" if not batch.decoding else "mixed" if batch.chunks else "verify" if proposals else "plain"
        self._tier.begin_step(sure)
        done = self._passes.run(phase, rows, proposals, sampled)
        outcome.passes.append(done)
        kept: list[int] = []
        for sequence, span in spans.items():
            verdict = self._judge(sequence, span, done, proposals)
            outcome.verdicts[sequence] = verdict
            outcome.drafted += verdict.drafted
            kept += verdict.rows
        if self._tier.learns:
            outcome.routing = done.routings.of([*kept, *range(sampled, len(rows))])
            self._tier.end_step(phase, outcome.routing)
        else:
            self._tier.end_step(phase, None)

    def _judge(self, sequence: Sequence, span: range, done: Pass, proposals: Proposals) -> Verdict:
        """Append the samples that stand to the sequence, up to its end."""
        proposal, wanted = proposals.get(sequence), sequence.request.alternatives
        if proposal is None and not wanted:  # plain decoding: the one sample stands
            sequence.commit(done.samples[span[0]], self._eos)
            return Verdict(span, [], 0)
        samples = [done.samples[row] for row in span]
        drafted = [] if proposal is None else proposal.tokens
        stand, accepted = judge(drafted, [sample.token for sample in samples], self._limit)
        kept = 0
        for row, sample in zip(span[:stand], samples, strict=False):
            likely = most_likely(self._passes.logits[row], wanted) if wanted else ()
            sequence.commit(sample, self._eos, likely)
            kept += 1
            if sequence.finish is not None:
                break
        judged = [] if proposal is None else list(zip(proposal.confidences, accepted, strict=False))[:kept]
        return Verdict(span[:kept], judged, len(drafted))
