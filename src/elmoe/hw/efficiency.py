"""The share of a memory's peak bandwidth that long sequential reads reach.

Weights are read in slices of 0.5 MB and more, so a stream goes through all banks in turn. While one bank sends a row, the
next ones close and open theirs: a row of 2 KB keeps an LPDDR5-6400 x16 channel busy for 160 ns, and the 16 banks come round
after 2560 ns, long after the 61 ns that a bank needs between two rows. Rows therefore cost nothing, and refresh of all banks
at once is what is left: every ``interval`` the last read is let out and all rows are closed (tRTP + tRP), the refresh takes
``duration``, and the first row must be opened again (tRCD)::

    efficiency = 1 - (duration + reopen) / interval        reopen = tRTP + tRP + tRCD

Ramulator 2.1, run on streaming reads for this project, agrees within 1.3 points (tests/physics/test_efficiency.py): 93.3 %
for LPDDR5-6400 x16, 91.5 % for DDR5, 91.2 % for HBM3-6400, 88.5 % for GDDR7. Refresh of single banks, or of one of several
ranks, can be hidden behind reads of the others; a memory that does so states its ``efficiency`` instead.
"""

from __future__ import annotations

from elmoe.schema.hardware import Memory, Refresh


def efficiency_of_refresh(refresh: Refresh) -> float:
    """Share of the peak, 0 to 1, that streaming reads reach under all-bank refresh; times in seconds."""
    return 1.0 - (refresh.duration.value + refresh.reopen.value) / refresh.interval.value


def efficiency_of(memory: Memory) -> float:
    """Share of ``memory.bandwidth``, above 0 and at most 1, that streaming reads reach: stated, by its refresh, or 1."""
    if memory.efficiency is not None:
        return memory.efficiency.value
    return 1.0 if memory.refresh is None else efficiency_of_refresh(memory.refresh)


def streaming_bandwidth(memory: Memory) -> float:
    """Bytes per second of streaming reads: peak times efficiency."""
    return memory.bandwidth.value * efficiency_of(memory)
