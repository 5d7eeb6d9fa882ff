"""How fast `elmoe convert` is beside `dd conv=fsync` of the same source on the same disk, and how much memory it takes.

    .venv/bin/python -m bench.conversion [--sources q8_0,q4_0,q4_1,q4_k,mxfp4,bf16] [--rounds 3] [--json]

Sources have OLMoE-1B-7B's shapes with ``--layers`` layers and random weights; they are made once, in ``--folder``. Whole
processes, in alternation, each with the source out of the page cache. A rate is bytes of the source per second.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from bench.llama_offload import evict
from bench.offload_stores import SHAPES
from bench.peer_llama import run
from bench.quantisations import shapes_of, write_store
from elmoe.convert.gguf_export import export_store
from elmoe.models import FAMILIES
from elmoe.models.tensors import PROJECTIONS, feed_forward, tensors
from elmoe.store import open_store
from elmoe.store.synthetic import RandomWeights, byte_tokenizer
from elmoe.terminal import print_table

TARGET, MEMORY = 0.6, 500e6
"""Of dd's rate, and bytes beside the largest tensor."""


def checkpoint(folder: Path, layers: int) -> None:
    """A Hugging Face folder of random weights in BF16, one shard for each layer and one for the rest."""
    config = json.loads(SHAPES.read_text()) | {"num_hidden_layers": layers}
    spec, rng = shapes_of(SHAPES, num_hidden_layers=layers), np.random.default_rng(0)
    names = FAMILIES[spec.family].names
    assert names is not None
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(byte_tokenizer(spec.vocabulary))
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    for tensor in tensors(spec):
        shard = shapes.setdefault("dense" if tensor.layer is None else f"layer-{tensor.layer}", {})
        shard |= {names[part.role].format(layer=tensor.layer): part.shape for part in tensor.parts}
    for layer in range(layers):
        one = feed_forward(spec, layer)
        for expert in range(one.count):
            for part in map(one.part, PROJECTIONS):
                shapes[f"layer-{layer}"][names[part.role].format(layer=layer, expert=expert)] = part.shape
    index = {}
    for shard, found in shapes.items():
        header, end = {}, 0
        for name, shape in found.items():
            size = 2 * int(np.prod(shape))
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            index[name], end = f"{shard}.safetensors", end + size
        text = json.dumps(header).encode()
        with open(folder / f"{shard}.safetensors", "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for shape in found.values():
                values = rng.standard_normal(shape, np.float32) * np.float32(0.02)
                file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def source_of(folder: Path, kind: str, layers: int) -> tuple[Path, int]:
    """A source of a kind, and the bytes of its largest tensor; made once."""
    path = folder / f"source-{layers}-{kind}{'' if kind == 'bf16' else '.gguf'}"
    if not path.exists():
        if kind == "bf16":
            checkpoint(path, layers)
        else:
            store = folder / "store"
            write_store(store, shapes_of(SHAPES, num_hidden_layers=layers, norm_topk_prob=True), kind, RandomWeights(0))
            with open_store(store) as reader:
                export_store(reader, path)
            shutil.rmtree(store)
    bytes_per_weight = 2 if kind == "bf16" else os.path.getsize(path) / weights(layers)
    spec = shapes_of(SHAPES)
    part = feed_forward(spec, 0)
    expert = part.hidden * part.width
    largest = max(spec.vocabulary * spec.hidden, expert * (1 if kind == "bf16" else part.count))
    return path, int(largest * bytes_per_weight)


def weights(layers: int) -> int:
    """Weights of all matrices."""
    spec = shapes_of(SHAPES, num_hidden_layers=layers)
    dense = sum(int(np.prod(tensor.shape)) for tensor in tensors(spec) if tensor.kind == "matrix")
    parts = (feed_forward(spec, layer) for layer in range(layers))
    return dense + sum(3 * part.count * part.hidden * part.width for part in parts)


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def copied(source: Path, out: Path) -> float:
    """Seconds that dd takes."""
    seconds = 0.0
    for file in files_of(source):
        evict(file)
        began = perf_counter()
        run(["dd", f"if={file}", f"of={out}", "bs=4M", "conv=fsync"])
        seconds += perf_counter() - began
        evict(out)
        out.unlink()
    return seconds


def converted(source: Path, out: Path) -> tuple[float, float, int]:
    """Seconds, processor seconds and peak memory of a conversion."""
    for file in files_of(source):
        evict(file)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = run([sys.executable, "-m", "elmoe.cli.main", "convert", str(source), str(out)], timeout=3600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.rmtree(out)
    return child.seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, child.peak


def measure(folder: Path, kind: str, layers: int, rounds: int) -> dict[str, Any]:
    """A row."""
    source, largest = source_of(folder, kind, layers)
    size = sum(os.path.getsize(file) for file in files_of(source))
    copies, runs = [], []
    for _ in range(rounds):
        copies.append(size / copied(source, folder / "copy"))
        runs.append(converted(source, folder / "converted"))
    rates = [size / seconds for seconds, _, _ in runs]
    ratio, peak = median(rate / copy for rate, copy in zip(rates, copies, strict=True)), max(run[2] for run in runs)
    return {
        "source": kind, "bytes": size, "bytes_per_second": median(rates), "dd_bytes_per_second": median(copies),
        "ratio": ratio, "processor_seconds": median(run[1] for run in runs), "peak": peak, "largest_tensor": largest,
        "met": ratio >= TARGET and peak <= MEMORY + largest,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/conversion"))
    parser.add_argument("--sources", default="q8_0,q4_0,q4_1,q4_k,mxfp4,bf16")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="keep the sources, up to 2 GB each")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for kind in arguments.sources.split(","):
        rows.append(measure(arguments.folder, kind, arguments.layers, arguments.rounds))
        if not arguments.keep:
            source, _ = source_of(arguments.folder, kind, arguments.layers)
            shutil.rmtree(source) if source.is_dir() else source.unlink()
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print_table(
        f"conversion, medians of {arguments.rounds}",
        ("source", "GB", "GB/s", "dd, GB/s", "ratio", "processor s", "peak MB", "largest tensor MB", "met"),
        [
            (r["source"], f"{r['bytes'] / 1e9:.2f}", f"{r['bytes_per_second'] / 1e9:.2f}",
             f"{r['dd_bytes_per_second'] / 1e9:.2f}", f"{r['ratio']:.2f}", f"{r['processor_seconds']:.1f}",
             f"{r['peak'] / 1e6:.0f}", f"{r['largest_tensor'] / 1e6:.0f}", "yes" if r["met"] else "NO")
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
