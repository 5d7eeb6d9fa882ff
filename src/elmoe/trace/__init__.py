"""Traces: facts of a run (routing, draft agreement), one row per computed position. Never decisions (hits, evictions), so
that a study can replay the facts under other decisions. Routing facts: the part a hardware simulator replays, recorded,
imported, or made to measure. Knows nothing of the engine or the simulator; both import it.
"""

from elmoe.extras import naming_extra

with naming_extra("elmoe.trace"):
    from elmoe.trace.acceptance import AcceptanceTable, load_acceptance, save_acceptance
    from elmoe.trace.draft_facts import DraftFacts, draft_facts_of_trace
    from elmoe.trace.facts import RoutingFacts, facts_of_trace, read_facts, write_facts
    from elmoe.trace.fit import fit_locality
    from elmoe.trace.format import TRACE_VERSION, Trace, read_trace
    from elmoe.trace.locality import Locality, load_locality, save_locality
    from elmoe.trace.ndjson import import_ndjson
    from elmoe.trace.popularity import Popularity, import_popularity, load_popularity, save_popularity
    from elmoe.trace.record import TraceRecorder
    from elmoe.trace.synthesis import synthesise
    from elmoe.trace.vllm_routed import import_vllm_routed

__all__ = [
    "AcceptanceTable",
    "Locality",
    "Popularity",
    "DraftFacts",
    "RoutingFacts",
    "TRACE_VERSION",
    "Trace",
    "TraceRecorder",
    "facts_of_trace",
    "fit_locality",
    "import_ndjson",
    "import_popularity",
    "import_vllm_routed",
    "load_acceptance",
    "load_locality",
    "load_popularity",
    "read_facts",
    "read_trace",
    "draft_facts_of_trace",
    "save_acceptance",
    "save_locality",
    "save_popularity",
    "synthesise",
    "write_facts",
]
