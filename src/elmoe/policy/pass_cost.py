"""What a target pass costs to compute, learned from passes of very different sizes: decode steps and prompts."""

from __future__ import annotations

PRIOR = 0.1
"""Weight, in passes, of the belief that weights are read at the assumed bandwidth."""


class PassCost:
    """Seconds of a pass as ``scale * reading + slope * tokens``: least squares of relative errors over a decayed past.

    ``reading`` is what reading the weights that the pass touches would take at an assumed bandwidth: it grows ever more
    slowly with tokens, which share experts, and a straight line through a prompt's pass misjudges one of few tokens.
    """

    def __init__(self, decay: float = 0.98) -> None:
        self._decay = decay
        self._rr = self._rt = self._tt = self._r = self._t = 0.0

    def observe(self, tokens: float, reading: float, seconds: float) -> None:
        """Learn from one pass."""
        r, t = reading / seconds, tokens / seconds
        new = (r * r, r * t, t * t, r, t)
        old = (self._rr, self._rt, self._tt, self._r, self._t)
        self._rr, self._rt, self._tt, self._r, self._t = (
            self._decay * before + value for before, value in zip(old, new, strict=True)
        )

    def seconds(self, tokens: float, reading: float) -> float:
        """Predicted seconds; neither part is taken as negative."""
        rr, r = self._rr + PRIOR, self._r + PRIOR
        determinant = rr * self._tt - self._rt * self._rt
        scale, slope = r / rr, 0.0
        if determinant > 1e-9 * rr * self._tt:
            scale, slope = (r * self._tt - self._rt * self._t) / determinant, (rr * self._t - self._rt * r) / determinant
        if slope < 0:
            scale, slope = r / rr, 0.0
        elif scale < 0:
            scale, slope = 0.0, self._t / self._tt
        return scale * reading + slope * tokens
