"""Our engine against llama.cpp (and transformers) on the same weights: decoding, prefill, loading, memory.

    .venv/bin/python -m bench.peers --quick --json     # OLMoE-1B-7B shapes, 4 layers: under 10 minutes
    .venv/bin/python -m bench.peers                    # 4 and 16 layers, and the demo model
    .venv/bin/python -m bench.peers --quick --format q4_k_m --only llama,eight_bit
    .venv/bin/python -m bench.peers --config gpt-oss-20b.json --models 2    # other shapes, in their published formats

Runs alternate and wait for calm; a row is the median over rounds. Definitions: bench/README.md. Needs `make peers`; stores,
traces and exported files are kept in ``--folder`` and made once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import msgspec
import numpy as np

from bench.llama_offload import evict
from bench.lockstep import lockstep_rates
from bench.offload import recorded_traces, run_elmoe, same, steady_rate, synthetic_store
from bench.peer_llama import IK, REPACK, Llama, PeerError, run
from bench.peer_transformers import Transformers
from bench.quantisations import NAMES
from bench.random_tokens import PROMPT, RandomTokens
from bench.rounds import Bench, Cell, Runner
from elmoe import kernels
from elmoe.convert.gguf_export import export_store
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.measure.replay import ReplayBackend
from elmoe.models.spec import LayerSpec, Moe
from elmoe.models.tensors import tensors
from elmoe.policy.budget import PREFILL_CHUNK
from elmoe.store import MemoryReader, open_store, resolve_store
from elmoe.store.layout import tensor_sections
from elmoe.terminal import number, print_table, progress_bar
from elmoe.trace import draft_facts_of_trace, read_trace

BATCHES = (1, 4, 8, 16)
DECODE_TARGETS = {1: 1.6, 4: 1.6, 8: 1.5, 16: 1.5}
MIXED_TARGETS, MIXED_PREFILL_TARGET = {1: 1.1, 4: 1.5, 8: 1.5, 16: 1.5}, 1.5
"""Against llama.cpp, of 4-bit files."""
EIGHT_BIT_TARGET = 0.85
"""Of the ratio of bytes, over our own rate with 8 bits."""
ELASTIC_TARGET, PREFILL_TARGET, LOAD_TARGET, MEMORY_MARGIN = 0.97, 1.2, 1.0, 300e6
PREFILL, TOKENS = 512, 48
PARTS = ("llama", "elastic", "transformers", "eight_bit")
QUICK_SECONDS = 530
"""Of ``--quick``, with what is prepared once: a cell may take an even share of what is left; on a busy machine it begins
fewer rounds, and says so."""
ELASTIC_ROUNDS = 3
"""Times as many rounds for the rows that compare our engine with itself: they differ by per cents, runs by more."""


def step_bytes(reader: MemoryReader, experts: float) -> float:
    """Bytes of weights that a step reads if a layer runs ``experts`` experts; the KV cache is not counted."""
    spec = reader.spec
    total: float = sum(
        sum(tensor_sections(tensor, tensor.format(reader.formats)).values())
        for tensor in tensors(spec)
        if tensor.name != "embedding" or spec.tied_embeddings
    )
    for layer in range(len(spec.layers)):
        layout = reader.expert_layout(layer)
        total += (experts if layer in spec.moe_layers else 1) * (layout.msb_bytes + layout.lsb_bytes)
    return total


def against_llama(
    bench: Bench, reader: MemoryReader, llama: Llama, store: str, ik: Llama | None
) -> Iterator[dict[str, Any]]:
    """Decoding, prefill, load time and memory; ik_llama.cpp at batch 1 and prefill."""
    variants, others = list(REPACK), {} if ik is None else dict.fromkeys(IK, ik)
    eight = set(reader.formats.values()) <= {"nested8", "float32"}
    targets, prefill_target = (DECODE_TARGETS, PREFILL_TARGET) if eight else (MIXED_TARGETS, MIXED_PREFILL_TARGET)
    bench.go_over(reader.path)
    backend = RandomTokens(kernels, reader.spec)
    for batch in BATCHES:
        engine = Engine(reader, backend, EngineOptions("plain", batch=batch))

        def ours(engine: Engine = engine, batch: int = batch) -> float:
            return steady_rate(engine, backend.requests(batch, PROMPT, bench.tokens))[0]

        programs = dict.fromkeys(variants, llama) | (others if batch == 1 else {})
        peers = {name: partial(one.decode, name, batch, bench.tokens) for name, one in programs.items()}
        cell = bench.alternate({"ours": ours, "read": bench.read, **peers})
        row = cell.row(f"decode, batch {batch}", "tokens/s", targets[batch], "llama.cpp", variants)
        experts = backend.experts_per_step(batch)
        per_token = step_bytes(reader, experts) / batch
        if batch == 1 and others:
            yield cell.row(f"decode, batch {batch}", "tokens/s", targets[batch], "ik_llama.cpp", list(others))
        yield row | {
            "share_of_bandwidth": cell.over("ours", "read") * per_token,
            "peer_share_of_bandwidth": None if row["variant"] is None else cell.over(row["variant"], "read") * per_token,
            "read_bytes_per_second": median(cell.values["read"]), "experts_per_layer": experts,
            "byte_ceiling": median(cell.values["read"]) / per_token,
        }  # fmt: skip
    engine = Engine(reader, backend, EngineOptions("plain"))
    programs = dict.fromkeys(variants, llama) | others
    peers = {name: lambda name=name, one=one: one.bench(name, PREFILL, 0)[0] for name, one in programs.items()}
    cell = bench.alternate({"ours": partial(prefill_rate, engine, backend), "read": bench.read, **peers})
    if others:
        yield cell.row(f"prefill, {PREFILL} tokens", "tokens/s", prefill_target, "ik_llama.cpp", list(others))
    passes = -(-PREFILL // PREFILL_CHUNK) * step_bytes(reader, reader.spec.experts)
    yield cell.row(f"prefill, {PREFILL} tokens", "tokens/s", prefill_target, "llama.cpp", variants) | {
        "byte_ceiling": PREFILL * median(cell.values["read"]) / passes
    }
    yield from processes(bench, reader, llama, store)


def prefill_rate(engine: Engine, backend: RandomTokens) -> float:
    """Prompt tokens per second until the first token is there."""
    requests = backend.requests(1, PREFILL, 1)
    began = perf_counter()
    engine.generate(requests)
    return PREFILL / (perf_counter() - began)


def processes(bench: Bench, reader: MemoryReader, llama: Llama, store: str) -> Iterator[dict[str, Any]]:
    """Whole processes: from start to the first token with the file in the page cache; peak resident memory."""
    variants = list(REPACK)

    text = "".join(chr(code) for code in np.random.default_rng(0).integers(33, 127, PREFILL))

    def generate(prompt: int, tokens: int) -> list[str]:
        return [sys.executable, "-m", "elmoe.cli.main", "generate", store, "--prompt", text[:prompt], "--max-tokens",
                str(tokens), "--ignore-eos", "--mode", "plain", "--reader", "memory", "--threads", "2"]  # fmt: skip

    peers = {name: lambda name=name: llama.bench(name, 0, 1, warm_up=False)[1].seconds for name in variants}
    cell = bench.alternate({"ours": lambda: run(generate(1, 1)).seconds, **peers})
    yield lower(cell, "load to first token", "s", LOAD_TARGET, variants)
    peers = {name: lambda name=name: llama.bench(name, PREFILL, 8)[1].peak for name in variants}
    cell = bench.alternate({"ours": lambda: run(generate(PREFILL, 8)).peak, **peers}, rounds=1)
    store_bytes = sum(file.bytes for file in reader.manifest.files)
    kv = reader.spec.kv_bytes_per_position * (PREFILL + 8)
    yield lower(cell, "peak memory", "bytes", store_bytes + kv + MEMORY_MARGIN, variants)


def lower(cell: Cell, work: str, unit: str, target: float, variants: list[str]) -> dict[str, Any]:
    """A row where less is better: the target is the most that ours may be, the ratio the peer's over ours."""
    row, peer = cell.row(work, unit, target, "llama.cpp", variants), cell.best(variants, most=False)
    return row | {
        "variant": peer, "peer": None if peer is None else median(cell.values[peer]), "met": row["ours"] <= target,
        "ratio": None if peer is None else cell.over(peer, "ours"),
    }  # fmt: skip


def against_plain(bench: Bench, reader: MemoryReader, traces: list[Path]) -> Iterator[dict[str, Any]]:
    """Elastic decoding over plain decoding, step by step in turns, all in memory; both replay the demo model's routing and
    acceptance."""
    facts_of_traces = [draft_facts_of_trace(read_trace(path)) for path in traces]
    for batch in BATCHES:
        replays = {name: ReplayBackend(kernels, reader.spec, facts_of_traces) for name in ("ours", "plain")}
        engines = {
            name: Engine(reader, replay, EngineOptions(mode, batch=batch), replay)
            for (name, replay), mode in zip(replays.items(), ("elastic", "plain"), strict=True)
        }
        digests: dict[str, Any] = {}
        facts: dict[str, Any] = {}
        pending: dict[str, float] = {}

        def rate(
            name: str, engines: Any = engines, replays: Any = replays, digests: Any = digests, facts: Any = facts,
            pending: Any = pending, batch: int = batch,
        ) -> float:  # fmt: skip
            """Whoever comes first in a round runs both, in turns, and begins; the other is told what came of it."""
            if name not in pending:
                order = list(replays)[:: 1 if name == "ours" else -1]
                requests = [replays[each].requests(list(range(batch)), bench.tokens) for each in order]
                taking_turns = lockstep_rates([engines[each] for each in order], requests)
                for each, (value, statistics) in zip(order, taking_turns, strict=True):
                    pending[each], facts[each], digests[each] = value, statistics, replays[each].committed_digests()
            return float(pending.pop(name))

        cell = bench.alternate({name: partial(rate, name) for name in replays}, ELASTIC_ROUNDS * bench.rounds)
        row = cell.row(f"elastic, batch {batch}", "tokens/s", ELASTIC_TARGET, "our plain decoding", ["plain"])
        yield row | {
            "identical": same(digests["ours"], digests["plain"]), "acceptance_rate": facts["ours"]["acceptance_rate"],
            "tokens_per_verification": facts["ours"]["tokens_per_verification"],
        }  # fmt: skip


def against_eight_bits(bench: Bench, reader: MemoryReader, store: str) -> Iterator[dict[str, Any]]:
    """Decoding at batch 1 over decoding the same shapes in Q8_0, as a share of what the bytes allow."""
    with opened(store) as other:
        bench.go_over(reader.path)
        backends = {"ours": RandomTokens(kernels, reader.spec), "plain": RandomTokens(kernels, other.spec)}
        engines = {
            name: Engine(one, backends[name], EngineOptions("plain")) for name, one in (("ours", reader), ("plain", other))
        }

        def rate(name: str) -> float:
            return steady_rate(engines[name], backends[name].requests(1, PROMPT, bench.tokens))[0]

        cell = bench.alternate({name: partial(rate, name) for name in engines} | {"read": bench.read})
        needed = {name: step_bytes(one, one.spec.top_k) for name, one in (("ours", reader), ("plain", other))}
    allowed = needed["plain"] / needed["ours"]
    row = cell.row("decode, batch 1", "tokens/s", EIGHT_BIT_TARGET * allowed, "our Q8_0", ["plain"])
    yield row | {
        "share_of_bandwidth": cell.over("ours", "read") * needed["ours"], "ratio_of_bytes": allowed,
        "byte_ceiling": median(cell.values["read"]) / needed["ours"],
    }  # fmt: skip


def against_transformers(bench: Bench, reader: MemoryReader, file: Path) -> Iterator[dict[str, Any]]:
    """Decoding at batch 1 and prefill; rows with a reason where transformers cannot run."""
    works = {"decode, batch 1": DECODE_TARGETS[1], f"prefill, {PREFILL} tokens": PREFILL_TARGET}
    try:
        with Transformers(file) as peer:
            backend = RandomTokens(kernels, reader.spec)
            engine = Engine(reader, backend, EngineOptions("plain"))
            pairs: list[tuple[Runner, Runner]] = [
                (lambda: steady_rate(engine, backend.requests(1, PROMPT, bench.tokens))[0],
                 lambda: peer.decode(bench.tokens)),
                (lambda: prefill_rate(engine, backend), lambda: peer.prefill(PREFILL)),
            ]  # fmt: skip
            for (work, target), (ours, theirs) in zip(works.items(), pairs, strict=True):
                cell = bench.alternate({"ours": ours, "bfloat16": theirs})
                yield cell.row(work, "tokens/s", target, "transformers", ["bfloat16"])
    except PeerError as error:
        for work, target in works.items():
            yield {
                "work": work, "against": "transformers", "target": target, "skipped": str(error),
                **dict.fromkeys(("variant", "unit", "ours", "peer", "ratio", "met", "share_of_bandwidth")),
            }  # fmt: skip


def exported(store: str, file: Path) -> MemoryReader:
    """The store, and its GGUF beside it, made once; both will be read from disk anew, each the way its reader does."""
    if not file.exists():
        with opened(store) as reader:
            export_store(reader, file)
    forget(store, file)
    return opened(store)


def shaped_store(folder: Path, config: Path, layers: int) -> Path:
    """A store of random weights of a configuration cut to ``layers``, in its published formats; made once."""
    store = folder / f"{config.stem}-{layers}"
    if not store.exists():
        run_elmoe("synth", str(config), str(store), "--layers", str(layers))
    return store


def forget(store: str, file: Path) -> None:
    """Drop both files' pages. Memory full of an earlier model's has no room for huge ones: 4 layers decoded at 55 tokens/s
    behind 16, and at 70 by themselves."""
    for path in [*resolve_store(store).iterdir(), file]:
        evict(path)


def opened(store: str) -> MemoryReader:
    """The store; of OLMoE's shapes the chosen experts' weights are rescaled as GGUF's qwen3moe does."""
    reader = open_store(store)
    if reader.spec.family != "qwen3_moe":
        return reader
    replace = msgspec.structs.replace

    def rescaled(layer: LayerSpec) -> LayerSpec:
        if not isinstance(layer.feed_forward, Moe):
            return layer
        router = replace(layer.feed_forward.router, normalize=True)
        return replace(layer, feed_forward=replace(layer.feed_forward, router=router))

    reader.spec = replace(reader.spec, layers=tuple(rescaled(layer) for layer in reader.spec.layers))
    return reader


def show(rows: list[dict[str, Any]], title: str) -> None:
    def cell(row: dict[str, Any], key: str) -> str | None:
        value = row[key]
        if value is None or row.get("unit") != "bytes" or key == "ratio":
            return number(value)
        return f"{value / 1e9:.2f} GB"

    print_table(
        title,
        ("model", "work", "against", "ours", "peer", "variant", "ratio", "target", "met", "byte ceiling",
         "share of bandwidth", "others"),
        [
            (r["model"], r["work"], r["against"], cell(r, "ours"), cell(r, "peer"), r["variant"], cell(r, "ratio"),
             cell(r, "target"), r.get("skipped") or {None: "-", True: "yes", False: "NO"}[r["met"]],
             number(r.get("byte_ceiling")),
             None if r["share_of_bandwidth"] is None else f"{r['share_of_bandwidth']:.0%}", number(r.get("others_cores")))
            for r in rows
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/offload"), help="where stores and files are kept")
    parser.add_argument("--quick", action="store_true", help="4 layers only, within 9 minutes")
    parser.add_argument("--models", default="4,16,demo", help="layers of the shapes, or demo")
    parser.add_argument("--config", type=Path, help="config.json of other shapes; against llama.cpp alone")
    parser.add_argument("--format", default="q8_0", choices=NAMES, help="quantisation of OLMoE's shapes")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patience", type=float, help="seconds to wait for a calm machine before a run")
    parser.add_argument("--llamacpp", type=Path, default=Path("build/peers/bin"), help="folder of `make peers`")
    parser.add_argument("--ik-llama", type=Path, help="folder of ik_llama.cpp's programs, if it is built")
    parser.add_argument(
        "--only", help="parts to run, of llama,elastic,transformers,eight_bit [default: all; --quick: not transformers]"
    )
    parser.add_argument("--json", action="store_true")
    arguments, began = parser.parse_args(), perf_counter()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kernels.set_threads(2)
    models, parts = ["4"] if arguments.quick else arguments.models.split(","), list(PARTS)
    if arguments.only:
        parts = arguments.only.split(",")
    elif arguments.config:
        parts = ["llama"]
    elif arguments.quick:
        parts.remove("transformers")  # it takes minutes to load
    if arguments.format == "q8_0" and "eight_bit" in parts:
        parts.remove("eight_bit")
    if arguments.format != "q8_0" and "demo" in models:
        models.remove("demo")  # it is in Q8_0
    patience = arguments.patience if arguments.patience is not None else 30.0
    rows: list[dict[str, Any]] = []
    total = len(models) * (3 + len(BATCHES)) * ("llama" in parts) + len(models) * len(BATCHES) * ("elastic" in parts)
    total += 2 * ("transformers" in parts) + len(models) * ("eight_bit" in parts)
    with progress_bar("peers", total) as bar:
        done = -1

        def report() -> float:
            nonlocal done
            done += 1
            bar(done)
            return (QUICK_SECONDS - perf_counter() + began) / (total - done) if arguments.quick else float("inf")

        bench = Bench(arguments.rounds, patience, TOKENS, report)
        for model in models:
            store = "demo"
            if arguments.config:
                store = str(shaped_store(arguments.folder, arguments.config, int(model)))
            elif model != "demo":
                store = str(synthetic_store(arguments.folder, int(model), arguments.format))
            file = arguments.folder / f"{Path(store).name}.gguf"
            with exported(store, file) as reader:
                jobs: list[Iterator[dict[str, Any]]] = []
                if "llama" in parts:
                    ik = Llama(arguments.ik_llama, file, IK) if arguments.ik_llama else None
                    jobs.append(against_llama(bench, reader, Llama(arguments.llamacpp, file), store, ik))
                if "elastic" in parts:
                    jobs.append(against_plain(bench, reader, recorded_traces(arguments.folder, None)))
                if "eight_bit" in parts:
                    jobs.append(against_eight_bits(bench, reader, str(synthetic_store(arguments.folder, int(model)))))
                if "transformers" in parts and model == models[0]:
                    jobs.append(against_transformers(bench, reader, file))
                for job in jobs:
                    for row in job:
                        rows.append({"model": model} | row)
                        figures = ", ".join(f"{key} {number(row[key]) or '-'}" for key in ("ours", "peer", "ratio"))
                        print(f"{model}, {row['work']}: {figures}", file=sys.stderr)
            forget(store, file)
    if arguments.json:
        print(
            json.dumps(
                {"kernels": kernels.variant(), "format": arguments.format, "rounds": arguments.rounds, "rows": rows},
                indent=1,
            )
        )
    else:
        show(rows, f"our engine over its peers, medians of {arguments.rounds}, 2 threads")


if __name__ == "__main__":
    main()
