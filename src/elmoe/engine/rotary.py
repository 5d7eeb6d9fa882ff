"""The rotary embedding of a spec as frequencies: every kind of scaling that the engine computes."""

from __future__ import annotations

from elmoe.bitslice.rotary import Frequencies, llama3_frequencies, rotary_frequencies, yarn_frequencies
from elmoe.errors import ModelError
from elmoe.models.spec import LinearScaling, Llama3Scaling, Rope, YarnScaling


def frequencies_of(rope: Rope) -> tuple[Frequencies, float]:
    """The frequencies of a rotary embedding, and the factor of its cosines and sines; ModelError for an unknown scaling."""
    plain, scaling = rotary_frequencies(rope.dimensions, rope.theta), rope.scaling
    if scaling is None:
        return plain, 1.0
    if isinstance(scaling, LinearScaling):
        return plain / scaling.factor, 1.0
    if isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
        return llama3_frequencies(plain, scaling.factor, low, high, scaling.original_positions), 1.0
    if isinstance(scaling, YarnScaling):
        fast, slow = scaling.beta_fast, scaling.beta_slow
        frequencies = yarn_frequencies(
            plain, rope.theta, scaling.factor, scaling.original_positions, fast, slow, scaling.truncate
        )
        return frequencies, scaling.attention_factor
    raise ModelError(f"the rope scaling '{scaling.__struct_config__.tag}' is not supported")
