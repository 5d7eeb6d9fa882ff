"""Elementary functions with the same bits everywhere.

Only operations that IEEE 754 defines exactly are used (add, multiply, divide, square root, rint, min, max, exponent
shifts), one rounding each, nothing fused. ``np.exp``, ``np.sum`` and their like are avoided because their bits depend on
the processor and the NumPy build. The native kernels repeat these lines operation by operation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = 16
"""Partial sums of a reduction: element ``i`` belongs to lane ``i mod 16``."""

_f = np.float32
EXP_LOW, EXP_HIGH = _f(-87.0), _f(88.0)
LOG2_E = _f(1.44269504)
LN2_HIGH, LN2_LOW = _f(0.693359375), _f(-2.12194440e-4)
# Cephes expf (S. Moshier), relative error below 2e-7 on |r| <= ln(2) / 2.
EXP_POLYNOMIAL = tuple(
    _f(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)

LOG_SQRT_HALF = 0.70710678118654752440
LN2_HIGH_64, LN2_LOW_64 = 6.93147180369123816490e-01, 1.90821492927058770002e-10
# FreeBSD e_log.c (Sun Microsystems), error below 1 ulp.
LOG_POLYNOMIAL = (
    1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01,
    2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01,
)  # fmt: skip
TWO_OVER_PI = 6.36619772367581382433e-01
# pi / 2 in parts of 33 bits (FreeBSD e_rem_pio2.c): n times a part is exact for n < 2^20.
HALF_PI_PARTS = (1.57079632673412561417e00, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
SIN_POLYNOMIAL = (
    1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06, -1.98412698298579493134e-04,
    8.33333333332248946124e-03, -1.66666666666666324348e-01,
)  # fmt: skip
COS_POLYNOMIAL = (
    -1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07, 2.48015872894767294178e-05,
    -1.38888888888741095749e-03, 4.16666666666666019037e-02,
)  # fmt: skip


def exp(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """exp of float32; 0 below -87, and arguments above 88 count as 88."""
    x = np.asarray(x, np.float32)
    bounded = np.minimum(np.maximum(x, EXP_LOW), EXP_HIGH)
    n = np.rint(bounded * LOG2_E)
    r: NDArray = bounded - n * LN2_HIGH
    r = r - n * LN2_LOW
    p: NDArray = np.full_like(r, EXP_POLYNOMIAL[0])
    for coefficient in EXP_POLYNOMIAL[1:]:
        p = p * r + coefficient
    p = (p * (r * r) + r) + _f(1)
    power = ((n.astype(np.int32) + 127) << 23).view(np.float32)
    return np.where(x < EXP_LOW, _f(0), p * power)


def log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Natural logarithm of positive normal float64."""
    x = np.asarray(x, np.float64)
    bits = x.view(np.int64) if x.ndim else np.array(x).view(np.int64)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & 0x000FFFFFFFFFFFFF) | 0x3FE0000000000000).view(np.float64)  # in [1/2, 1)
    small = mantissa < LOG_SQRT_HALF
    f = np.where(small, mantissa + mantissa, mantissa) - 1.0
    k = (exponent + np.where(small, 0, 1)).astype(np.float64)
    s = f / (2.0 + f)
    z = s * s
    p = np.full_like(z, LOG_POLYNOMIAL[0])
    for coefficient in LOG_POLYNOMIAL[1:]:
        p = p * z + coefficient
    half_square = 0.5 * f * f
    return k * LN2_HIGH_64 - ((half_square - (s * (half_square + z * p) + k * LN2_LOW_64)) - f)


def sine_cosine(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(sin, cos) of float64, for 0 <= x < 1.6e6."""
    n = np.rint(x * TWO_OVER_PI)
    r: NDArray = x
    for part in HALF_PI_PARTS:
        r = r - n * part
    z = r * r
    s: NDArray = np.full_like(z, SIN_POLYNOMIAL[0])
    for coefficient in SIN_POLYNOMIAL[1:]:
        s = s * z + coefficient
    sine = r + r * (z * s)
    c = np.full_like(z, COS_POLYNOMIAL[0])
    for coefficient in COS_POLYNOMIAL[1:]:
        c = c * z + coefficient
    cosine = (1.0 - 0.5 * z) + z * (z * c)
    quadrant = n.astype(np.int64) & 3
    swapped = (quadrant & 1) == 1
    sin_sign = np.where(quadrant >= 2, -1.0, 1.0)
    cos_sign = np.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0)
    return sin_sign * np.where(swapped, cosine, sine), cos_sign * np.where(swapped, sine, cosine)


def tree_sum(lanes: NDArray) -> NDArray:
    """Sum of 16 lanes on the last axis: lane i takes i + 8, then i + 4, i + 2, i + 1."""
    for half in (8, 4, 2, 1):
        lanes = lanes[..., :half] + lanes[..., half : 2 * half]
    return lanes[..., 0]


def lane_sum(x: NDArray) -> NDArray:
    """Sum over the last axis in the canonical order: 16 lanes from 0 in ascending order, then :func:`tree_sum`."""
    length = x.shape[-1]
    padding = -length % LANES
    if padding:
        x = np.concatenate([x, np.zeros((*x.shape[:-1], padding), x.dtype)], axis=-1)
    lanes = np.zeros((*x.shape[:-1], LANES), x.dtype)
    for start in range(0, length + padding, LANES):
        lanes = lanes + x[..., start : start + LANES]
    return tree_sum(lanes)


def exp64(x: float) -> float:
    """exp in float64 by halving the argument 10 times, a Taylor series, and squaring; for tables only."""
    r = x / 1024.0
    term, total = 1.0, 1.0
    for i in range(1, 14):
        term = term * r / i
        total = total + term
    for _ in range(10):
        total = total * total
    return total
