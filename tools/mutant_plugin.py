"""For pytest, in the processes that `tools.mutants` starts: which lines a test runs, or the tests that one mutant needs.

``ELMOE_RECORD``, a folder: contexts of coverage.py are named after tests, those of fixtures that several tests share after
the fixture; JSON lines say how long each test took and what it used. ``ELMOE_CHOSEN``, a file: only its tests are run, in
its order, each within its seconds of processor time; the last that began is written into ``ELMOE_FAILED``.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RECORD, CHOSEN, FAILED = (os.environ.get(f"ELMOE_{name}", "") for name in ("RECORD", "CHOSEN", "FAILED"))
CONTEXT = "ELMOE_TEST"
"""The environment variable that names the test to the processes that it starts."""


def shared_name(fixture: Any) -> str:
    """The context of a fixture that several tests share."""
    return f"fixture {fixture.baseid}::{fixture.argname}"


def _used(item: Any) -> list[str]:
    """Shared fixtures of a test."""
    found = [one[-1] for one in item._fixtureinfo.name2fixturedefs.values()]
    return [shared_name(one) for one in found if one.scope != "function"]


def limits_of(chosen: dict[str, float], known: list[str]) -> dict[str, float]:
    """Seconds of tests that are named, or whose file or function is; those that are not known are left out."""
    found: dict[str, float] = {}
    for name, seconds in chosen.items():
        tests = [test for test in known if test == name or test.startswith((f"{name}::", f"{name}["))]
        found |= {test: seconds for test in tests if test not in found}
    return found


class Record:
    """Names contexts, and notes the tests."""

    def __init__(self) -> None:
        import coverage

        self.coverage, self.now = coverage.Coverage.current(), ""

    def switch(self, name: str) -> None:
        """From here on, lines are run for ``name``."""
        self.now = os.environ[CONTEXT] = name
        if self.coverage is not None:
            self.coverage.switch_context(name)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        self.switch(item.nodeid)
        self.failed, before = False, sum(os.times()[:4])
        result = yield
        seconds = sum(os.times()[:4]) - before
        self.switch("between tests")
        line = {"test": item.nodeid, "seconds": round(seconds, 3), "fixtures": _used(item), "passed": not self.failed}
        with Path(RECORD, f"tests-{os.getpid()}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before = self.now
        if fixturedef.scope != "function":
            self.switch(shared_name(fixturedef))
        try:
            return (yield)
        finally:
            if self.now != before:
                self.switch(before)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed


class Chosen:
    """Runs the tests of a mutant."""

    def __init__(self) -> None:
        self.limits: dict[str, float] = json.loads(Path(CHOSEN).read_text())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        found = {item.nodeid: item for item in items}
        self.limits = limits_of(self.limits, list(found))
        items[:] = [found[name] for name in self.limits]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        Path(FAILED).write_text(item.nodeid)  # where the process ends with it
        signal.setitimer(signal.ITIMER_PROF, self.limits[item.nodeid])  # its signal ends the process
        result = yield
        signal.setitimer(signal.ITIMER_PROF, 0)
        return result


def pytest_configure(config: Any) -> None:
    """Register what the environment asks for."""
    if RECORD and os.environ.get("PYTEST_XDIST_WORKER"):
        config.pluginmanager.register(Record())
    if CHOSEN:
        config.pluginmanager.register(Chosen())
