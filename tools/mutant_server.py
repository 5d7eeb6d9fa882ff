"""For pytest: all tests are collected once, then each mutant is a fork of this process that runs a few of them.

A change within a function takes effect by exchanging the code of the living function; what runs at import needs a process of
its own. Messages are JSON lines: ``{"module", "line", "tests": {name: seconds of processor time}}`` on the descriptor
``ELMOE_ASKED``; ``{"pid"}`` and ``{"code"}`` on ``ELMOE_ANSWERED``, or ``{"alone": true}`` where a process of its own is
needed. The text of the changed module is read from its file.
"""

from __future__ import annotations

import ast
import gc
import importlib
import json
import os
import signal
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import elmoe
from elmoe import kernels
from tools.mutant_plugin import limits_of
from tools.mutant_tests import made_at_import

SOURCE = Path(elmoe.__file__).parent


def outermost(text: str, line: int) -> tuple[str, int] | None:
    """(qualified name, index among those of the same name) of the function around a line that is in no other function."""
    found: list[tuple[str, ast.AST]] = []

    def walk(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((prefix + child.name, child))
            else:
                walk(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    walk(ast.parse(text), "")
    for index, (name, node) in enumerate(found):
        body: Any = node
        if body.body[0].lineno <= line <= body.end_lineno:
            return name, sum(one == name for one, _ in found[:index])
    return None


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Codes of the functions of a module's code that are in no other function."""
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            if one.co_flags & 1:  # optimised: a function; classes are not
                yield one
            else:
                yield from codes(one)


def code_of(text: str, path: str, name: str, index: int) -> types.CodeType:
    """The code of a function in a module's text."""
    return [one for one in codes(compile(text, path, "exec")) if one.co_qualname == name][index]


class Server:
    """Answers until nothing more is asked."""

    def __init__(self, asked: int, answered: int) -> None:
        self.asked, self.answered = os.fdopen(asked), os.fdopen(answered, "w")
        self.original: dict[str, str] = {}
        self.living: dict[tuple[str, str, int], list[types.FunctionType]] = {}
        self.failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for package in ("policy", "engine", "store", "convert", "hw", "systems", "sim"):
            for path in sorted((SOURCE / package).glob("*.py")):
                importlib.import_module(f"elmoe.{package}.{path.stem}" if path.stem != "__init__" else f"elmoe.{package}")
                self.original[f"{package}/{path.name}"] = path.read_text()
        self.items = {item.nodeid: item for item in session.items}
        for one in gc.get_objects():
            if isinstance(one, types.FunctionType):
                code = one.__code__
                self.living.setdefault((code.co_filename, code.co_qualname, code.co_firstlineno), []).append(one)
        gc.freeze()  # collections in a fork would copy all of the memory
        threads = kernels.threads()
        self.tell(ready=len(self.items))
        for line in self.asked:
            asked = json.loads(line)
            kernels.set_threads(1)  # a fork has this thread only
            process = os.fork()
            if not process:
                kernels.set_threads(threads)
                os._exit(self.run(session, **asked))
            self.tell(pid=process)
            status = os.waitpid(process, 0)[1]
            self.tell(code=os.waitstatus_to_exitcode(status))
        return True

    def tell(self, **what: object) -> None:
        """Answer."""
        self.answered.write(json.dumps(what) + "\n")
        self.answered.flush()

    def run(
        self, session: pytest.Session, module: str, line: int, tests: dict[str, float], failed: str, temporary: str
    ) -> int:
        """In the fork: 0 where all tests pass, 1 where one fails, 9 where a process of its own is needed."""
        if not self.exchange(module, line):
            return 9
        factory: Any = session.config._tmp_path_factory  # type: ignore[attr-defined]
        factory._basetemp, factory._given_basetemp = None, Path(temporary)
        limits = limits_of(tests, list(self.items))
        chosen = [self.items[name] for name in limits]
        if not chosen:
            return 5
        for item, after in zip(chosen, [*chosen[1:], None], strict=True):
            Path(failed).write_text(item.nodeid)  # where the process ends with it
            signal.setitimer(signal.ITIMER_PROF, limits[item.nodeid])  # its signal ends the process
            try:
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            except BaseException:  # a change that ends pytest is noticed too
                return 1
            signal.setitimer(signal.ITIMER_PROF, 0)
            if self.failed:
                return 1
        return 0

    def exchange(self, module: str, line: int) -> bool:
        """Whether the living functions could be given the code of the changed text."""
        path = SOURCE / module
        before, after = self.original[module], path.read_text()
        if before == after:
            return True
        place = outermost(before, line)
        if place is None or made_at_import(ast.parse(before), place[0]):
            return False
        try:
            old, new = (code_of(text, str(path), *place) for text in (before, after))
        except (SyntaxError, IndexError):
            return False
        living = self.living.get((str(path), old.co_qualname, old.co_firstlineno), [])
        try:
            for one in living:
                one.__code__ = new
        except ValueError:  # other free variables
            return False
        return bool(living)


def pytest_configure(config: Any) -> None:
    """Register the server."""
    config.pluginmanager.register(Server(int(os.environ["ELMOE_ASKED"]), int(os.environ["ELMOE_ANSWERED"])))


if __name__ == "__main__":
    sys.exit(pytest.main(sys.argv[1:]))
