"""Fuzzing: ``python -m tests.fuzz.run --seconds 3600`` (`make fuzz`), over all targets or those named.

Exit 1 where one fails. Inputs that fail are kept in the folder ``--keep``, one file each; run one again with ``--replay FILE
--targets NAME``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from tests.fuzz.child import corpus_bytes
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).with_name("corpus")
SLICE = 120.0
"""Seconds of a process before a fresh one takes its place, so that slow growth is no fault of an input."""
HANG = 600.0
"""Most seconds by the clock that a process may go on after its time: it is ended, and that is a fault."""


@dataclass
class Outcome:
    """``inputs`` run, and ``faults`` by their place: the name of the input, and what is known."""

    inputs: int = 0
    faults: dict[str, str] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        """Join another's."""
        self.inputs += other.inputs
        self.faults |= other.faults


def run_child(
    target: str, folder: Path, keep: Path, seconds: float, seed: int, *more: str, wall: float | None = None
) -> Outcome:
    """One process; what ends it is a fault of the input it worked on."""
    command = [sys.executable, "-m", "tests.fuzz.child", target, str(folder), "--seconds", str(seconds), "--seed", str(seed)]
    folder.parent.mkdir(parents=True, exist_ok=True)
    said, found = folder.parent / f"{target}.err", folder.parent / f"{target}.found"
    found.write_bytes(b"")
    with said.open("wb") as errors:
        try:
            code = subprocess.run(
                [*command, "--found", str(found), *more], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, timeout=wall
            ).returncode
        except subprocess.TimeoutExpired:
            code = -9
    if code > 0:  # not by a signal: the harness itself is wrong
        raise RuntimeError(said.read_text(errors="replace")[-3000:])
    outcome = Outcome()
    for data in map(json.loads, found.read_text().splitlines()):
        if "fault" in data:
            outcome.faults[data["place"]] = f"{data['name']}\n{data['fault']}"
            _keep(folder.parent / data["name"], keep / data["name"])
        outcome.inputs += data.get("inputs", 0)
    if code:
        name = f"{target}-ended-{seed}"
        outcome.faults[f"the process ended with {code}, seed {seed}"] = f"{name}\n{said.read_text(errors='replace')[-3000:]}"
        if (folder / "current").exists():
            _keep(folder / "current", keep / name)
    return outcome


def _keep(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(source.read_bytes())


def fuzz(targets: list[str], seconds: float, keep: Path, seed: int = 0, jobs: int = 2) -> Outcome:
    """All targets for an equal share of ``seconds`` of ``jobs`` processes at a time."""
    total = Outcome()

    def one(target: str) -> Outcome:
        found, share = Outcome(), seconds * jobs / len(targets)
        end, turn = monotonic() + share, 0
        with tempfile.TemporaryDirectory() as folder:
            while (left := end - monotonic()) > 0 and len(found.faults) < 20:
                part = run_child(
                    target, Path(folder) / target, keep, min(left, SLICE), seed * 1000 + turn, wall=min(left, SLICE) + HANG
                )
                found.add(part)
                turn += 1
        return found

    with ThreadPoolExecutor(jobs) as pool:
        for target, found in zip(targets, pool.map(one, targets), strict=True):
            print(f"{target}: {found.inputs} inputs, {len(found.faults)} faults", flush=True)
            for place, fault in found.faults.items():
                print(f"  {target}, {place}: {fault}", flush=True)
            total.add(Outcome(found.inputs, {f"{target}, {place}": fault for place, fault in found.faults.items()}))
    return total


def replay(target: str, paths: list[Path], keep: Path) -> Outcome:
    """Run files once."""
    with tempfile.TemporaryDirectory() as folder:
        return run_child(target, Path(folder) / target, keep, 1e9, 0, "--replay", *map(str, paths))


def minimised(target: str, path: Path, place: str, folder: Path, tries: int = 4000) -> bytes:
    """A shorter input with the fault at the same place, in this process: cut by halves, quarters and so on."""
    from tests.fuzz.child import attempt
    from tests.fuzz.targets import prepared

    prepared(TARGETS[target], folder)
    raw = corpus_bytes(path)
    size = max(1, len(raw) // 2)
    while size and tries > 0:
        at, shorter = 0, False
        while at < len(raw) and tries > 0:
            tries -= 1
            candidate = raw[:at] + raw[at + size :]
            if attempt(TARGETS[target], folder, candidate)[1] == place:
                raw, shorter = candidate, True
            else:
                at += size
        size = size if shorter else size // 2
    return raw


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--targets", nargs="*", default=sorted(TARGETS), choices=sorted(TARGETS))
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--replay", type=Path, nargs="*", default=[])
    arguments = parser.parse_args()
    if arguments.replay:
        outcome = replay(arguments.targets[0], arguments.replay, arguments.keep)
        for fault in outcome.faults.values():
            print(fault)
    else:
        outcome = fuzz(arguments.targets, arguments.seconds, arguments.keep, arguments.seed, arguments.jobs)
    print(f"{outcome.inputs} inputs, {len(outcome.faults)} faults; inputs that failed are in {arguments.keep}")
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
