"""Which routing a condition replays: a trace, or synthetic facts as local as the model or a prompt set is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from elmoe.errors import HardwareError, ModelError, TraceError
from elmoe.models.load import load_model
from elmoe.models.sizes import ModelSizes
from elmoe.sim.paper import OWN_LOCALITY, PROMPTS
from elmoe.trace.batches import BATCH_ROUTINGS, BatchRouting, routed_together
from elmoe.trace.facts import RoutingFacts, check_sequences, read_facts
from elmoe.trace.locality import PRESETS, Locality, load_locality
from elmoe.trace.synthesis import synthesise

SAMPLED_LAYERS = 8
"""Layers replayed of a synthetic trace, whose layers are alike; their counts stand for the others."""
SEQUENCES, PROMPT, POSITIONS, SEED = 16, 64, 320, 0


def own_locality(model: ModelSizes) -> Locality | None:
    """The preset fitted to what was published of this model, by its name; None if there is none of its experts and top-k.

    A folder such as ``Qwen3-30B-A3B``, or ``Qwen/Qwen3-30B-A3B`` of the Hugging Face cache, is that model as the preset is.
    """
    name = model.name.rpartition("/")[2].lower()
    path = PRESETS / f"{name}.json"
    if path.parent != PRESETS or not os.path.isfile(path):
        return None
    found, spec = load_locality(path), model.spec
    shape = found.shape
    if shape is None or found.model != name or (shape.experts, shape.top_k) != (spec.experts, spec.top_k):
        return None
    return found


def localities_of(model_name: str, prompts: Sequence[str]) -> tuple[str, ...]:
    """What ``prompts`` means for a model: ``model`` is its own preset, or all prompt sets where it has none."""
    if OWN_LOCALITY not in prompts:
        return tuple(prompts)
    own = (OWN_LOCALITY,) if own_locality(load_model(model_name)) is not None else PROMPTS
    found = [name for one in prompts for name in (own if one == OWN_LOCALITY else (one,))]
    return tuple(dict.fromkeys(found))


def check_routing(prompts: Sequence[str], batch_routing: str, trace: Path | None, batches: Sequence[int]) -> None:
    """Refuse by name what :func:`facts_of` could not make, before a study starts.

    :raises TraceError: there is no such locality, or it is none, or a batch has more sequences.
    :raises HardwareError: no such batch routing, or one for a trace, whose sequences are as they were recorded.
    """
    if batch_routing not in BATCH_ROUTINGS:
        raise HardwareError(f"there is no batch routing '{batch_routing}'", f"take one of {', '.join(BATCH_ROUTINGS)}")
    if trace is not None:
        if batch_routing != "fitted":
            raise HardwareError("a trace is replayed as it was recorded", "--batch-routing is for synthetic routing")
        return
    check_sequences(SEQUENCES, max(batches))
    for name in prompts:
        if name != OWN_LOCALITY:
            load_locality(name, (OWN_LOCALITY, "prompts"))


def facts_of(
    model: ModelSizes, prompts: str, trace: Path | None = None, batch_routing: BatchRouting = "fitted"
) -> RoutingFacts:
    """Facts of a trace, or synthetic ones of the model's shape with a locality.

    :param prompts: ``model`` for the model's own, else the name or file of a locality, such as a prompt set.
    """
    spec = model.spec
    if not spec.moe_layers:
        raise ModelError(
            f"model '{model.name}' has no layer with experts",
            "the simulator replays the routing of Mixture-of-Experts models; it does not price dense ones",
        )
    if trace is not None:
        return read_facts(trace)
    locality = own_locality(model) if prompts == OWN_LOCALITY else load_locality(prompts)
    if locality is None:
        raise TraceError(f"nothing published of the routing of '{model.name}' is known", f"take one of {', '.join(PROMPTS)}")
    layers = min(SAMPLED_LAYERS, len(spec.moe_layers))
    return synthesise(
        routed_together(locality, batch_routing), spec.experts, spec.top_k, layers, SEQUENCES, POSITIONS, SEED, prompt=PROMPT
    )
