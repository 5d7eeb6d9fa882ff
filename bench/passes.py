"""Prompt and decode speed of a store in memory, and which kernels take the time.

    .venv/bin/elmoe synth bench/olmoe_shapes.json build/olmoe-4 --layers 4
    .venv/bin/python -m bench.passes build/olmoe-4 [--json] [--prompt 512] [--batch 1,4,8,16] [--steps 16] [--repeats 3]

Plain decoding of random tokens. Rows interleave; medians of ``--repeats`` runs behind one that is not counted.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from statistics import median
from typing import Any

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.observe import Timeline
from elmoe.engine.options import EngineOptions
from elmoe.llm import Model, load
from elmoe.measure.benchmark import random_prompts
from elmoe.terminal import print_table

SHOWN = ("attention", "routing", "experts", "logits")


def run(model: Model, batch: int, prompt: int, steps: int) -> dict[str, Any]:
    """One run: seconds of the phase of interest (prefill if there is one step only) and the kernels' shares of it."""
    timeline = Timeline()
    engine = Engine(model.reader, model.backend, EngineOptions(mode="plain", batch=batch))
    requests = random_prompts(model, batch, prompt, steps, SamplingParameters(0.0))
    _, statistics = engine.generate(requests, timeline=timeline)
    spent: Counter[str] = Counter()
    for track, name, began, ended in timeline.spans:
        if track == "kernels":
            spent[name.split()[0]] += ended - began
    phase = statistics.phases["prefill" if steps == 1 else "plain"]
    shares = {name: spent[name] / statistics.engine_seconds for name in SHOWN}
    shares["outside"] = 1 - sum(spent.values()) / statistics.engine_seconds
    return {"tokens_per_second": phase.tokens / phase.seconds, **shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", default="1,4,8,16")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    cases = [("prompt", 1, arguments.prompt + 1, 1)]
    cases += [("decode", int(batch), 4, arguments.steps + 1) for batch in arguments.batch.split(",")]
    runs: list[list[dict[str, Any]]] = [[] for _ in cases]
    with load(arguments.store, EngineOptions(mode="plain"), reader="memory", threads=2) as model:
        for _ in range(arguments.repeats + 1):
            for samples, (_, batch, prompt, steps) in zip(runs, cases, strict=True):
                samples.append(run(model, batch, prompt, steps))
    rows = [
        {"phase": phase, "batch": batch, **{key: median(sample[key] for sample in samples[1:]) for key in samples[0]}}
        for (phase, batch, _, _), samples in zip(cases, runs, strict=True)
    ]
    if arguments.json:
        print(json.dumps({"variant": kernels.variant(), "threads": kernels.threads(), "rows": rows}, indent=1))
        return
    print_table(
        f"{arguments.store}, {kernels.variant()}, {kernels.threads()} threads, medians of {arguments.repeats}",
        ("phase", "batch", "tokens/s", *SHOWN, "outside kernels"),
        [
            (
                row["phase"],
                row["batch"],
                f"{row['tokens_per_second']:.1f}",
                *(f"{row[name]:.1%}" for name in (*SHOWN, "outside")),
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
