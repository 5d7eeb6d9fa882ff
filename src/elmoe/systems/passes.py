"""What a system is asked to price: passes of a model over tokens, with the experts they used and where those were."""

from __future__ import annotations

from dataclasses import dataclass

from elmoe.hw.cost import Array


@dataclass(frozen=True)
class Passes:
    """Passes of one kind; arrays are (passes,) or (passes, layers), layers being the sampled MoE layers.

    ``tokens``: computed per pass. ``attended``: sum over those tokens of the positions they attend to. ``cached``: positions
    of KV read, once per sequence. ``active``: distinct experts used. ``pairs``: token-expert pairs. ``blocks``: sum over
    active experts of ceil(tokens of the expert / token rows of a PE). ``msb_hits``, ``lsb_hits``: slices of active experts
    that the fast memory held. ``captured``: MSB and LSB bytes moved into the fast memory. ``sequences``: how many of them a
    pass computes tokens of. ``msb_foreseen``, ``lsb_foreseen``: slices of active experts that it did not hold, and to whose
    experts the drafts before this pass were routed.
    """

    tokens: Array
    attended: Array
    cached: Array
    active: Array
    pairs: Array
    blocks: Array
    msb_hits: Array
    lsb_hits: Array
    captured: Array
    sequences: Array
    msb_foreseen: Array
    lsb_foreseen: Array
