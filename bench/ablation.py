"""What each axis of the draft costs on the demo model: acceptance with other draft offsets, bits and expert budgets.

    .venv/bin/python -m bench.ablation [--json]

Every row drafts 4 tokens after the losslessness prompts; acceptance is accepted / judged draft tokens. Greedy text of so
small a model falls into loops, which are easy to draft; temperature 0.8 stands beside it for that reason. The half-integer
offset 7.5 exists in the NumPy definition only, so its row runs there, on 16 prompts, beside offsets 8 and 0 on the same.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from elmoe.bitslice import SamplingParameters
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.llm import load
from elmoe.measure.openings import joined_openings
from elmoe.terminal import number, percent, print_table, progress_bar

BASE = EngineOptions("elastic", draft_length=4, batch=8)
ROWS = (
    ("bits alone: 4 bits, offset 8 (augmented), all experts", replace(BASE, fast_memory=1.0), "native"),
    ("bits alone: 4 bits, offset 0 (truncated), all experts", replace(BASE, fast_memory=1.0, draft_offset=0.0), "native"),
    ("experts alone: 8 bits, 50 % budget", replace(BASE, fast_memory=0.5, draft_bits=8), "native"),
    ("experts alone: 8 bits, 25 % budget", replace(BASE, fast_memory=0.25, draft_bits=8), "native"),
    ("both: offset 8, 50 % budget", replace(BASE, fast_memory=0.5), "native"),
    ("both: offset 8, 25 % budget", replace(BASE, fast_memory=0.25), "native"),
    ("both: offset 0, 25 % budget", replace(BASE, fast_memory=0.25, draft_offset=0.0), "native"),
    ("both: offset 8, minimum budget", replace(BASE, fast_memory=0.0), "native"),
    ("16 prompts: offset 8, all experts", replace(BASE, fast_memory=1.0), "reference"),
    ("16 prompts: offset 7.5, all experts", replace(BASE, fast_memory=1.0, draft_offset=7.5), "reference"),
    ("16 prompts: offset 0, all experts", replace(BASE, fast_memory=1.0, draft_offset=0.0), "reference"),
)
TEMPERATURES = (0.0, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with progress_bar("rows", len(ROWS)) as bar:
        for index, (name, options, backend) in enumerate(ROWS):
            row: dict[str, object] = {"draft": name}
            for temperature in TEMPERATURES:
                with load("demo", options, backend=backend) as model:
                    count = arguments.prompts if backend == "native" else 16
                    requests = [
                        Request(ids, arguments.tokens, SamplingParameters(temperature, seed=seed), ignore_eos=True)
                        for seed, (ids, _) in enumerate(joined_openings(model, count))
                    ]
                    facts = model.engine.generate(requests)[1].as_dict()
                for key in ("acceptance_rate", "tokens_per_verification", "drafted_tokens"):
                    row[f"{key}_t{temperature:g}"] = facts[key]
            rows.append(row)
            bar(index + 1)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(
            "draft length 4; acceptance and tokens per verification at temperature 0 and 0.8",
            ("draft", "T=0", "tokens", "T=0.8", "tokens"),
            [
                (row["draft"], percent(row["acceptance_rate_t0"]), number(row["tokens_per_verification_t0"]),
                 percent(row["acceptance_rate_t0.8"]), number(row["tokens_per_verification_t0.8"]))
                for row in rows
            ],
        )  # fmt: skip


if __name__ == "__main__":
    main()
