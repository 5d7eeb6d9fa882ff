"""Reads of expert slices from disk, by reads in flight and by the pages they are read into.

    .venv/bin/elmoe synth bench/olmoe_shapes.json build/olmoe-4 --layers 4
    .venv/bin/python -m bench.reads build/olmoe-4 [--json] [--repeats 5]

Bursts of slices as layers miss them, through the engine's own pool and past the page cache; medians of ``--repeats`` turns.
"""

from __future__ import annotations

import argparse
import json
import mmap
from statistics import median
from time import perf_counter

import numpy as np

from elmoe.kernels.reads import ReadPool
from elmoe.store import DirectReader, open_direct
from elmoe.terminal import number, print_table

BURST, BURSTS = 16, 8
"""Experts of a burst, and bursts of a turn."""
PAGES = {"small": mmap.MADV_NOHUGEPAGE, "huge": mmap.MADV_HUGEPAGE}


def memory_of(pages: str, size: int) -> mmap.mmap:
    """Memory in pages of one kind, present."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(PAGES[pages])
    np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1
    return memory


def rate(reader: DirectReader, pool: ReadPool, address: int, rng: np.random.Generator) -> float:
    """Bytes per second of some bursts."""
    layers = reader.spec.moe_layers
    layout = reader.expert_layout(layers[0])
    size, read, seconds = layout.msb_bytes + layout.lsb_bytes, 0, 0.0
    for burst in range(BURSTS):
        experts = np.sort(rng.choice(reader.spec.experts, min(BURST, reader.spec.experts), replace=False)).tolist()
        began = perf_counter()
        tickets = []
        for place, expert in enumerate(experts):
            handle, offset = reader.extent(layers[burst % len(layers)], expert)
            at = address + place * size
            tickets += pool.submit(
                [handle, handle], [offset, offset + layout.msb_bytes], [layout.msb_bytes, layout.lsb_bytes],
                [at, at + layout.msb_bytes], 0,
            )  # fmt: skip
        if pool.wait(tickets):
            raise SystemExit("a read failed: check the disk, then `elmoe inspect --verify`")
        seconds += perf_counter() - began
        read += len(experts) * size
    return read / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rates: dict[tuple[int, str], list[float]] = {}
    with open_direct(arguments.store) as reader:
        layout = reader.expert_layout(reader.spec.moe_layers[0])
        memories = {pages: memory_of(pages, BURST * (layout.msb_bytes + layout.lsb_bytes)) for pages in PAGES}
        addresses = {pages: np.frombuffer(memory, np.uint8).ctypes.data for pages, memory in memories.items()}
        pools = {depth: ReadPool(depth) for depth in (1, 2, 4, 8)}
        for _ in range(arguments.repeats):
            for depth, pool in pools.items():
                for pages, address in addresses.items():
                    rates.setdefault((depth, pages), []).append(rate(reader, pool, address, rng))
    rows = [
        {"reads_in_flight": depth, "pages": pages, "bytes_per_second": median(runs), "runs": runs}
        for (depth, pages), runs in rates.items()
    ]
    if arguments.json:
        print(json.dumps({"rows": rows}))
        return
    print_table(
        "reads of expert slices",
        ("reads in flight", "pages", "GB/s", "runs"),
        [
            (depth, pages, number(median(runs) / 1e9), " ".join(f"{run / 1e9:.2f}" for run in runs))
            for (depth, pages), runs in rates.items()
        ],
    )


if __name__ == "__main__":
    main()
