"""How long running sequences wait while a long prompt enters: the longest gap between two of their tokens, by chunk size.

    python -m bench.gaps STORE                              # in memory
    python -m bench.gaps STORE --share 0.5                  # enforced tier that holds half of the experts

A chunk as long as the prompt is what an engine does that computes whole prompts before anyone decodes.
"""

from __future__ import annotations

import argparse
import json
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.opening import use_threads
from elmoe.store import open_direct, open_store
from elmoe.terminal import print_table

RUNNING, PROMPT = 8, 1500


def gaps(engine: Engine, rng: np.random.Generator) -> dict[str, float]:
    """Seconds between tokens of the running sequences before the prompt enters (median) and while it is computed (longest),
    and from its arrival to its first token."""
    vocabulary = engine.spec.vocabulary

    def request(length: int, tokens: int) -> Request:
        return Request(tuple(rng.integers(0, vocabulary, length).tolist()), tokens, SamplingParameters(0.8), ignore_eos=True)

    running = [engine.add(request(16, 400)) for _ in range(RUNNING)]
    before: list[float] = []
    while len(before) < 30:
        began = perf_counter()
        outputs = engine.step()
        if len(outputs) == RUNNING:
            before.append(perf_counter() - began)
    late, arrived, longest, last = engine.add(request(PROMPT, 8)), perf_counter(), 0.0, perf_counter()
    while True:
        outputs = engine.step()
        now = perf_counter()
        if any(output.request in running and output.tokens for output in outputs):
            longest, last = max(longest, now - last), now
        if any(output.request == late and output.tokens for output in outputs):
            break
    for number in (*running, late):
        engine.abort(number)
    engine.step()
    return {"before": median(before), "longest": longest, "first_token": now - arrived}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--share", type=float, help="experts that the enforced tier holds; without it all lie in memory")
    parser.add_argument("--chunks", default=f"64,256,1024,{PROMPT}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    use_threads("native")
    reader = open_store(arguments.store) if arguments.share is None else open_direct(arguments.store)
    chunks = [int(part) for part in arguments.chunks.split(",")]
    mode = "plain" if arguments.share is None else "elastic"
    engines = {
        chunk: Engine(
            reader, kernels, EngineOptions(mode, fast_memory=arguments.share, batch=RUNNING + 1, prefill_chunk=chunk)
        )
        for chunk in chunks
    }
    runs: dict[int, list[dict[str, float]]] = {chunk: [] for chunk in chunks}
    for turn in range(arguments.rounds):
        for chunk in chunks if turn % 2 == 0 else chunks[::-1]:
            runs[chunk].append(gaps(engines[chunk], np.random.default_rng(turn)))
    rows: list[dict[str, Any]] = [
        {"chunk": chunk, **{key: median(run[key] for run in found) for key in found[0]}} for chunk, found in runs.items()
    ]
    if arguments.json:
        print(json.dumps({"store": str(arguments.store), "share": arguments.share, "rows": rows}))
        return
    print_table(
        f"a prompt of {PROMPT} tokens enters while {RUNNING} sequences decode (medians of {arguments.rounds}, ms)",
        ("chunk", "between tokens before", "longest gap", "first token of the prompt"),
        [(row["chunk"], *(f"{1e3 * row[key]:.0f}" for key in ("before", "longest", "first_token"))) for row in rows],
    )


if __name__ == "__main__":
    main()
