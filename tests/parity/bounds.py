"""What was measured for each tiny checkpoint, and how far from it a test may be.

Integer activations make these random models jumpy: where a router is nearly undecided, INT8 noise picks another expert
and the logits of a position move by tens of percent. So the largest error over all logits (``maximum``) is a property of
the seed, the median over positions is what INT8 costs. Bounds are twice the measured values.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BOUND = 1e-4
"""Float backend against transformers; measured 2.4e-6 at most."""


@dataclass(frozen=True)
class Measured:
    """Relative logit errors of W8A8 against the float model: maximum / max |b|; rms over all; median over positions.
    ``agreeing``: leading positions at which W8A8 and the float backend with INT8 activations differ by rounding only."""

    maximum: float
    rms: float
    median: float
    agreeing: int


MEASURED: dict[str, Measured] = {}
