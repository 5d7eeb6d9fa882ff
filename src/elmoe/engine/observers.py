"""Those who watch a run: counters, a trace, a timeline. The step does not know them, and results do not depend on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from elmoe.engine.observe import Timeline
from elmoe.engine.passes import Pass
from elmoe.engine.statistics import Statistics
from elmoe.engine.verifying import Outcome

if TYPE_CHECKING:  # pyarrow loads only when a trace is wanted
    from elmoe.trace import TraceRecorder


class StatisticsObserver:
    """Counts passes and seconds, and what came of drafts."""

    kernels = False

    def __init__(self, statistics: Statistics) -> None:
        self.statistics = statistics

    def on_pass(self, done: Pass) -> None:
        """See ``Observer``."""
        counters = self.statistics.phases[done.phase]
        counters.steps += 1
        counters.tokens += len(done.rows)
        counters.seconds += done.seconds
        counters.waited_seconds += done.waited
        if done.phase == "draft":
            self.statistics.drafted += len(done.rows)

    def on_kernel(self, name: str, began: float, ended: float) -> None:
        """See ``Observer``."""

    def on_outcome(self, outcome: Outcome) -> None:
        """Count what a step committed."""
        statistics = self.statistics
        for verdict in outcome.verdicts.values():
            statistics.committed += len(verdict.rows)
            if verdict.drafted:
                accepted = sum(accepted for _, accepted in verdict.judged)
                statistics.accepted += accepted
                statistics.rejected += len(verdict.judged) - accepted
                statistics.verifications += 1
                statistics.verified += len(verdict.rows)


class TimelineObserver:
    """Puts passes and kernel calls on a timeline."""

    kernels = True

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def on_pass(self, done: Pass) -> None:
        """See ``Observer``."""
        self._timeline.add("passes", f"{done.phase}, {len(done.rows)} tokens", done.began, done.ended)

    def on_kernel(self, name: str, began: float, ended: float) -> None:
        """See ``Observer``."""
        self._timeline.kernel(name, began, ended)


class TraceObserver:
    """Hands the facts of every pass to a recorder. Rows of prompts are of phase ``prefill``, also in a mixed pass."""

    kernels = False

    def __init__(self, recorder: TraceRecorder) -> None:
        self._recorder = recorder

    def on_pass(self, done: Pass) -> None:
        """See ``Observer``."""
        count = len(done.rows)
        targets: list[int | None] = [None] * count
        drafts: list[int | None] = [None] * count
        confidences: list[float | None] = [None] * count
        phases, lengths = ["prefill"] * count, [0] * count
        own = "plain" if done.phase == "mixed" else done.phase
        for index, (row, sample) in enumerate(zip(done.rows[: done.sampled], done.samples, strict=True)):
            phases[index] = own
            proposal = done.proposals.get(row.sequence)
            drafted = [] if proposal is None else proposal.tokens
            lengths[index] = len(drafted)
            if own == "draft":
                drafts[index], confidences[index] = sample.token, sample.confidence
                continue
            targets[index] = sample.token
            depth = row.position + 1 - len(row.sequence.tokens)
            if proposal is not None and depth < len(drafted):
                drafts[index], confidences[index] = drafted[depth], proposal.confidences[depth]
        self._recorder.record(
            phases=phases,
            step=done.step,
            sequences=np.array([row.sequence.index for row in done.rows], np.int32),
            positions=np.array([row.position for row in done.rows], np.int32),
            tokens=np.array([row.token for row in done.rows], np.int32),
            targets=targets,
            drafts=drafts,
            confidences=confidences,
            draft_lengths=lengths,
            ranked=list(done.routings.ranked),
            scores=list(done.routings.scores),
            resident=done.resident,
        )

    def on_kernel(self, name: str, began: float, ended: float) -> None:
        """See ``Observer``."""
