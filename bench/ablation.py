"""What each axis of the draft costs on the demo model: acceptance with other draft offsets, bits and expert budgets.

    .venv/bin/python bench/ablation.py [--json]

Every row drafts 4 tokens from prompts of held-out style (the losslessness prompts) with greedy decoding; acceptance is
accepted / judged draft tokens. The half-integer offset 7.5 exists in the NumPy definition only, so its row runs there, on
fewer prompts beside an offset-8 row on the same prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.lossless import prompts

from elmoe.cli.common import percent, print_table, progress_bar
from elmoe.engine.engine import EngineOptions
from elmoe.engine.request import Request
from elmoe.engine.session import Session

BASE = EngineOptions("elastic", draft_length=4, batch=8)
ROWS = (
    ("bit axis alone: 4 bits, augmented (offset 8), all experts", replace(BASE, fast_memory=1.0), "native"),
    (
        "bit axis alone: 4 bits, truncated (offset 0), all experts",
        replace(BASE, fast_memory=1.0, draft_offset=0.0),
        "native",
    ),
    ("expert axis alone: 8 bits, 50 % budget", replace(BASE, fast_memory=0.5, draft_bits=8), "native"),
    ("expert axis alone: 8 bits, 25 % budget", replace(BASE, fast_memory=0.25, draft_bits=8), "native"),
    ("both axes: offset 8, 50 % budget", replace(BASE, fast_memory=0.5), "native"),
    ("both axes: offset 8, 25 % budget", replace(BASE, fast_memory=0.25), "native"),
    ("both axes: offset 8, minimum budget", replace(BASE, fast_memory=0.0), "native"),
    ("both axes: offset 0, 25 % budget", replace(BASE, fast_memory=0.25, draft_offset=0.0), "native"),
    ("few prompts, offset 8, all experts", replace(BASE, fast_memory=1.0), "reference"),
    ("few prompts, offset 7.5, all experts", replace(BASE, fast_memory=1.0, draft_offset=7.5), "reference"),
    ("few prompts, offset 0, all experts", replace(BASE, fast_memory=1.0, draft_offset=0.0), "reference"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    with progress_bar("rows", len(ROWS)) as bar:
        for index, (name, options, backend) in enumerate(ROWS):
            count, length = (arguments.prompts, arguments.tokens) if backend == "native" else (8, 24)
            with Session("demo", options, backend) as session:
                requests = [Request(ids, length, ignore_eos=True) for ids, _ in prompts(session, count)]
                facts = session.generate(requests)[1].as_dict()
            rows.append(
                {
                    "draft": name,
                    **{
                        key: facts[key]
                        for key in (
                            "acceptance_rate",
                            "tokens_per_verification",
                            "drafted_tokens",
                            "accepted_tokens",
                            "msb_hit_rate",
                        )
                    },
                }
            )
            bar(index + 1)
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table("draft length 4, greedy", ("draft", "acceptance", "tokens per verification", "judged on"), [
            (row["draft"], percent(row["acceptance_rate"]), f"{row['tokens_per_verification']:.2f}", row["drafted_tokens"])
            for row in rows])  # fmt: skip


if __name__ == "__main__":
    main()
