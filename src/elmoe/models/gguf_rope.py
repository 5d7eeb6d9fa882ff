"""Scalings of the rotary embedding in GGUF files: metadata for linear and YaRN, a tensor of factors for Llama 3."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log, pi
from typing import Any

from elmoe.errors import ModelError
from elmoe.models.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling
from elmoe.untrusted import short

FACTORS = "rope_freqs.weight"
"""Divisors of the rotary frequencies, which files of Llama 3.1 and later have in place of metadata."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all published models with such factors have; the factor itself is the last divisor."""
NONE = (None, "none", "")
KEYS = (
    "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)  # fmt: skip
"""Metadata that :func:`scaling_config` reads."""


def llama3_factors(dimensions: int, theta: float, scaling: Llama3Scaling) -> list[float]:
    """The divisor of each pair's frequency, as converters of Llama 3 compute them."""
    low, high, factors = scaling.low_frequency_factor, scaling.high_frequency_factor, []
    for pair in range(dimensions // 2):
        turns = scaling.original_positions / (2 * pi * theta ** (2 * pair / dimensions))
        if turns > high:
            factors.append(1.0)
        elif turns < low:
            factors.append(scaling.factor)
        else:
            kept = (turns - low) / (high - low)
            factors.append(1 / ((1 - kept) / scaling.factor + kept))
    return factors


def scaling_config(
    metadata: Mapping[str, Any], architecture: str, factors: Callable[[], Sequence[float] | None], dimensions: int,
    theta: float,
) -> dict[str, Any] | None:  # fmt: skip
    """``rope_scaling`` as config.json would have it, None where nothing is scaled.

    :param factors: the values of the tensor :data:`FACTORS`, None where there is none.
    :raises ModelError: it is a scaling that is not supported.
    """

    def value(key: str) -> Any:
        return metadata.get(f"{architecture}.rope.scaling.{key}")

    kind, factor, divisors = value("type"), value("factor"), factors()
    if kind is None and factor not in (None, 0.0, 1.0):
        kind = "linear"  # as llama.cpp takes it
    if divisors is not None:
        if kind not in NONE:
            raise ModelError(f"tensor '{FACTORS}' and metadata '{architecture}.rope.scaling.type' both scale the rotation")
        return _llama3_config(divisors, dimensions, theta)
    if kind in NONE:
        if factor not in (None, 0.0, 1.0):
            raise ModelError(f"metadata '{architecture}.rope.scaling.factor' is {factor!r}, and the type is 'none'")
        return None
    if kind not in ("linear", "yarn"):
        raise ModelError(
            f"metadata '{architecture}.rope.scaling.type' is {short(kind, 40)!r}", "supported: none, linear, yarn"
        )
    if factor is None:
        raise ModelError(f"metadata '{architecture}.rope.scaling.factor' is missing", f"the type '{kind}' needs it")
    found = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        names = {"original_max_position_embeddings": "original_context_length", "beta_fast": "yarn_beta_fast",
                 "beta_slow": "yarn_beta_slow"}  # fmt: skip
        found |= {ours: value(theirs) for ours, theirs in names.items() if value(theirs) is not None}
    return found


def _llama3_config(divisors: Sequence[float], dimensions: int, theta: float) -> dict[str, Any]:
    """The scaling of Llama 3 that has these divisors; ModelError where none of the published ones has."""
    values = {"rope_type": "llama3", "factor": float(divisors[-1])} | LLAMA3
    scaling = Llama3Scaling(
        factor=float(divisors[-1]), low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=8192
    )
    expected = llama3_factors(dimensions, theta, scaling)
    if len(expected) != len(divisors) or any(abs(a / b - 1) > 1e-4 for a, b in zip(divisors, expected, strict=True)):
        raise ModelError(
            f"tensor '{FACTORS}' scales the rotary embedding with factors up to {divisors[-1]:g} that are not Llama 3's",
            "supported: low and high frequency factors 1 and 4 of a context of 8192",
        )
    return values


def scaling_metadata(
    rope: Rope, truncate: bool = True, attention_factor: float | None = None
) -> dict[str, int | float | str]:  # fmt: skip
    """GGUF's metadata of a scaling; ModelError where there is none that says it. ``truncate``, ``attention_factor``: of
    YaRN, as a reader takes them for the architecture; None is the usual one of its factor."""
    scaling = rope.scaling
    if scaling is None or isinstance(scaling, Llama3Scaling):
        return {}
    if isinstance(scaling, LinearScaling):
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    if isinstance(scaling, YarnScaling) and scaling.truncate == truncate:
        usual = 0.1 * log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
        usual = usual if attention_factor is None else attention_factor
        if abs(scaling.attention_factor - usual) > 1e-6:
            raise ModelError(f"YaRN's attention factor of {scaling.attention_factor:g} cannot be written as GGUF")
        return {
            "rope.scaling.type": "yarn", "rope.scaling.factor": float(scaling.factor),
            "rope.scaling.original_context_length": scaling.original_positions,
            "rope.scaling.yarn_beta_fast": float(scaling.beta_fast),
            "rope.scaling.yarn_beta_slow": float(scaling.beta_slow),
        }  # fmt: skip
    kind = scaling.__struct_config__.tag
    ramp = f" with 'truncate' {str(scaling.truncate).lower()}" if isinstance(scaling, YarnScaling) else ""
    raise ModelError(f"the rope scaling '{kind}'{ramp} cannot be written as GGUF")


def factors_of(rope: Rope | None) -> list[float] | None:
    """The values of the tensor :data:`FACTORS` in a file of this rotary embedding; None where it has none.

    :raises ModelError: a reader of the file could not tell which scaling they are.
    """
    if rope is None or not isinstance(rope.scaling, Llama3Scaling):
        return None
    factors = llama3_factors(rope.dimensions, rope.theta, rope.scaling)
    _llama3_config(factors, rope.dimensions, rope.theta)
    return factors
