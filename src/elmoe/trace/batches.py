"""How much the sequences of a batch agree on their experts: bounds from both sides, for one sequence's own locality.

One text cannot tell what it prefers from what all texts prefer: both are fixed while it lasts. How many distinct experts a
batch needs depends on that split. No source measured it for a batch of a served model, so a study can move it.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import msgspec

from elmoe.errors import TraceError
from elmoe.trace.locality import Locality

BatchRouting = Literal["fitted", "apart", "alike", "identical"]
"""``fitted``: as the locality says. ``apart``: sequences share no preference, the most distinct experts. ``alike``: all
preferences are shared, and only tokens differ. ``identical``: every sequence routes as the others at each position, the
fewest distinct experts that can be."""
BATCH_ROUTINGS: tuple[BatchRouting, ...] = get_args(BatchRouting)
MOST_POPULARITY = 10.0


def routed_together(locality: Locality, routing: BatchRouting) -> Locality:
    """The locality with another agreement between sequences; what a single sequence shows stays.

    :raises TraceError: there is no such routing.
    """
    if routing == "fitted":
        return locality
    source = f"{locality.source}; sequences {routing}"
    if routing == "identical":
        return msgspec.structs.replace(locality, agreement=1.0, source=source)
    fixed = locality.popularity**2 + locality.sequence**2
    if routing == "apart":
        scale = math.sqrt(1 + locality.popularity**2)  # the variances of all but popularity sum to one again
        return msgspec.structs.replace(
            locality, popularity=0.0, sequence=math.sqrt(fixed) / scale, token=locality.token / scale, agreement=0.0,
            source=source,
        )  # fmt: skip
    if routing == "alike":
        scale = math.sqrt(max(1e-12, 1 - locality.sequence**2))
        return msgspec.structs.replace(
            locality, popularity=min(MOST_POPULARITY, math.sqrt(fixed) / scale), sequence=0.0,
            token=min(1.0, locality.token / scale), source=source,
        )  # fmt: skip
    raise TraceError(f"there is no batch routing '{routing}'", f"take one of {', '.join(BATCH_ROUTINGS)}")


def most_distinct(experts: int, top_k: int, batch: int) -> float:
    """Distinct experts of ``batch`` independent tokens of balanced routing, in expectation (MoESD, arXiv 2505.19645)."""
    return experts * (1 - (1 - top_k / experts) ** batch)
