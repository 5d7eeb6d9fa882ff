"""Long contexts in memory: prompt speed and decode speed behind the prompt, ours and llama.cpp's on the same weights.

    .venv/bin/python -m bench.contexts [--lengths 512,2000,4000,8000,16000] [--layers 4] [--json]

OLMoE-1B-7B's shapes with random weights, Q8_0, or those of ``--config`` in their published formats, 2 threads. A run of
either engine computes a prompt of so many random tokens and decodes ``DECODED`` more behind it; runs alternate, every other
round in reverse, and a row is the median over rounds. llama.cpp is the better by median of its weights repacked or as they
lie in the file. Needs `make peers`; the store and the exported file are kept in ``--folder``.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import msgspec

from bench.machine_load import observed, wait_for_calm
from bench.offload import SHAPES, run_elmoe
from bench.peer_llama import ATTEMPTS, REPACK, PeerError, run
from bench.random_tokens import RandomTokens
from elmoe import kernels
from elmoe.convert.gguf_export import export_store
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.store import open_store
from elmoe.terminal import print_table, progress_bar

DECODED = 32
TARGETS = {"prompt": {4000: 1.6, 8000: 1.6, 16000: 1.4}, "decode": {4000: 1.3, 16000: 1.3}}
MOST_ROUNDS = 5
TOKENS_PER_CELL = 16_000
"""Prompt tokens of a cell, after which it begins no further round."""
SETTLED = 2000
"""Positions from which on llama.cpp runs only in the variants that were better at the length before."""
Rates = tuple[float, float]
"""Tokens per second: of the prompt, and decoding behind it."""


def ours(engine: Engine, backend: RandomTokens, length: int) -> Rates:
    """Our engine's rates."""
    began = perf_counter()
    first = 0.0
    for outputs in engine.run(backend.requests(1, length, DECODED + 1)):
        if not first and any(output.tokens for output in outputs):
            first = perf_counter()
    return length / (first - began), DECODED / (perf_counter() - first)


def llama(program: Path, model: Path, variant: str, length: int) -> Rates:
    """llama.cpp's."""
    command = [str(program), "-m", str(model), "-t", "2", "-c", str(length + DECODED + 16), "-npp", str(length),
               "-ntg", str(DECODED), "-npl", "1", "--output-format", "jsonl"]  # fmt: skip
    command += [] if REPACK[variant] else ["--no-repack"]
    for _ in range(ATTEMPTS):
        for line in run(command, timeout=900).stdout.splitlines():
            if line.startswith("{") and "speed_tg" in line:
                row = json.loads(line)
                return float(row["speed_pp"]), float(row["speed_tg"])
    raise PeerError(f"llama-batched-bench printed no result {ATTEMPTS} times")


def prepared(folder: Path, config: Path | None, layers: int, longest: int) -> tuple[Path, Path]:
    """A store whose context holds the longest prompt, and the file exported from it; made once."""
    name = f"{'contexts' if config is None else config.stem}-{layers}-{longest}"
    store, model = folder / name, folder / f"{name}.gguf"
    folder.mkdir(parents=True, exist_ok=True)
    if not store.exists():
        shapes = msgspec.json.decode((config or SHAPES).read_bytes()) | {"max_position_embeddings": longest + 64}
        if config is None:
            shapes["norm_topk_prob"] = True  # as GGUF's qwen3moe does
        (folder / "contexts.json").write_text(json.dumps(shapes))
        run_elmoe("synth", str(folder / "contexts.json"), str(store), "--layers", str(layers))
    if not model.exists():
        with open_store(store) as reader:
            export_store(reader, model)
    return store, model


def compare(store: Path, model: Path, program: Path, lengths: list[int], patience: float) -> list[dict[str, Any]]:
    """Rows of all lengths."""
    rows = []
    with open_store(store) as reader, progress_bar("runs", None) as bar:
        backend, done = RandomTokens(kernels, reader.spec), 0
        engine = Engine(reader, backend, EngineOptions("plain"))  # type: ignore[arg-type]
        best: set[str] = set()
        for length in lengths:
            variants = sorted(best) if length > SETTLED and best else list(REPACK)
            best = set()
            runners = {"ours": partial(ours, engine, backend, length)}
            runners |= {name: partial(llama, program, model, name, length) for name in variants}
            values: dict[str, list[Rates]] = {name: [] for name in runners}
            others: list[float] = []
            ours(engine, backend, min(length, 512))
            for turn in range(max(1, min(MOST_ROUNDS, TOKENS_PER_CELL // length))):
                for name, runner in list(runners.items())[:: -1 if turn % 2 else 1]:
                    wait_for_calm(patience)
                    value, busy = observed(runner)
                    values[name].append(value)
                    others.append(busy)
                    bar(done := done + 1)
            for index, work in enumerate(("prompt", "decode")):
                rates = {name: [value[index] for value in runs] for name, runs in values.items()}
                peer = max(variants, key=lambda name: median(rates[name]))
                best.add(peer)
                ratio = median(mine / its for mine, its in zip(rates["ours"], rates[peer], strict=True))
                rows.append({
                    "work": work, "length": length, "ours": median(rates["ours"]), "peer": median(rates[peer]),
                    "variant": peer, "ratio": ratio, "target": TARGETS[work].get(length), "rounds": len(rates["ours"]),
                    "others_cores": median(others), "runs": rates,
                })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="512,2000,4000,8000,16000")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--config", type=Path, help="config.json of other shapes")
    parser.add_argument("--folder", type=Path, default=Path("build/contexts"))
    parser.add_argument("--programs", type=Path, default=Path("build/peers/bin"))
    parser.add_argument("--patience", type=float, default=20.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    lengths = [int(length) for length in arguments.lengths.split(",")]
    kernels.set_threads(2)
    store, model = prepared(arguments.folder, arguments.config, arguments.layers, max(lengths))
    rows = compare(store, model, arguments.programs / "llama-batched-bench", lengths, arguments.patience)
    if arguments.json:
        print(json.dumps({"variant": kernels.variant(), "layers": arguments.layers, "rows": rows}, indent=1))
        return
    print_table(
        f"{arguments.layers} layers of {arguments.config or 'OLMoE-1B-7B, Q8_0'}, {kernels.variant()}, 2 threads, tokens/s",
        ("work", "positions", "ours", "llama.cpp", "ratio", "target", "rounds"),
        [
            (row["work"], row["length"], f"{row['ours']:.1f}", f"{row['peer']:.1f} ({row['variant']})",
             f"{row['ratio']:.2f}", "" if row["target"] is None else row["target"], row["rounds"])
            for row in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
