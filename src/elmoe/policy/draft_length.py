"""How long to draft: an inner stop by marginal gain per marginal cost, an outer choice between drafting and not.

Costs are seconds the engine measured (or the simulator modelled) and handed in; acceptance is calibrated to the draft's
confidence. The outer loop follows Cascade (arXiv 2506.20675): utility = tokens gained / time ratio, and gamma = 0 is
always allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

CONFIDENCE_EDGES = (0.3, 0.5, 0.7, 0.9, 0.97)
"""Bins in which acceptance is calibrated to the draft's confidence."""
DISAGREEMENT = 0.25
"""Rejection of a draft token per doubt (1 - confidence), until it was observed: draft and target doubt alike and draw with
the same noise. Measured on the demo model with 25 and 50 % of the experts, greedy and at temperature 0.8 (docs/log.md): 0.19
to 0.33 below a confidence of 0.3, where most tokens are, and 0.03 to 0.3 from there to 0.5."""

SETTLED, TRIAL = 4, 2
"""Plain steps before the first draft, and tokens of a draft that only finds out what drafts cost."""
RETRY, LONGEST_WAIT = 64, 1024
"""Plain steps between trials where drafts do not pay: at first, and at most."""
PROMISE = 1.02
"""Modelled gain below which drafts are left."""


def confidence_bin(confidence: float) -> int:
    """Index of the calibration bin of a confidence in 0..1."""
    return sum(confidence >= edge for edge in CONFIDENCE_EDGES)


class Calibration:
    """Acceptance by confidence bin: Beta counts that start from ``DISAGREEMENT`` and decay slowly."""

    def __init__(self, prior_weight: float = 4.0, decay: float = 0.995) -> None:
        edges = (0.0, *CONFIDENCE_EDGES, 1.0)
        middles = [(low + high) / 2 for low, high in pairwise(edges)]
        self._accepted = [prior_weight * (1 - DISAGREEMENT * (1 - middle)) for middle in middles]
        self._seen = [prior_weight] * len(middles)
        self._decay = decay

    def acceptance(self, confidence: float) -> float:
        """Probability that a draft token of this confidence is accepted, given that its prefix was."""
        index = confidence_bin(confidence)
        return self._accepted[index] / self._seen[index]

    def mean(self) -> float:
        """Acceptance over all bins."""
        return sum(self._accepted) / sum(self._seen)

    def observe(self, confidence: float, accepted: bool) -> None:
        """Learn from one draft token whose prefix was accepted."""
        index = confidence_bin(confidence)
        self._accepted[index] = self._accepted[index] * self._decay + accepted
        self._seen[index] = self._seen[index] * self._decay + 1


class LinearCost:
    """Seconds of a step as ``base + slope * tokens``: least squares over an exponentially decayed past.

    :param skip: first steps that do not count, because they pay for what is set up once.
    """

    def __init__(self, decay: float = 0.95, skip: int = 0) -> None:
        self._decay, self._skip = decay, skip
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self._n > 0

    def observe(self, tokens: int, seconds: float) -> None:
        """Learn from one step."""
        if self._skip > 0:
            self._skip -= 1
            return
        self._n = self._decay * self._n + 1
        self._x = self._decay * self._x + tokens
        self._y = self._decay * self._y + seconds
        self._xx = self._decay * self._xx + tokens * tokens
        self._xy = self._decay * self._xy + tokens * seconds

    def seconds(self, tokens: float) -> float:
        """Predicted seconds; the slope is taken as 0 where it cannot be told or comes out negative."""
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x * mean_x
        covariance = self._xy / self._n - mean_x * mean_y
        slope = max(0.0, covariance / variance) if variance > 1e-9 else 0.0
        return max(mean_y + slope * (tokens - mean_x), 0.1 * mean_y)


@dataclass
class DraftLengthController:
    """Chooses how many tokens to draft. ``fixed`` switches every choice off and always drafts that many.
    ``step_seconds``: seconds of a step of so many draft passes and verified tokens of so many sequences, where reads count
    too; by default the sum of ``draft_cost`` and ``verify_cost``.
    ``acceptance``: probability that a token not drafted yet would be accepted; by default the calibration's mean.

    Used per step: ``limit()`` before drafting, ``proceed()`` after each draft step, ``observe()`` at the end.
    """

    fixed: int | None = None
    longest: int = 8
    calibration: Calibration = field(default_factory=Calibration)
    draft_cost: LinearCost = field(default_factory=LinearCost)
    verify_cost: LinearCost = field(default_factory=LinearCost)
    step_seconds: Callable[[int, int, int], float] | None = None
    acceptance: Callable[[], float] | None = None
    _plain_rate: float = 0.0
    _elastic_rate: float = 0.0
    _plain_steps: int = 0
    _wait: int = 0
    _back_off: int = RETRY
    _since_plain: int = 0
    _since_elastic: int = 0

    def limit(self, sequences: int = 1) -> int:
        """Most tokens to draft for each of so many sequences in the next step; 0 is plain decoding.

        Plain decoding is measured first, then a short trial tells what drafts cost; from then on the length of the highest
        modelled rate is drafted, or none. Further trials come ever more rarely where drafts do not pay.
        """
        if self.fixed is not None:
            return self.fixed
        if self._plain_steps < SETTLED:
            return 0
        if self._wait > 0:
            self._wait -= 1
            return 0
        # Re-measure plain decoding now and then, rarely enough to cost under 2 %.
        if self._since_plain >= 64:
            return 0
        length = self._best_length(sequences) if self.draft_cost.known else 0
        if length == 0:
            self._pause()
        return length or TRIAL

    def _best_length(self, sequences: int) -> int:
        """The length of the highest modelled rate, 0 unless it promises more than plain decoding."""
        acceptance = min(0.99, self.calibration.mean())
        best, rate = 0, PROMISE / self.verify_cost.seconds(sequences)
        for length in range(1, self.longest + 1):
            tokens = (1 - acceptance ** (length + 1)) / (1 - acceptance)
            seconds = length * self.draft_cost.seconds(sequences) + self.verify_cost.seconds(sequences * (1 + length))
            if tokens / seconds > rate:
                best, rate = length, tokens / seconds
        return best

    def _pause(self) -> None:
        """No drafts for a while, the longer the oftener this happens."""
        self._wait, self._since_elastic, self._elastic_rate = self._back_off, 0, 0.0
        self._back_off = min(2 * self._back_off, LONGEST_WAIT)

    def proceed(self, confidences: Sequence[Sequence[float]], limit: int) -> list[bool]:
        """For each sequence of the draft batch, whether to draft one more token, of ``limit`` at most, after those of these
        confidences.

        Continues while some number of further tokens pays at least the rate of the step so far: ``reach * expected tokens of
        those further / their seconds > expected tokens / seconds``. One token alone would often not pay where the next ones
        would: verification gets cheaper by the token, because tokens share experts.
        """
        if self.fixed is not None:
            return [len(row) < self.fixed for row in confidences]
        if not (self.draft_cost.known and self.verify_cost.known):
            return [len(row) < self.longest for row in confidences]
        acceptance = (self.acceptance or self.calibration.mean)()
        sequences = len(confidences)
        drafted = sum(len(row) for row in confidences)
        expected, reaches = float(sequences), []
        for row in confidences:
            reach = 1.0
            for confidence in row:
                reach *= self.calibration.acceptance(confidence)
                expected += reach
            reaches.append(reach)
        depth = max((len(row) for row in confidences), default=0)
        step_seconds = self.step_seconds or self._step_seconds
        spent = step_seconds(depth, sequences + drafted, sequences)
        worth, tokens = 0.0, 0.0  # the best of tokens per second and sequence, given that the draft so far is accepted
        for further in range(1, limit - depth + 1):
            tokens += acceptance**further
            more = step_seconds(depth + further, sequences * (1 + further) + drafted, sequences) - spent
            worth = max(worth, tokens * sequences / max(more, 1e-9))
        return [reach * worth * spent > expected for reach in reaches]

    def _step_seconds(self, depth: int, tokens: int, sequences: int) -> float:
        return depth * self.draft_cost.seconds(sequences) + self.verify_cost.seconds(tokens)

    def observe(self, drafted: bool, sequences: int, committed: int, seconds: float) -> None:
        """Learn from a whole step: whether it drafted, the tokens it committed and the seconds it took."""
        if self.fixed is not None or seconds <= 0:
            return
        rate = committed / sequences / seconds
        if drafted:
            self._since_plain += 1
            self._elastic_rate = rate if self._elastic_rate == 0.0 else 0.8 * self._elastic_rate + 0.2 * rate
            self._since_elastic += 1
            if self._since_elastic >= 4 and self._elastic_rate < self._plain_rate:
                self._pause()
            elif self._since_elastic >= 16:
                self._back_off = RETRY
        else:
            self._since_plain = 0
            self._plain_steps += 1
            self._plain_rate = rate if self._plain_rate == 0.0 else 0.8 * self._plain_rate + 0.2 * rate
