"""The losslessness grid on the demo model: every setting must give the tokens, log-probabilities and KV bytes of plain
decoding of one sequence at a time on one thread. ``python -m tests.lossless`` runs it whole (`make full-grid`); the smoke
tests run a sample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import dataclass
from time import perf_counter

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request, Result
from elmoe.llm import Model, load
from elmoe.measure.openings import joined_openings

DRAFT_LENGTHS = (1, 2, 4, 8)
BUDGETS = (0.0, 0.25, 0.5, 1.0)  # 0.0: the minimum
BATCHES = (1, 3, 8, 16)
THREADS = (1, 2)
TEMPERATURES = (0.0, 0.8)


@dataclass(frozen=True)
class Case:
    """One point of the grid."""

    draft_length: int
    budget: float
    batch: int
    threads: int
    temperature: float


def grid() -> list[Case]:
    """Every point."""
    return [Case(*values) for values in itertools.product(DRAFT_LENGTHS, BUDGETS, BATCHES, THREADS, TEMPERATURES)]


def requests(model: Model, count: int, temperature: float) -> list[Request]:
    """The same prompts for every case of a temperature; each has a seed of its own, and every third one penalties."""
    penalties = [{}, {}, {"presence_penalty": 0.4, "frequency_penalty": 0.2, "repetition_penalty": 1.1}]
    return [
        Request(
            ids, tokens,
            SamplingParameters(temperature, top_p=0.95 if temperature else 1.0, seed=index, **penalties[index % 3]),
        )
        for index, (ids, tokens) in enumerate(joined_openings(model, count))
    ]  # fmt: skip


def reference(model: Model, count: int, temperature: float) -> list[Result]:
    """Plain decoding, one sequence at a time, one thread."""
    kernels.set_threads(1)
    engine = model.new_engine(EngineOptions(mode="plain", batch=1, keep_kv_digest=True))
    return engine.generate(requests(model, count, temperature))[0]


def run(model: Model, case: Case, count: int) -> tuple[list[Result], dict[str, object]]:
    """Elastic decoding at one point of the grid."""
    kernels.set_threads(case.threads)
    engine = model.new_engine(
        EngineOptions("elastic", case.budget, draft_length=case.draft_length, batch=case.batch, keep_kv_digest=True)
    )
    results, statistics = engine.generate(requests(model, count, case.temperature))
    return results, statistics.as_dict()


def main() -> None:
    """Run the whole grid and print a JSON summary; exit code 1 at the first difference."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--store", default="demo", help="a store of the demo model, in other formats perhaps")
    parser.add_argument("--every", type=int, default=1, help="run every n-th case only")
    arguments = parser.parse_args()
    began, generations = perf_counter(), 0
    with load(arguments.store) as model:
        expected = {t: reference(model, arguments.prompts, t) for t in TEMPERATURES}
        cases = grid()[:: arguments.every]
        for index, case in enumerate(cases):
            results, _ = run(model, case, arguments.prompts)
            generations += len(results)
            if results != expected[case.temperature]:
                different = [
                    i for i, pair in enumerate(zip(results, expected[case.temperature], strict=True)) if pair[0] != pair[1]
                ]
                sys.exit(f"{case}: prompts {different} differ from plain decoding")
            print(f"\r{index + 1}/{len(cases)} cases identical", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    seconds = perf_counter() - began
    print(json.dumps({"cases": len(cases), "prompts": arguments.prompts, "generations": generations, "identical": 1.0,
                      "seconds": round(seconds, 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
