"""A copy of the package and the tests, in which one mutant at a time lives; its processes are timed in processor time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from select import select
from time import monotonic, sleep

from tools.mutant_tests import FOLDERS, SETTINGS, START, digest

ROOT = Path(__file__).resolve().parents[1]
ALONE = 9
"""The exit code of a fork that cannot take the change: it needs a process of its own."""
LOOK = 0.25
"""Seconds between two looks at a process."""
STILL = 240
"""Looks at a process that uses no processor time before it counts as one that waits for ever."""
GAP = 5.0
"""Seconds between two looks after which this process must have been stopped: tests that wait by the clock may then fail."""
TIMES, MORE = 4.0, 20.0
"""A test is late after so many times its seconds, and so many more."""


def late_after(seconds: float) -> float:
    """Seconds of processor time after which a test that takes ``seconds`` is late."""
    return TIMES * seconds + MORE


def family(process: int) -> list[int]:
    """A process and those that it has started, and they."""
    found = [process]
    for one in found:
        for task in Path(f"/proc/{one}/task").glob("*"):
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def used(process: int) -> float:
    """Seconds of processor time of a process and its family, also of those that have ended."""
    ticks = 0
    for one in family(process):
        with suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def end(processes: Iterable[int]) -> None:
    """Kill those that still are."""
    for one in processes:
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def watched(process: int, code: Callable[[], int | None], most: float) -> tuple[str, float, bool]:
    """(outcome, seconds of processor time, whether this process was stopped meanwhile) of a process that may take ``most``
    seconds; ``code`` gives its exit code once it has ended."""
    seconds, still, stopped, looked, late = 0.0, 0, False, monotonic(), False
    seen: set[int] = set()
    while (ended := code()) is None:
        sleep(LOOK)
        stopped |= monotonic() - looked > GAP
        looked, before, seconds = monotonic(), seconds, max(seconds, used(process))
        still = still + 1 if seconds <= before else 0
        seen.update(family(process))
        if not late and (seconds > most or still > STILL):
            late = True
            end(family(process))
    end(seen - {process})  # what it has left
    if late or ended == -signal.SIGPROF:
        return "late", seconds, stopped
    if ended == 5:
        raise RuntimeError("pytest found none of the tests")
    return {0: "survived", ALONE: "alone"}.get(ended, "killed"), seconds, stopped


class Copy:
    """A folder with the package, the tests and the built module."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.package = folder, folder / "src" / "elmoe"
        skipped = shutil.ignore_patterns("__pycache__", ".venv", "build", ".git", ".hypothesis")
        shutil.copytree(ROOT, folder, ignore=skipped, dirs_exist_ok=True)
        import elmoe._native as native  # noqa: TID251 - where the built module lies

        shutil.copy(native.__file__, self.package)
        # In place of the finder of the editable installation, which would find the original.
        (folder / "src" / "_editable_skbc_elmoe.py").write_text("")
        self.environment = os.environ | {
            "PYTHONPATH": f"{folder / 'src'}{os.pathsep}{folder}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": "/tmp",
        }
        self.command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        self._server: subprocess.Popen[bytes] | None = None

    def record(self, results: Path, packages: Sequence[str], tests: Sequence[str] = ()) -> None:
        """Run the quick tests once, or only these files of them, and write which lines of the packages each runs."""
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir(parents=True)
        measured = "".join(f"\n    {self.package / package}/*" for package in packages)
        settings = self.folder / "coverage.cfg"
        settings.write_text(SETTINGS.format(folder=results, packages=measured))
        (self.folder / "src" / "sitecustomize.py").write_text(START)
        environment = self.environment | {"COVERAGE_PROCESS_START": str(settings), "ELMOE_RECORD": str(results)}
        tests = tests or [f"tests/{name}" for name in FOLDERS]
        subprocess.run(
            [*self.command, "-p", "tools.mutant_plugin", "-n", "2", "--dist", "loadfile", *tests],
            cwd=self.folder,
            env=environment,
        )
        (self.folder / "src" / "sitecustomize.py").unlink()
        digest(results, self.package)

    def run(
        self, tests: dict[str, float], module: str, line: int, change: Callable[[str], str], alone: bool = False
    ) -> tuple[str, float, str]:
        """(outcome, seconds of processor time, last test) of tests, whose seconds are known, with a module changed.
        ``alone``: in a process of its own, in which the change takes effect at import too."""
        path = self.package / module
        original = path.read_text()
        path.write_text(change(original))
        try:
            outcome, seconds, stopped = ("alone", 0.0, False) if alone else self._forked(tests, module, line)
            if outcome == "alone":
                outcome, seconds, stopped = self._alone(tests)
            if stopped and outcome != "survived":
                outcome, seconds, _ = self._alone(tests)
        finally:
            path.write_text(original)
        failed = self.folder / "failed"
        return outcome, seconds, failed.read_text() if failed.exists() and outcome != "survived" else ""

    def _forked(self, tests: dict[str, float], module: str, line: int) -> tuple[str, float, bool]:
        """(outcome, seconds, whether this process was stopped meanwhile), in a fork of the server."""
        self._server = self._server or self._started()
        (self.folder / "failed").unlink(missing_ok=True)
        limits = {test: late_after(seconds) for test, seconds in tests.items()}
        asked = {"module": module, "line": line, "tests": limits, "failed": str(self.folder / "failed")}
        self._asked.write(json.dumps(asked | {"temporary": str(self.folder / "temporary")}) + "\n")
        self._asked.flush()
        process = json.loads(self._answered.readline())["pid"]

        def code() -> int | None:
            return json.loads(self._answered.readline())["code"] if select([self._answered], [], [], 0)[0] else None

        return watched(process, code, late_after(sum(tests.values())))

    def _started(self) -> subprocess.Popen[bytes]:
        """The process of which mutants are forks."""
        asked, answered = os.pipe(), os.pipe()
        environment = self.environment | {"ELMOE_ASKED": str(asked[0]), "ELMOE_ANSWERED": str(answered[1])}
        options = ("-p", "tools.mutant_server", "-p", "no:xdist", "-p", "no:anyio", *(f"tests/{name}" for name in FOLDERS))
        process = subprocess.Popen(
            [*self.command, *options], cwd=self.folder, env=environment, pass_fds=(asked[0], answered[1]),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(asked[0])
        os.close(answered[1])
        self._asked, self._answered = os.fdopen(asked[1], "w"), os.fdopen(answered[0], "rb", 0)
        json.loads(self._answered.readline())
        return process

    def _alone(self, tests: dict[str, float]) -> tuple[str, float, bool]:
        """As `_forked`, in a process of its own."""
        chosen, failed = self.folder / "chosen.json", self.folder / "failed"
        failed.unlink(missing_ok=True)
        chosen.write_text(json.dumps({test: late_after(seconds) for test, seconds in tests.items()}))
        files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        command = [*self.command, "-x", "-p", "tools.mutant_plugin", "-p", "no:xdist", "-p", "no:anyio", *files]
        environment = self.environment | {"ELMOE_CHOSEN": str(chosen), "ELMOE_FAILED": str(failed)}
        process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return watched(process.pid, process.poll, late_after(sum(tests.values())))

    def close(self) -> None:
        """End the server."""
        if self._server is not None:
            self._asked.close()
            self._server.wait()
