"""Do the tests bite? A sample of small changes of the source, each of which some test must notice: ``make mutants``.

Each mutant is one change of one expression of a module. A copy of the package with it runs the tests of that module
(``TESTS``), up to the first that fails. A mutant is killed where a test fails, the tests do not end in time, or the import
fails. Results are JSON lines in ``build/mutants/results.jsonl``; those there are kept, so that a run can be done in pieces.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic

from tools.mutations import changes

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("policy", "engine", "store", "convert", "hw", "systems", "sim")
WORK = ROOT / "build" / "mutants"
SECONDS = 240
"""Most seconds of a mutant's tests, unless ``--limit`` says more for a busy machine."""
_ENGINE = ("unit/test_step", "unit/test_engine", "unit/test_llm", "unit/test_direct", "kernels/test_forward")
_STORE = ("unit/test_store", "unit/test_writer", "unit/test_convert", "unit/test_slow_tier")
_CONVERT = ("unit/test_convert", "unit/test_import", "unit/test_gguf")
_SIMULATION = (
    "golden/test_simulated", "physics/test_physics", "unit/test_workload", "unit/test_own_hardware", "unit/test_report",
    "smoke/test_simulate", "smoke/test_ground_truth", "physics/test_efficiency",
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
    "convert/gguf_export.py": ("unit/test_gguf", "smoke/test_cli"),
    "convert/gguf_file.py": ("unit/test_gguf",),
    "convert/gguf_import.py": ("unit/test_gguf",),
    "convert/gguf_tokenizer.py": ("unit/test_gguf", "unit/test_tokenizer"),
    "convert/q8_0.py": ("unit/test_gguf",),
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


def sample(count: int, seed: int) -> list[Mutant]:
    """Mutants of all packages, drawn without replacement, at most one of a line; a line that changes does not change the
    others."""
    found = []
    for package in PACKAGES:
        for path in sorted((ROOT / "src" / "elmoe" / package).glob("*.py")):
            found += list(mutants_of(f"{package}/{path.name}"))
    found.sort(key=lambda mutant: hashlib.blake2b(f"{seed} {mutant.name}".encode()).digest())
    by_line: dict[tuple[str, int], Mutant] = {}
    for mutant in found:
        by_line.setdefault((mutant.module, mutant.line), mutant)
    return list(by_line.values())[:count]


def chosen(module: str) -> list[str]:
    """Files of tests for a module, the most specific first."""
    package = module.partition("/")[0]
    return [f"tests/{name}.py" for name in TESTS.get(module, TESTS[package])]


class Copy:
    """A copy of the package and the tests, in which one mutant at a time lives."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.package = folder, folder / "src" / "elmoe"
        skipped = shutil.ignore_patterns("__pycache__", ".venv", "build", ".git", ".hypothesis")
        shutil.copytree(ROOT, folder, ignore=skipped, dirs_exist_ok=True)
        import elmoe._native as native  # noqa: TID251 - where the built module lies

        shutil.copy(native.__file__, self.package)
        # In place of the finder of the editable installation, which would find the original.
        (folder / "src" / "_editable_skbc_elmoe.py").write_text("")

    def run(self, tests: list[str], limit: float) -> tuple[str, float]:
        """(outcome, seconds): survived, killed or late."""
        paths = f"{self.folder / 'src'}{os.pathsep}{self.folder}"
        environment = os.environ | {
            "PYTHONPATH": paths,
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        began = monotonic()
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            outcome = "survived" if code == 0 else "killed" if code in (1, 2, 3, 4) or code < 0 else f"code {code}"
        except subprocess.TimeoutExpired:
            outcome = "late"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        return outcome, monotonic() - began

    def judge(self, mutant: Mutant, tests: list[str], limit: float) -> dict[str, object]:
        """Run the tests with the mutant in place, for at most ``limit`` seconds."""
        path = self.package / mutant.module
        original = path.read_text()
        path.write_text(mutant.applied(original))
        try:
            outcome, seconds = self.run(tests, limit)
        finally:
            path.write_text(original)
        return asdict(mutant) | {"outcome": outcome, "seconds": round(seconds, 1), "tests": tests}


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--seed", type=int, default=25)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after these; run again to go on")
    parser.add_argument("--limit", type=float, default=SECONDS, help="most seconds of a mutant's tests")
    parser.add_argument("--again", action="store_true", help="try those that survived once more")
    arguments = parser.parse_args()
    results, end = WORK / "results.jsonl", monotonic() + arguments.seconds
    WORK.mkdir(parents=True, exist_ok=True)
    done = {line["name"]: line for line in map(json.loads, results.read_text().splitlines())} if results.exists() else {}
    drawn = sample(arguments.count, arguments.seed)
    left = [one for one in drawn if one.name not in done or (arguments.again and done[one.name]["outcome"] == "survived")]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        copies = [Copy(Path(folder) / str(job)) for job in range(arguments.jobs)]

        def work(job: int) -> None:
            for mutant in left[job :: arguments.jobs]:
                if monotonic() > end:
                    return
                line = copies[job].judge(mutant, chosen(mutant.module), arguments.limit)
                done[mutant.name] = line
                with results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{line['outcome']}: {mutant.name[:150]}", flush=True)

        list(pool.map(work, range(arguments.jobs)))
    judged = [done[one.name] for one in drawn if one.name in done]
    survived = [line for line in judged if line["outcome"] == "survived"]
    print(f"{len(judged)} of {len(drawn)} mutants judged, {len(judged) - len(survived)} killed, {len(survived)} survived")
    return 0


if __name__ == "__main__":
    sys.exit(main())
