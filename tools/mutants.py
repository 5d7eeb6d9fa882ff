"""Do the tests bite? A sample of small changes of the source, each of which some test must notice: ``make mutants``.

Each mutant is one change of one expression of a module. Tests that run its line (`mutant_tests`) run in a copy of the
package with it, up to the first that fails: first those in the files of the module (``TESTS``), shortest first. A mutant is
killed where a test fails, the tests take several times the processor time that they need, or the import fails; it survives
at once where no test runs its line. Results are JSON lines in ``build/mutants/results.jsonl``; those there are kept, so that
a run can be done in pieces. Time is processor time: a process that is stopped or waits for others is not late.
``--packages hw systems sim`` draws from these alone and runs the tests listed for them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic

from tools.mutant_copy import ROOT, Copy
from tools.mutant_tests import Lines
from tools.mutations import changes

PACKAGES = ("policy", "engine", "store", "convert", "hw", "systems", "sim")
WORK = ROOT / "build" / "mutants"
BUDGET = 120.0
"""Most seconds that the tests of a mutant take without it, unless ``--budget`` says more; further tests are left out."""
_ENGINE = ("unit/test_step", "unit/test_engine", "unit/test_llm", "unit/test_direct", "kernels/test_forward")
_STORE = ("unit/test_store", "unit/test_writer", "unit/test_convert", "unit/test_slow_tier")
ASSUMED = 5.0
"""Seconds of a test that is newer than the recording."""
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.json")
"""Mutants that no test should notice: by name, the reason."""
_GGUF = ("unit/test_gguf", "unit/test_gguf_refusals", "unit/test_gguf_formats", "unit/test_gguf_tokenizers")
_CONVERT = ("unit/test_convert", "unit/test_import", *_GGUF)
_SIMULATION = (
    "golden/test_simulated", "physics/test_physics", "physics/test_energy", "unit/test_workload", "unit/test_modelling",
    "unit/test_rivals", "unit/test_trees", "unit/test_steps", "unit/test_own_hardware", "unit/test_report",
    "unit/test_sweep", "unit/test_validation_data", "smoke/test_simulate", "smoke/test_routing", "smoke/test_ground_truth",
    "physics/test_efficiency",
)  # fmt: skip
TESTS: dict[str, tuple[str, ...]] = {
    "policy": ("unit/test_policy", "unit/test_planner", "unit/test_costs", "unit/test_read_history", *_ENGINE[:2]),
    "policy/planner.py": ("unit/test_planner", "unit/test_costs", "unit/test_engine"),
    "policy/cost.py": ("unit/test_costs", "unit/test_planner"),
    "policy/acceptance.py": ("unit/test_draft_acceptance", "unit/test_planner", "unit/test_step"),
    "policy/budget.py": (
        "unit/test_policy",
        "unit/test_ceilings",
        "unit/test_planner",
        "unit/test_slow_tier",
        *_ENGINE[1:4],
    ),
    "policy/read_history.py": ("unit/test_read_history", "unit/test_policy"),
    "engine": _ENGINE,
    "engine/fitting.py": ("unit/test_slow_tier", "unit/test_llm", "unit/test_engine", "smoke/test_budget"),
    "engine/direct_tier.py": ("unit/test_slices", "unit/test_direct", "unit/test_slow_tier"),
    "engine/observers.py": (*_ENGINE[:4], "smoke/test_cli", "smoke/test_ground_truth"),
    "engine/statistics.py": (*_ENGINE[:4], "unit/test_acceptance", "smoke/test_cli"),
    "engine/prefetch_distance.py": ("unit/test_prefetch",),
    "store": _STORE,
    "store/machine.py": ("unit/test_machine",),
    "store/direct.py": ("unit/test_direct", "unit/test_slow_tier"),
    "store/synthetic.py": ("unit/test_store", "smoke/test_budget", "smoke/test_cli"),
    "convert": _CONVERT,
    "convert/gguf_export.py": (*_GGUF, "smoke/test_cli"),
    "convert/gguf_file.py": _GGUF,
    "convert/gguf_import.py": _GGUF,
    "convert/gguf_tokenizer.py": (*_GGUF, "unit/test_tokenizer"),
    "convert/q8_0.py": _GGUF,
    "hw": _SIMULATION,
    "systems": _SIMULATION,
    "sim": _SIMULATION,
}
"""Files of tests by package, or by module where others than its package's find more, the most specific first."""


@dataclass(frozen=True)
class Mutant:
    """``module``: path below src/elmoe; ``line``, ``column``: of what is changed; ``old``, ``new``: its text. ``name``:
    unique, and the same after changes of other lines."""

    module: str
    line: int
    column: int
    end_line: int
    end_column: int
    old: str
    new: str
    name: str

    def applied(self, text: str) -> str:
        """The module's text with the change."""
        lines = text.encode().split(b"\n")  # columns are in bytes
        head = lines[self.line - 1][: self.column]
        tail = lines[self.end_line - 1][self.end_column :]
        lines[self.line - 1 : self.end_line] = [head + self.new.encode() + tail]
        return b"\n".join(lines).decode()


def mutants_of(module: str) -> Iterator[Mutant]:
    """All of a module."""
    text, names = (ROOT / "src" / "elmoe" / module).read_text(), Counter[str]()
    lines = text.split("\n")
    for node, new in changes(ast.parse(text)):
        old = ast.get_source_segment(text, node) or ""
        if old and old != new:
            where = (node.lineno, node.col_offset, node.end_lineno, node.end_col_offset)
            name = f"{module}: {lines[node.lineno - 1].strip()} : {old} -> {new}"
            names[name] += 1
            yield Mutant(module, *where, old, new, name if names[name] == 1 else f"{name} #{names[name]}")


def sample(count: int, seed: int, packages: Sequence[str] = PACKAGES) -> list[Mutant]:
    """Mutants of the packages, drawn without replacement, at most one of a line; a line that changes does not change the
    others."""
    found = []
    for package in packages:
        for path in sorted((ROOT / "src" / "elmoe" / package).glob("*.py")):
            found += list(mutants_of(f"{package}/{path.name}"))
    found.sort(key=lambda mutant: hashlib.blake2b(f"{seed} {mutant.name}".encode()).digest())
    by_line: dict[tuple[str, int], Mutant] = {}
    for mutant in found:
        by_line.setdefault((mutant.module, mutant.line), mutant)
    return list(by_line.values())[:count]


def listed(module: str) -> list[str]:
    """Files of tests of a module."""
    package = module.partition("/")[0]
    return [f"tests/{name}.py" for name in TESTS.get(module, TESTS[package])]


def chosen(mutant: Mutant, lines: Lines, budget: float) -> tuple[dict[str, float], int]:
    """({test: seconds that it takes}, number of tests left out): in the order in which they should run."""
    found: dict[str, float] = {}
    total, left_out, first = 0.0, 0, listed(mutant.module)
    for group in lines.groups(mutant.module, mutant.line, mutant.column):
        files: dict[str, list[str]] = {}
        for test in sorted(group - found.keys(), key=lambda test: (lines.seconds[test], test)):
            files.setdefault(test.partition("::")[0], []).append(test)
        for file in sorted(files, key=lambda file: (file not in first, sum(map(lines.seconds.__getitem__, files[file])))):
            for test in files[file]:
                if total + lines.seconds[test] > budget:
                    left_out += 1
                else:
                    total += lines.seconds[test]
                    found[test] = lines.seconds[test]
    return found, left_out


def judge(
    copy: Copy, mutant: Mutant, lines: Lines, budget: float, also: list[str], alone: bool = False
) -> dict[str, object]:
    """The mutant with its outcome: killed, late or survived, ``by`` the test that failed last, of so many ``tests``."""
    tests, left_out = chosen(mutant, lines, budget)
    tests = dict.fromkeys(also, ASSUMED) | tests
    line = asdict(mutant) | {"tests": len(tests), "left_out": left_out}
    if not tests:
        return line | {"outcome": "survived", "seconds": 0.0, "by": "no test runs the line"}
    outcome, seconds, by = copy.run(tests, mutant.module, mutant.line, mutant.applied, alone)
    return line | {"outcome": outcome, "seconds": round(seconds, 1), "by": by}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--seed", type=int, default=25)
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=PACKAGES, help="of which the sample is [all]")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these; run again to go on")
    parser.add_argument("--budget", type=float, default=BUDGET, help="most seconds that a mutant's tests take without it")
    parser.add_argument("--record", action="store_true", help="record anew which tests run which lines")
    parser.add_argument(
        "--again", action="store_true", help="try those that survived once more, each in a process of its own"
    )
    parser.add_argument("--also", nargs="*", default=[], help="files of tests that are newer than the recording, run first")
    parser.add_argument("--unchanged", action="store_true", help="run the tests without the changes: none may fail")
    parser.add_argument(
        "--results", type=Path, help="[results.jsonl in build/mutants, or in a folder of the packages there]"
    )
    arguments = parser.parse_args()
    whole = set(arguments.packages) == set(PACKAGES)
    work = WORK if whole else WORK / "-".join(arguments.packages)
    tests = [] if whole else sorted({file for package in arguments.packages for file in listed(package)})
    results, end = arguments.results or work / "results.jsonl", monotonic() + arguments.seconds
    work.mkdir(parents=True, exist_ok=True)
    done = {line["name"]: line for line in map(json.loads, results.read_text().splitlines())} if results.exists() else {}
    drawn = sample(arguments.count, arguments.seed, arguments.packages)
    reasons = json.loads(EQUIVALENT.read_text())
    missed = {name for name, line in done.items() if line["outcome"] == "survived" and name not in reasons}
    left = [one for one in drawn if (one.name in missed if arguments.again else one.name not in done)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies = [Copy(Path(folder) / str(job)) for job in range(arguments.jobs)]
        if arguments.record or not (work / "lines" / "lines.json").exists():
            copies[0].record(work / "lines", arguments.packages, tests)
        lines = Lines(work / "lines", ROOT / "src" / "elmoe")
        free = list(copies)

        def try_one(mutant: Mutant) -> None:
            if monotonic() > end:
                return
            copy = free.pop()
            one = replace(mutant, new=mutant.old) if arguments.unchanged else mutant
            line = judge(copy, one, lines, arguments.budget, arguments.also, arguments.again)
            free.append(copy)
            done[mutant.name] = line
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{line['outcome']} {line['seconds']} s {line['by']}: {mutant.name[:150]}", flush=True)

        list(pool.map(try_one, left))
        for copy in copies:
            copy.close()
    judged = [done[one.name] for one in drawn if one.name in done]
    survived = [line for line in judged if line["outcome"] == "survived"]
    for line in survived:
        print(f"{reasons.get(line['name'], 'A TEST IS MISSING')}: {line['name'][:150]}")
    print(f"{len(judged)} of {len(drawn)} mutants judged, {len(judged) - len(survived)} killed, {len(survived)} survived")
    print(f"{sum(line['name'] in reasons for line in survived)} of the survivors change nothing that a test should notice")
    return 0


if __name__ == "__main__":
    sys.exit(main())
