"""Models larger than the fast tier: naive offloading, an LRU expert cache, elastic decoding and llama.cpp, side by side.

    .venv/bin/python -m bench.offload --quick --json     # 4 layers, one budget, batch 1, 4, 16: under 10 minutes
    .venv/bin/python -m bench.offload                    # OLMoE-1B-7B shapes, 2, 3 and 4 GiB, batch 1 to 16
    .venv/bin/python -m bench.offload --quick --format q4_k_m --own-routing --budgets 30%
    .venv/bin/python -m bench.offload --demo             # the demo model, real routing, a throttled slow tier

Definitions, what is measured and what is not: bench/README.md. ``--prompts FOLDER`` takes the prompts of the recorded trace
from published sets (see bench/prompts.py). The stores and traces are kept in ``--folder`` and made once.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter
from typing import Any

from bench import llama_offload
from bench.ceilings import Ceilings
from bench.own_routing import by_its_own, random_prompts
from bench.prompts import prompts_of
from bench.quantisations import NAMES, SkewedRouters, shapes_of, write_store
from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.convert.gguf_export import export_store
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.llm import load
from elmoe.measure.probe import disk_bandwidth, memory_bandwidth
from elmoe.measure.replay import ReplayBackend
from elmoe.opening import load_backend
from elmoe.policy.residency import ResidencyParameters
from elmoe.store import open_direct, open_store
from elmoe.store.synthetic import RandomWeights
from elmoe.terminal import number, print_table, progress_bar
from elmoe.trace import draft_facts_of_trace, read_trace
from elmoe.trace.draft_facts import DraftFacts
from elmoe.units import parse_bytes

SHAPES = Path(__file__).with_name("olmoe_shapes.json")
SYSTEMS: dict[str, dict[str, Any]] = {
    "naive": {"mode": "plain"},
    "lru": {"mode": "cache", "split": "whole_experts", "residency": ResidencyParameters("lru")},
    "elastic": {"mode": "elastic"},
    "cache": {"mode": "cache"},
    **{f"elastic-{length}": {"mode": "elastic", "draft_length": length} for length in (1, 2, 4, 8)},
}
FIXED = [name for name in SYSTEMS if name not in ("naive", "lru", "elastic")]
"""The automatic mode's rivals, for --systems."""
SHARES = (25, 37, 50, 62, 75, 87, 100)
"""Percent of experts resident while the replayed traces were recorded."""
TOKENS = {
    "naive": {1: 3, 2: 3, 4: 3, 8: 2, 16: 2},
    "lru": {1: 64, 2: 64, 4: 48, 8: 12, 16: 6},
    "cache": {1: 64, 2: 64, 4: 48, 8: 12, 16: 6},
    "elastic": {1: 64, 2: 64, 4: 48, 8: 32, 16: 32},
    "warm_up": {1: 28, 2: 16, 4: 10, 8: 6, 16: 6},
}
"""Tokens per sequence and run of the 16-layer shapes, by batch size. Caches get better as a sequence goes on, so where runs
have few sequences all systems that cache run equally long."""
IDEALS = ("clairvoyant", "policy")
"""Ceilings, see bench/ceilings.py."""
ALL_BATCHES = "1,2,4,8,16"
SEQUENCES, TRACE_TOKENS, PROMPT_TOKENS = 16, 160, 64


def steady_rate(engine: Engine, requests: list[Request]) -> tuple[float, dict[str, Any]]:
    """Tokens per second from the first decoded token of the batch until its first sequence ends, and the statistics.

    Behind that point fewer sequences run: systems that commit ragged counts would be charged for a batch they do not have.
    """
    began = ended = 0.0
    tokens = 0
    for outputs in engine.run(requests):
        if ended:
            continue
        committed = sum(len(output.tokens) for output in outputs)
        now = perf_counter()
        if not began:  # the first step's tokens start the clock
            began = now if committed else 0.0
        else:
            tokens += committed
        if any(output.result is not None for output in outputs):
            ended = now
    if ended <= began:
        raise SystemExit("a sequence ended in its first decode step: give runs more tokens than a draft has")
    return tokens / (ended - began), engine.statistics.as_dict()


def window(index: int, batch: int) -> list[int]:
    """Sequences of a round: others than the round before, as far as there are others, as a server would see."""
    return [(index * batch + offset) % SEQUENCES for offset in range(batch)]


class System:
    """One system at a budget and batch size: its engine, warm from run to run, and what its runs gave."""

    def __init__(self, name: str, budget: int | float, batch: int, tokens: int, make: Any, bandwidth: float | None) -> None:
        self.name, self.budget, self.batch, self.tokens = name, budget, batch, tokens
        options = EngineOptions(batch=batch, fast_memory=budget, slow_bandwidth=bandwidth, **SYSTEMS[name])
        self.engine, self.requests, self.outcome = make(options)
        self.runs: list[tuple[float, dict[str, Any]]] = []
        self.outcomes: list[Any] = []
        self.slices: list[list[int] | None] = []

    def warm_up(self, tokens: int) -> None:
        self.engine.generate(self.requests(window(-1, self.batch), tokens))

    def run(self) -> None:
        """One more round, on the next sequences."""
        self.outcome()
        sequences = window(len(self.runs), self.batch)
        self.runs.append(steady_rate(self.engine, self.requests(sequences, self.tokens)))
        self.outcomes.append(self.outcome())
        plan = self.engine.planner.chosen
        slots = None if plan is None or self.name == "lru" else plan.slots
        self.slices.append(None if slots is None else [slots.msb[0], slots.lsb[0]])

    def over(self, other: System) -> float:
        """Median over rounds of the ratio of rates: what drifts from round to round cancels."""
        return median(mine[0] / its[0] for mine, its in zip(self.runs, other.runs, strict=True))

    def row(self) -> dict[str, Any]:
        """Medians of the runs; facts of the run nearest to the median."""
        rate = median(run[0] for run in self.runs)
        facts = min(self.runs, key=lambda run: abs(run[0] - rate))[1]
        phases = [facts["phases"][name] for name in ("plain", "draft", "verify")]
        return {
            "system": self.name, "batch": self.batch, "budget": self.budget, "tokens_per_second": rate,
            "runs": [run[0] for run in self.runs], "acceptance_rate": facts["acceptance_rate"],
            "tokens_per_verification": facts["tokens_per_verification"], "msb_hit_rate": facts["msb_hit_rate"],
            "lsb_hit_rate": facts["lsb_hit_rate"], "slow_bytes_per_token": facts["slow_bytes_per_token"],
            "waited_share": sum(p["waited_seconds"] for p in phases) / sum(p["seconds"] for p in phases),
            "draft_share": phases[1]["seconds"] / sum(p["seconds"] for p in phases),
            "slices": self.slices, "slow_bandwidth": self.engine.planner.costs.bandwidth,
        }  # fmt: skip


def replayed(store: Path, facts: list[DraftFacts]) -> tuple[Any, Any]:
    """(engine maker over the direct reader, all-resident engine maker) of a store driven by traces."""
    reader = open_direct(store)
    replay = ReplayBackend(load_backend("native"), reader.spec, facts)

    def make(options: EngineOptions, source: Any = reader) -> tuple[Engine, Any, Any]:
        engine = Engine(source, replay, options, replay)
        return engine, replay.requests, replay.committed_digests

    resident = open_store(store)
    return make, lambda options: make(options, resident)


def ceilings_of(facts: list[DraftFacts], engine: Engine, batch: int, rounds: int) -> Ceilings:
    """The ceilings of an engine's budget, see bench/ceilings.py."""
    requests = [Request((0,) * PROMPT_TOKENS, TRACE_TOKENS - PROMPT_TOKENS, SamplingParameters())] * batch
    sizes = engine.fitting.sizes(requests)
    return Ceilings(facts, [window(index, batch) for index in range(rounds)], sizes, engine.fitting.budget(sizes))


def recorded_traces(folder: Path, prompts: Path | None) -> list[Path]:
    """Traces of the demo model with a draft from every position, one for each share of resident experts; made once."""
    text = folder / "prompts.txt"
    if not text.exists():  # the traces that are there were recorded with the text that is there
        text.write_text("\n".join(prompts_of(prompts, SEQUENCES)))
    paths = []
    for share in SHARES:
        path = folder / f"demo-{share}.trace"
        paths.append(path)
        if not path.exists():
            run_elmoe(
                "trace", "record", "demo", str(path), "--prompts", str(text), "--prompt-tokens", str(PROMPT_TOKENS),
                "--max-tokens", str(TRACE_TOKENS), "--batch", str(SEQUENCES), "--every-position",
                "--split", "whole_experts", "--fast-memory", f"{share}%",
            )  # fmt: skip
    return paths


def synthetic_store(folder: Path, layers: int, quantisation: str = "q8_0") -> Path:
    """A store of OLMoE-1B-7B's shapes; made once."""
    store = folder / (f"olmoe-{layers}" if quantisation == "q8_0" else f"olmoe-{layers}-{quantisation}")
    write_store(store, shapes_of(SHAPES, num_hidden_layers=layers), quantisation, RandomWeights(0))
    return store


def skewed_store(folder: Path, layers: int, quantisation: str) -> tuple[Path, Path]:
    """A store of these shapes whose routers are skewed, and the GGUF file of it; made once."""
    store = folder / f"olmoe-{layers}-{quantisation}-skewed"
    # GGUF's qwen3moe rescales the chosen experts' weights
    spec = shapes_of(SHAPES, num_hidden_layers=layers, norm_topk_prob=True)
    write_store(store, spec, quantisation, SkewedRouters(0, llama_offload.SKEW))
    file = store.with_suffix(".gguf")
    if not file.exists():
        with open_store(store) as reader:
            export_store(reader, file)
    return store, file


def parse_budget(text: str, store: Path) -> int:
    """Bytes, or a share of the model's file such as 30%."""
    if not text.endswith("%"):
        return parse_bytes(text)
    with open_store(store) as reader:
        return int(float(text[:-1]) / 100 * sum(file.bytes for file in reader.manifest.files))


def run_elmoe(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "elmoe.cli.main", *arguments], check=True, stdout=sys.stderr)


def compare(
    budgets: list[int | float], repeats: dict[int, int], make: Any, resident: Any,
    tokens: dict[str, dict[int, int]], bandwidth: float | None, disk: float, names: list[str], finished: Path | None = None,
    ceilings: Callable[[Engine, int, int], Ceilings] | None = None, memory: float = 0.0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of all our systems: the runs of a cell's systems alternate, so that all see the same disk; `identical` against
    the run in memory.

    :param repeats: runs, by batch size. :param finished: a file that always holds the rows finished so far.
    :param ceilings: see :func:`ceilings_of`.
    :param disk, memory: their bandwidths, bytes per second.
    """
    rows: list[dict[str, Any]] = []
    with progress_bar("runs", sum(repeats.values()) * len(budgets) * (1 + len(names))) as bar:
        for batch, rounds in repeats.items():
            engine, requests, outcome = resident(EngineOptions("plain", batch=batch))
            engine.generate(requests(window(-1, batch), 4))
            outcome()
            length = max(counts[batch] for name, counts in tokens.items() if name != "warm_up")
            ceiling = median(steady_rate(engine, requests(window(i, batch), length))[0] for i in range(rounds))
            reference = outcome()
            for budget in budgets:
                systems = [
                    System(name, budget, batch, tokens.get(name, tokens["elastic"])[batch], make, bandwidth)
                    for name in ["naive", *names]
                ]
                for system in systems[1:]:
                    system.warm_up(tokens["warm_up"][batch])
                for turn in range(rounds):
                    for system in systems[:: -1 if turn % 2 else 1]:
                        system.run()
                        bar(sum(len(row["runs"]) for row in rows) + sum(len(s.runs) for s in systems))
                ideal: dict[str, float] = {}
                if ceilings is not None:  # at the fastest reads that any system of the cell saw
                    fastest = max(system.engine.planner.costs.bandwidth for system in systems)
                    bounds = ceilings(systems[0].engine, batch, rounds)
                    rates = fastest / bounds.clairvoyant_bytes(), bounds.policy_rate(fastest, memory)
                    naive = bounds.naive_rate(fastest, memory)
                    for name, rate in zip(IDEALS, (min(ceiling, rate) for rate in rates), strict=True):
                        ideal |= {f"{name}_tokens_per_second": rate, f"{name}_over_naive": rate / naive}
                rows += [finished_row(system, systems, reference, ceiling, disk, bandwidth) | ideal for system in systems]
                if finished is not None:
                    finished.write_text(json.dumps(rows))
                del systems
                gc.collect()  # these arenas go before the next ones come
    return rows


def finished_row(
    system: System, systems: list[System], reference: Any, ceiling: float, disk: float, bandwidth: float | None
) -> dict[str, Any]:
    """A system's row beside those it alternated with."""
    row = system.row()
    slow, speed = row["slow_bytes_per_token"], disk if bandwidth is None else bandwidth
    lru = next((other for other in systems if other.name == "lru"), system)
    byte_ceiling = speed / slow if slow else None
    return row | {
        "identical": all(same(outcome, reference) for outcome in system.outcomes),
        "over_naive": system.over(systems[0]),
        "over_lru": None if lru is system else system.over(lru),
        "over": {other.name: system.over(other) for other in systems},
        "resident_tokens_per_second": ceiling,
        "byte_ceiling_tokens_per_second": byte_ceiling,
    }


def same(outcome: dict[Any, Any], reference: dict[Any, Any]) -> bool:
    """Whether two runs agree at every (sequence, position) that both computed: hashes of logits, or what was sampled."""
    common = outcome.keys() & reference.keys()
    return bool(common) and all(outcome[key] == reference[key] for key in common)


def means(rows: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Arithmetic and geometric mean over the batch sizes of elastic's ratio, for each budget."""
    result = {}
    for budget in sorted({row["budget"] for row in rows if row["system"] == "elastic"}):
        ratios = [r[key] for r in rows if r["system"] == "elastic" and r["budget"] == budget and r.get(key)]
        if ratios:
            result[str(budget)] = {
                "mean": sum(ratios) / len(ratios), "geometric": geometric_mean(ratios), "least": min(ratios),
                "most": max(ratios),
            }  # fmt: skip
    return result


def demo_model(repeats: int, batches: list[int], names: list[str]) -> dict[str, Any]:
    """The demo model with real routing and acceptance; reading one batch-1 step's expert bytes takes 16 times that step.

    Small batches run as many rounds as there are sequences for: those differ by more than what is compared.
    """
    with load("demo", threads=2) as model:
        prompts = prompts_of(None, SEQUENCES)
        prompt_ids = [model.encode(text)[:PROMPT_TOKENS] for text in prompts]

    with open_store("demo") as memory, open_direct("demo") as reader:
        spec = memory.spec
        make, in_memory = by_its_own(reader, memory, prompt_ids, temperature=0.8)
        resident, requests, _ = in_memory(EngineOptions("plain"))
        step = 1 / median(steady_rate(resident, requests([0], 64))[0] for _ in range(5))
        layouts = [memory.expert_layout(layer) for layer in spec.moe_layers]
        step_bytes = spec.top_k * sum(layout.msb_bytes + layout.lsb_bytes for layout in layouts)
        bandwidth = step_bytes / (16 * step)
        rows = compare(
            [0.25, 0.5], {batch: max(repeats, SEQUENCES // batch) for batch in batches}, make, in_memory,
            {name: dict.fromkeys(batches, n) for name, n in (("naive", 32), ("elastic", 96), ("warm_up", 48))},
            bandwidth, 0.0, names,
        )  # fmt: skip
    return summary(rows) | {"slow_bandwidth": bandwidth, "resident_step_seconds": step, "throttled": True, "replayed": False}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``--json`` carries besides the machine."""
    resident = [row["resident_tokens_per_second"] / row["tokens_per_second"] for row in rows if row["system"] == "naive"]
    return {
        "mean_over_naive": means(rows, "over_naive"),
        "mean_over_lru": means(rows, "over_lru"),
        **{f"mean_{ideal}_over_naive": means(rows, f"{ideal}_over_naive") for ideal in IDEALS},
        "mean_over_llamacpp": means(rows, "over_llamacpp") or None,
        "least_over_fixed": min((ratio for row in rows if row["system"] == "elastic" for name, ratio in row["over"].items()
                                 if name in FIXED), default=None),
        "resident_over_naive": sum(resident) / len(resident),
        "identical": all(row["identical"] for row in rows if row["identical"] is not None),
        "rows": rows,
    }  # fmt: skip


def show(data: dict[str, Any], title: str) -> None:
    print_table(
        title,
        ("budget", "batch", "system", "tokens/s", "x naive", "x LRU", "accepted", "tokens/ver.", "hits MSB, LSB", "kept",
         "waiting", "byte ceiling", "all resident", "policy ceiling", "clairvoyant", "same"),
        [
            (f"{r['budget']:.0%}" if isinstance(r["budget"], float) else f"{r['budget'] / 2**30:.4g} GiB", r["batch"],
             r["system"], number(r["tokens_per_second"]), number(r["over_naive"]), number(r["over_lru"]),
             number(r["acceptance_rate"]), number(r["tokens_per_verification"]),
             None if r["msb_hit_rate"] is None else f"{r['msb_hit_rate']:.2f} {r['lsb_hit_rate']:.2f}",
             r["slices"] and r["slices"][-1],
             number(r["waited_share"]), number(r["byte_ceiling_tokens_per_second"], 1),
             number(r["resident_tokens_per_second"], 1),
             number(r.get("policy_tokens_per_second"), 1), number(r.get("clairvoyant_tokens_per_second"), 1),
             "-" if r["identical"] is None else "yes" if r["identical"] else "NO")
            for r in sorted(data["rows"], key=lambda r: (r["budget"], r["batch"]))
        ],
    )  # fmt: skip
    for key in (
        "mean_over_naive",
        *(f"mean_{ideal}_over_naive" for ideal in IDEALS),
        "mean_over_lru",
        "mean_over_llamacpp",
        "least_over_fixed",
        "resident_over_naive",
        "identical",
    ):
        print(f"{key}: {json.dumps(data[key])}")


def larger_than_memory(arguments: argparse.Namespace, batches: list[int], names: list[str]) -> dict[str, Any]:
    """Rows of all systems and peers on a model of OLMoE's shapes."""
    folder, layers = arguments.folder, arguments.layers or (4 if arguments.quick else 16)
    batches = [1, 4, 16] if arguments.quick and arguments.batch == ALL_BATCHES else batches
    store, file = skewed_store(folder, layers, arguments.format)
    quick = "1340MiB" if arguments.format == "q8_0" else "60%"  # half of the expert bytes beside dense, KV and staging
    texts = arguments.budgets or (quick if arguments.quick else "2GiB,3GiB,4GiB")
    budgets: list[int | float] = [parse_budget(text, store) for text in texts.split(",")]
    disk, memory = disk_bandwidth(store / "layer-000.experts"), memory_bandwidth(1 << 30, 2)
    bounds = None
    if arguments.own_routing:
        reader, in_memory = open_direct(store), open_store(store)
        prompts = random_prompts(reader.spec.vocabulary, SEQUENCES, PROMPT_TOKENS)
        make, resident = by_its_own(reader, in_memory, prompts, temperature=1.0)
    else:
        facts = [draft_facts_of_trace(read_trace(path)) for path in recorded_traces(folder, arguments.prompts)]
        make, resident = replayed(store, facts)
        bounds = partial(ceilings_of, facts)
    rows = compare(
        budgets, dict.fromkeys(batches, arguments.repeats), make, resident, TOKENS, arguments.slow_bandwidth, disk, names,
        folder / "partial.json", bounds, memory,
    )  # fmt: skip
    reason = llama_offload.add_rows(
        rows, file, layers, budgets, batches, arguments.llamacpp, arguments.slow_bandwidth, arguments.peer
    )
    return summary(rows) | {
        "layers": layers, "format": arguments.format, "file_bytes": file.stat().st_size, "disk_bytes_per_second": disk,
        "memory_bytes_per_second": memory, "replayed": not arguments.own_routing,
        "throttled": arguments.slow_bandwidth is not None, "llamacpp": reason,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path("build/offload"), help="where stores and traces are kept (10 GB)"
    )
    parser.add_argument("--prompts", type=Path, help="folder of published prompt sets")
    parser.add_argument(
        "--quick", action="store_true", help="4 layers and one budget unless others are given, batch 1, 4, 16"
    )
    parser.add_argument("--layers", type=int, help="[default: 16; --quick: 4]")
    parser.add_argument("--format", default="q8_0", choices=NAMES, help="quantisation of the model")
    parser.add_argument("--own-routing", action="store_true", help="decode by the model's own routing, without a replay")
    parser.add_argument("--demo", action="store_true", help="the demo model, throttled")
    parser.add_argument(
        "--budgets", help="bytes, or shares of the file such as 30%% [default: 2GiB,3GiB,4GiB; --quick: about half]"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=COMMAND",
        help="one more peer in the same limit: a command with {model}, {tokens} and perhaps {batch}, {budget} (bytes) "
        "that prints its rate last, as '12.3 tokens/s' or 'tok/s'",
    )
    parser.add_argument("--batch", default=ALL_BATCHES)
    parser.add_argument("--systems", default="lru,elastic", help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--llamacpp", type=Path, default=Path("build/peers/bin"), help="folder of `make peers`")
    parser.add_argument("--slow-bandwidth", type=float, help="throttle the disk, bytes per second")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    kernels.set_threads(2)
    batches, names = [int(batch) for batch in arguments.batch.split(",")], arguments.systems.split(",")
    if arguments.demo:
        data = demo_model(arguments.repeats, batches, names)
        title = "demo model, real routing, slow tier throttled"
    else:
        data = larger_than_memory(arguments, batches, names)
        how = "own routing" if arguments.own_routing else "replayed"
        title = f"OLMoE-1B-7B shapes, {data['layers']} layers, {arguments.format}, {how}"
    if arguments.json:
        print(json.dumps(data, indent=1))
    else:
        show(data, title)


if __name__ == "__main__":
    main()
