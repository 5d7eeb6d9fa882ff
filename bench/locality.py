"""Records the demo model on four prompt sets, fits how local its routing is, and measures acceptance: the presets.

    .venv/bin/python -m bench.locality --prompts FOLDER [--out src/elmoe/presets]

FOLDER as of bench/prompts.py; sets that are missing are skipped, and without any nothing is written. Per set: 16 sequences,
prompts cut to 64 tokens, 96 new tokens whatever ends in them, temperature 0.8. The self-instruct seed tasks stand for
Alpaca, which was made from them. The acceptance table takes prompts from the sets in turn and some minutes;
--skip-acceptance leaves it out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.prompts import SETS, prompts_of
from elmoe.bitslice import SamplingParameters
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.llm import Model, load
from elmoe.measure.acceptance import profile_acceptance
from elmoe.opening import use_threads
from elmoe.terminal import percent, print_table
from elmoe.trace import AcceptanceTable, Locality, TraceRecorder, fit_locality, read_facts, save_acceptance, save_locality

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"mt_bench": "mt_bench", "gsm8k": "gsm8k", "self_instruct": "alpaca", "humaneval": "humaneval"}
SEQUENCES, PROMPT, TOKENS, TEMPERATURE = 16, 64, 96, 0.8


def requests_of(model: Model, texts: list[str]) -> list[Request]:
    return [
        Request(model.encode(text)[:PROMPT], TOKENS, SamplingParameters(TEMPERATURE, seed=index), ignore_eos=True)
        for index, text in enumerate(texts)
    ]


def fitted(folder: Path, name: str) -> Locality:
    """Plain decoding: the text, and so the routing of what stays, is the same in every mode."""
    label = name if NAMES[name] == name else f"{name} (for {NAMES[name]})"
    with load("demo", EngineOptions("plain", batch=SEQUENCES)) as model, TemporaryDirectory() as temporary:
        run = {"store": "demo", "prompts": label, "temperature": TEMPERATURE, "seed": 0}
        with TraceRecorder(Path(temporary) / "trace", model.reader.spec, run) as recorder:
            model.engine.generate(requests_of(model, prompts_of(folder, SEQUENCES, (name,))), recorder)
        return fit_locality(read_facts(Path(temporary) / "trace"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "elmoe" / "presets")
    parser.add_argument("--skip-acceptance", action="store_true")
    arguments = parser.parse_args()
    sets = [name for name in NAMES if (arguments.prompts / SETS[name][0]).is_file()]
    if not sets:
        print(f"no prompt set in '{arguments.prompts}': nothing to do", file=sys.stderr)
        return
    use_threads("native")
    for kind in ("locality", "acceptance"):
        (arguments.out / kind).mkdir(parents=True, exist_ok=True)
    found = {NAMES[name]: fitted(arguments.prompts, name) for name in sets}
    for name, locality in found.items():
        save_locality(locality, arguments.out / "locality" / f"{name}.json")
    names = ("popularity", "sequence", "token", "correlation", "noise")
    rows = [(name, *(f"{getattr(one, name):.3f}" for one in found.values())) for name in names]
    statistics = zip(*((*one.fit, *one.check) for one in found.values()), strict=True)
    rows += [(s[0].name, *(f"{one.measured:.3f} {100 * (one.relative_error or 0):+.1f} %" for one in s)) for s in statistics]
    print_table("parameters; measured, and relative error of synthetic facts", ("", *found), rows)
    if arguments.skip_acceptance:
        return
    with load("demo", EngineOptions(batch=SEQUENCES)) as model:
        requests = requests_of(model, prompts_of(arguments.prompts, SEQUENCES, tuple(sets)))
        measured = profile_acceptance(model, requests)
    source = f"store demo; {SEQUENCES} prompts of {', '.join(sets)} x {TOKENS} tokens, temperature {TEMPERATURE}, seed 0"
    table = AcceptanceTable(status="measured", source=source, rows=measured)
    save_acceptance(table, arguments.out / "acceptance" / "demo.json")
    print_table(
        "acceptance by depth", ("bits", "resident", "1", "4", "16"),
        [
            (row.bits, percent(row.share), *(percent(table.probability(row.bits, row.share, n)) for n in (1, 4, 16)))
            for row in measured
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
