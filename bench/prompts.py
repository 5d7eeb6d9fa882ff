"""Prompts for recorded traces: the first ones of each of the paper's four kinds, or the losslessness openings without them.

    .venv/bin/python -m bench.prompts FOLDER --count 16 > prompts.txt

FOLDER holds mt_bench/question.jsonl, gsm8k/test.jsonl, humaneval/HumanEval.jsonl.gz and self_instruct_seed/seed_tasks.jsonl
(as the projects publish them); sets that are missing are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elmoe.measure.openings import OPENINGS

SETS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "mt_bench": ("mt_bench/question.jsonl", lambda row: row["turns"][0]),
    "gsm8k": ("gsm8k/test.jsonl", lambda row: row["question"]),
    "humaneval": ("humaneval/HumanEval.jsonl.gz", lambda row: row["prompt"]),
    "self_instruct": ("self_instruct_seed/seed_tasks.jsonl", lambda row: row["instruction"]),
}


def prompts_of(folder: Path | None, count: int, sets: tuple[str, ...] = tuple(SETS)) -> list[str]:
    """``count`` prompts, taken from the sets in turn; from the committed openings if no set is there."""
    found = []
    for name in sets:
        file, text = SETS[name]
        path = None if folder is None else folder / file
        if path is not None and path.is_file():
            with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
                found.append([text(json.loads(line)) for line in lines])
    found = found or [list(OPENINGS)]
    rows = [one[index] for index in range(max(len(one) for one in found)) for one in found if index < len(one)]
    return [" ".join(rows[index % len(rows)].split()) for index in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--count", type=int, default=16)
    arguments = parser.parse_args()
    print("\n".join(prompts_of(arguments.folder, arguments.count)))


if __name__ == "__main__":
    main()
