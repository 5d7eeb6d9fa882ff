"""Traces: facts of a run (routing, draft agreement), one row per computed position. Never decisions (hits, evictions), so
that a study can replay the facts under other decisions. Knows nothing of the engine or the simulator; both import it.
"""

from elmoe.trace.facts import RoutingFacts, facts_of_trace, read_facts, write_facts
from elmoe.trace.format import TRACE_VERSION, Trace, read_trace
from elmoe.trace.record import TraceRecorder
from elmoe.trace.replay import ReplayFacts, replay_facts

__all__ = [
    "TRACE_VERSION",
    "ReplayFacts",
    "RoutingFacts",
    "Trace",
    "TraceRecorder",
    "facts_of_trace",
    "read_facts",
    "read_trace",
    "replay_facts",
    "write_facts",
]
