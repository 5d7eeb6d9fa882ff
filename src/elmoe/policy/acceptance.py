"""How likely the target accepts a draft token: by the share of routing that residents cover, and by its confidence."""

from __future__ import annotations

from itertools import pairwise

CONFIDENCE_EDGES = (0.3, 0.5, 0.7, 0.9, 0.97)
"""Edges of the bins in which acceptance is counted by confidence."""
DISAGREEMENT = 0.25
"""Assumed rejections per doubt (1 - confidence) of a draft token. Draft and target doubt alike and draw with the same noise.
Measured on the demo model with 25 and 50 % of the experts, greedy and at temperature 0.8 (docs/log.md, 2026-11-28): 0.19 to
0.33 below a confidence of 0.3, where most tokens are, and 0.03 to 0.3 from there to 0.5."""
BIN_TOKENS = 4.0
"""Weight of the assumed acceptance of a bin, in judged tokens."""
BIN_DECAY = 0.995
"""Decay of a bin's counts per judged token."""

TOP, SPREAD = 0.95, 0.6
"""Assumed acceptance where residents cover the whole natural routing, and its loss where they cover nothing. Fitted on the
demo model at temperature 0.8 (25, 50 and 100 % of the experts resident, prompts of the paper's four kinds)."""
CURVE_REJECTIONS = 4.0
"""Weight of the assumed curve, in expected rejections."""
CURVE_DECAY = 0.9967
"""Decay of the curve's counts per judged token: 0.9 in 32 tokens. One trial must not move the curve far (docs/log.md,
2026-11-27)."""
LEAST_SCALE, LARGEST_SCALE = 0.1, 20.0
"""Bounds of the learned rejection rate, as a multiple of the assumed one."""
LEAST, LARGEST = 0.02, 0.995
"""Bounds of an expected acceptance."""


def confidence_bin(confidence: float) -> int:
    """Index of the bin of a confidence in 0..1."""
    return sum(confidence >= edge for edge in CONFIDENCE_EDGES)


class Acceptance:
    """Acceptance of draft tokens, learned from judged ones; always given that the token's prefix was accepted.

    A token that is not drafted yet is expected to be accepted as the covered share c of the routing tells: its rejection
    rate is ``scale * (1 - top + spread * (1 - c))``. The scale is the ratio of seen to assumed rejections. A token that is
    drafted also has a confidence: its acceptance is that of its confidence bin, a Beta mean.
    """

    def __init__(self, top: float = TOP, spread: float = SPREAD) -> None:
        self._top, self._spread = top, spread
        self._rejected = self._assumed = CURVE_REJECTIONS
        middles = [(low + high) / 2 for low, high in pairwise((0.0, *CONFIDENCE_EDGES, 1.0))]
        self._accepted = [BIN_TOKENS * (1 - DISAGREEMENT * (1 - middle)) for middle in middles]
        self._seen = [BIN_TOKENS] * len(middles)

    def expected(self, covered: float) -> float:
        """Acceptance of a token not drafted yet, residents covering the share ``covered`` (0..1) of the routing."""
        scale = min(LARGEST_SCALE, max(LEAST_SCALE, self._rejected / self._assumed))
        return min(LARGEST, max(LEAST, 1 - scale * self._rejection(covered)))

    def of(self, confidence: float) -> float:
        """Acceptance of a token drafted with this confidence."""
        index = confidence_bin(confidence)
        return self._accepted[index] / self._seen[index]

    def observe(self, confidence: float, accepted: bool, covered: float) -> None:
        """Learn from one judged token."""
        index = confidence_bin(confidence)
        self._accepted[index] = self._accepted[index] * BIN_DECAY + accepted
        self._seen[index] = self._seen[index] * BIN_DECAY + 1
        self._rejected = self._rejected * CURVE_DECAY + (not accepted)
        self._assumed = self._assumed * CURVE_DECAY + self._rejection(covered)

    def _rejection(self, covered: float) -> float:
        """Assumed rejection rate."""
        return 1 - self._top + self._spread * (1 - covered)
