"""Decode speed of published shapes with random weights, in memory and at half of it, beside the memory's bandwidth.

    .venv/bin/python -m bench.shapes CONFIG[:LAYERS] ... [--folder FOLDER] [--json]

Each CONFIG is a published config.json; LAYERS are as many as are written (default: all). Rows: plain and elastic at batch 1
and 4; in memory, then with an enforced budget of half of the store's bytes over direct reads. Share: the weight bytes that a
plain step in memory reads, per second, by the bandwidth that two threads read before or behind these rows, whichever is
higher: on a shared machine it varies. A store is removed behind its rows.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from elmoe.measure.probe import memory_bandwidth
from elmoe.models.load import load_model
from elmoe.store import open_store
from elmoe.terminal import print_table

PROBE, PROBES, REPEATS = 2 << 30, 3, 3
BATCHES = "1,4"


def elmoe(*words: str) -> str:
    """Standard output of the command."""
    command = [sys.executable, "-m", "elmoe", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def decode_bytes(store: Path, row: dict[str, Any]) -> float:
    """Weight bytes of one decode step in memory: dense parts and head once, a row of the embedding table for each answer,
    and the experts that were routed to."""
    sizes = load_model(store)
    dense = sizes.dense_bytes - (sizes.embedding_bytes if sizes.tables == 2 else 0)
    decode = row["phases"]["plain"]
    return dense + (decode["slow_bytes"] + decode["fast_bytes"]) / decode["steps"]


def rows_of(store: Path, budget: int | None, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Rows of `elmoe bench`, in memory or within a budget."""
    where = [] if budget is None else ["--fast-memory", str(budget), "--reader", "direct"]
    runs = "--max-tokens", str(tokens), "--repeats", str(repeats)
    told = elmoe("bench", str(store), "--modes", "plain,elastic", "--batch", BATCHES, *runs, "--json", *where)
    rows: list[dict[str, Any]] = json.loads(told)["rows"]
    return rows


def bandwidth_of_memory() -> float:
    """Bytes per second that two threads read, median of some probes."""
    return median(memory_bandwidth(PROBE, 2) for _ in range(PROBES))


def measured(config: Path, layers: int | None, folder: Path, tokens: int, half_repeats: int) -> list[dict[str, Any]]:
    """All rows of one model."""
    store = folder / f"{config.stem}-{layers or 'all'}"
    few = [] if layers is None else ["--layers", str(layers)]
    if not store.exists():
        elmoe("synth", str(config), str(store), *few)
    try:
        with open_store(store) as reader:
            size, count = sum(file.bytes for file in reader.manifest.files), len(reader.spec.layers)
        found = []
        for budget in (None, size // 2):
            before = bandwidth_of_memory()
            rows = rows_of(store, budget, tokens, REPEATS if budget is None else half_repeats)
            bandwidth = max(before, bandwidth_of_memory())
            for row in rows:
                share, decode = None, row["phases"]["plain"]
                if budget is None and row["mode"] == "plain":
                    share = decode_bytes(store, row) * decode["steps"] / decode["seconds"] / bandwidth
                found.append({
                    "model": config.stem, "layers": count, "store_bytes": size, "budget": budget, "mode": row["mode"],
                    "batch": row["batch"], "identical": row["identical"], "tokens_per_second": row["tokens_per_second"],
                    "bandwidth": bandwidth, "share": share,
                })  # fmt: skip
        return found
    finally:
        shutil.rmtree(store)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG[:LAYERS]")
    parser.add_argument("--folder", type=Path, default=Path("build/shapes"))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--half-repeats", type=int, default=REPEATS, help="runs of a row within the budget (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for given in arguments.configs:
        name, _, layers = given.partition(":")
        rows += measured(
            Path(name), int(layers) if layers else None, arguments.folder, arguments.tokens, arguments.half_repeats
        )
        print(json.dumps(rows[-8:]), file=sys.stderr, flush=True)
    if arguments.json:
        print(json.dumps({"rows": rows}, indent=1))
        return
    print_table(
        "decode, random weights, tokens/s; share of the bandwidth that two threads read",
        ("model", "layers", "GB", "memory", "mode", "batch", "tokens/s", "share"),
        [
            (row["model"], row["layers"], f"{row['store_bytes'] / 1e9:.1f}", "all" if row["budget"] is None else "half",
             row["mode"], row["batch"], f"{row['tokens_per_second']:.1f}",
             None if row["share"] is None else f"{row['share']:.0%}")
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
