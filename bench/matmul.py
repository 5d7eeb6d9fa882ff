"""Nested matmul against the memory's read bandwidth, measured in the same run, on weights beyond any cache.

    .venv/bin/python -m bench.matmul [--json] [--threads 1,2] [--tokens 1,2,4,8,16] [--gigabytes 1.6]

Rows interleave the read probe, the full and the draft product; medians of ``--repeats`` sweeps over all matrices. A sample
of the results is compared bit for bit with the NumPy definition.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter

import numpy as np

from elmoe import bitslice, kernels
from elmoe.bitslice import NestedMatrix
from elmoe.terminal import print_table

ROWS, COLUMNS = 8192, 2048  # calls long enough that Python is no part of the figure


def make_matrices(total: int) -> tuple[list[NestedMatrix], np.ndarray, np.ndarray]:
    """Random matrices in two arenas (MSB slices with scales, LSB slices), as a store lays them out."""
    blocks, groups = ROWS // 16, COLUMNS // 32
    plane, scales = blocks * groups * 256, blocks * groups * 32
    count = total // (2 * plane + scales)
    rng = np.random.default_rng(0)
    high = np.frombuffer(rng.bytes(count * (plane + scales)), np.uint8).copy()
    low = np.frombuffer(rng.bytes(count * plane), np.uint8).copy()
    matrices = []
    for index in range(count):
        record = high[index * (plane + scales) : (index + 1) * (plane + scales)]
        record[plane:].view(np.uint16)[:] = 0x1400 + (record[plane:].view(np.uint16) & 0xFF)
        matrices.append(
            NestedMatrix(
                ROWS, COLUMNS, record[:plane].reshape(blocks, groups, 256),
                low[index * plane : (index + 1) * plane].reshape(blocks, groups, 256),
                record[plane:].view(np.float16).reshape(blocks, groups, 16),
            )
        )  # fmt: skip
    return matrices, high, low


def seconds(function: object, *arguments: object) -> float:
    began = perf_counter()
    function(*arguments)  # type: ignore[operator]
    return perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--gigabytes", type=float, default=1.6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    matrices, high, low = make_matrices(int(arguments.gigabytes * 1e9))
    full_bytes, draft_bytes, weights = high.nbytes + low.nbytes, high.nbytes, len(matrices) * ROWS * COLUMNS
    rng = np.random.default_rng(1)
    rows = []
    for threads in map(int, arguments.threads.split(",")):
        kernels.set_threads(threads)
        for tokens in map(int, arguments.tokens.split(",")):
            x = rng.standard_normal((tokens, COLUMNS)).astype(np.float32)
            for draft in (False, True):
                expected = bitslice.nested_matmul(matrices[3], x, draft, offset=8.0)
                assert np.array_equal(kernels.nested_matmul(matrices[3], x, draft), expected), "bits differ"

            def probe() -> None:
                kernels.stream_read(high)
                kernels.stream_read(low)

            def sweep(x: np.ndarray, draft: bool) -> None:
                for matrix in matrices:
                    kernels.nested_matmul(matrix, x, draft)

            times: dict[str, list[float]] = {"read": [], "full": [], "draft": []}
            for _ in range(arguments.repeats):
                times["read"].append(seconds(probe))
                times["full"].append(seconds(sweep, x, False))
                times["draft"].append(seconds(sweep, x, True))
            read, full, draft_time = (median(times[name]) for name in ("read", "full", "draft"))
            rows.append(
                {
                    "threads": threads,
                    "tokens": tokens,
                    "read_gb_per_second": full_bytes / read / 1e9,
                    "full_gb_per_second": full_bytes / full / 1e9,
                    "full_share_of_read": read / full,
                    "draft_gb_per_second": draft_bytes / draft_time / 1e9,
                    "draft_share_of_read": draft_bytes / draft_time * read / full_bytes,
                    "draft_over_full_weights_per_second": full / draft_time,
                    "full_giga_weights_per_second": weights / full / 1e9,
                }
            )
    if arguments.json:
        print(json.dumps({"variant": kernels.variant(), "bytes": full_bytes, "rows": rows}, indent=1))
        return
    print_table(
        f"nested matmul, {kernels.variant()}, {full_bytes / 1e9:.1f} GB of weights, medians of {arguments.repeats}",
        ("threads", "tokens", "read GB/s", "full GB/s", "share", "draft GB/s", "share", "draft/full weights/s"),
        [
            (
                row["threads"], row["tokens"], f"{row['read_gb_per_second']:.1f}", f"{row['full_gb_per_second']:.1f}",
                f"{row['full_share_of_read']:.0%}", f"{row['draft_gb_per_second']:.1f}", f"{row['draft_share_of_read']:.0%}",
                f"{row['draft_over_full_weights_per_second']:.2f}x",
            )
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
