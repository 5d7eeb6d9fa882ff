"""Every decision of elastic decoding as a pure function or a small state machine: what stays resident, what drafts, for how
long, and whether to draft at all. No clock, no I/O, no model: the engine carries the plans out, the simulator prices them.
"""
