"""Matmul of every format against the memory's read bandwidth, measured in the same run, on weights beyond any cache.

    .venv/bin/python -m bench.formats [--json] [--threads 2] [--tokens 1,4,8] [--formats affine4_k,...] [--gigabytes 1]

Each round reads all bytes of a format's matrices, multiplies with them, and multiplies with the drafts of as many nested8
weights; medians of ``--repeats`` rounds. A sample of the results is compared bit for bit with the NumPy definition.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from statistics import median
from time import perf_counter

import numpy as np

from elmoe import bitslice, kernels
from elmoe.bitslice import QuantizedMatrix, sections_of
from elmoe.models.formats import FORMATS
from elmoe.store.synthetic import random_matrix
from elmoe.terminal import print_table

ROWS, COLUMNS = 8192, 2048


def make_matrices(name: str, gigabytes: float) -> list[QuantizedMatrix]:
    size = sum(FORMATS[name].bytes_of(ROWS, COLUMNS).values())
    rng = np.random.default_rng(0)
    first = random_matrix(rng, ROWS, COLUMNS, FORMATS[name])
    copies = [bitslice.from_sections(FORMATS[name], ROWS, COLUMNS, {
        key: array.reshape(-1).view(np.uint8).copy() for key, array in sections_of(first).items()
    }) for _ in range(int(gigabytes * 1e9 / size))]  # fmt: skip
    assert copies
    return copies


def read(matrices: list[QuantizedMatrix], draft: bool) -> int:
    total = 0
    for matrix in matrices:
        for name, array in sections_of(matrix).items():
            if not draft or name != "lo":
                kernels.stream_read(array.reshape(-1).view(np.uint8))
                total += array.nbytes
    return total


def multiply(matrices: list[QuantizedMatrix], x: np.ndarray, draft: bool) -> None:
    for matrix in matrices:
        kernels.matmul(matrix, x, draft)


def rates(matrices: list[QuantizedMatrix], draft: bool, tokens: int, repeats: int) -> dict[str, float]:
    """GB/s of reading and multiplying, their ratio, and 10^9 weights/s."""
    x = np.random.default_rng(1).standard_normal((tokens, COLUMNS)).astype(np.float32)
    expected = bitslice.matmul(matrices[0].row_blocks(0, 64), x, draft, offset=8.0)
    assert np.array_equal(kernels.matmul(matrices[0], x, draft)[:, :64], expected), "bits differ"
    times: dict[str, list[float]] = {"read": [], "multiply": []}
    size = 0
    for _ in range(repeats):
        began = perf_counter()
        size = read(matrices, draft)
        times["read"].append(perf_counter() - began)
        began = perf_counter()
        multiply(matrices, x, draft)
        times["multiply"].append(perf_counter() - began)
    reading, multiplying = (median(times[name]) for name in ("read", "multiply"))
    return {
        "read_gb_per_second": size / reading / 1e9,
        "gb_per_second": size / multiplying / 1e9,
        "share_of_read": reading / multiplying,
        "giga_weights_per_second": len(matrices) * ROWS * COLUMNS / multiplying / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,4,8")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variant", help="instruction set; default: the best")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    kernels.set_variant(arguments.variant)
    kernels.set_threads(arguments.threads)
    rows = []
    for name in ["nested8 draft", *arguments.formats.split(",")]:
        format, _, draft = name.partition(" ")
        matrices = make_matrices(format, arguments.gigabytes)
        measure = partial(rates, matrices, bool(draft), repeats=arguments.repeats)
        rows += [{"format": name, "tokens": tokens} | measure(tokens) for tokens in map(int, arguments.tokens.split(","))]
    if arguments.json:
        print(json.dumps({"variant": kernels.variant(), "threads": arguments.threads, "rows": rows}, indent=1))
        return
    print_table(
        f"matmul by format, {kernels.variant()}, {arguments.threads} threads, medians of {arguments.repeats}",
        ("format", "tokens", "read GB/s", "matmul GB/s", "share", "10^9 weights/s"),
        [
            (
                row["format"], row["tokens"], f"{row['read_gb_per_second']:.1f}", f"{row['gb_per_second']:.1f}",
                f"{row['share_of_read']:.0%}", f"{row['giga_weights_per_second']:.1f}",
            )
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
