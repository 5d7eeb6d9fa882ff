"""What was measured for each tiny checkpoint, and how far from it a test may be.

Integer activations make these random models jumpy: where a router is nearly undecided, INT8 noise picks another expert
and the logits of a position move by tens of percent. So the largest error over all logits (``maximum``) is a property of
the seed, the median over positions is what INT8 costs. Bounds are twice the measured values.
"""

from __future__ import annotations

from dataclasses import dataclass

FLOAT_BOUND = 2e-5
"""Float backend against transformers; measured 3.7e-6 at most, most of it from float32 norms there."""

FAMILY_BOUND = 1e-5
"""The same for the families of ``tests/family_configs.py``; measured 2.0e-6 at most."""


@dataclass(frozen=True)
class Measured:
    """Relative logit errors of W8A8 against the float model: maximum / max |b|; rms over all; median over positions.
    ``agreeing``: leading positions at which W8A8 and the float backend with INT8 activations differ by rounding only."""

    maximum: float
    rms: float
    median: float
    agreeing: int


# From ``tools/golden/make_golden.py --measure``.
MEASURED = {
    "gqa_tied": Measured(0.272, 0.096, 0.045, 80),
    "wide_heads_bf16": Measured(0.118, 0.055, 0.041, 34),
    "mha_odd_widths": Measured(0.194, 0.065, 0.039, 10),
    "dense_layers_bf16": Measured(0.116, 0.047, 0.035, 5),
    "sparse_step_shards": Measured(0.255, 0.090, 0.041, 80),
    "all_experts": Measured(0.084, 0.040, 0.034, 67),
    "top_one": Measured(0.469, 0.118, 0.027, 20),
}
