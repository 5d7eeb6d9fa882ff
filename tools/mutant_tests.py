"""Which tests run a line: coverage.py with a context for each test, recorded once by the quick tests in ``build/mutants``.

A line that only a shared fixture runs counts for all tests that use the fixture. Lines that run at import are counted for
the tests that run lines with the name that is assigned, or the function whose default it is, then for all tests of the
module.
"""

from __future__ import annotations

import ast
import json
import re
from collections import defaultdict
from functools import cached_property
from pathlib import Path

FOLDERS = ("unit", "physics", "kernels", "golden", "smoke", "contracts")
"""Of ``tests``."""
SETTINGS = """[run]
parallel = true
data_file = {folder}/lines
context = ${{ELMOE_TEST-import}}
concurrency = thread, multiprocessing
include = {packages}
disable_warnings = no-data-collected, module-not-measured, module-not-imported, already-imported
"""
START = """import os
if os.environ.get("COVERAGE_PROCESS_START"):
    import coverage
    coverage.process_startup()
"""
"""The module ``sitecustomize``: Python runs it at the start of every process."""


def statements(tree: ast.AST, inside: str = "") -> list[tuple[ast.stmt, str]]:
    """(statement, name of the function around it or ""), the outer first."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.stmt):
            found.append((node, inside))
        named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        found += statements(node, node.name if named else inside)
    return found


def head(statement: ast.stmt) -> range:
    """Lines of a statement without the statements in it."""
    inner = [node.lineno for node in ast.walk(statement) if isinstance(node, ast.stmt) and node is not statement]
    first = min([statement.lineno, *(one.lineno for one in getattr(statement, "decorator_list", []))])
    end = statement.end_lineno or statement.lineno
    return range(first, max(first + 1, min([end + 1, *inner])))


def around(tree: ast.Module, line: int, column: int) -> tuple[ast.stmt, str]:
    """The innermost statement at a place, and the function in whose body it is ("" where it runs at import)."""
    found = [
        (one, inside)
        for one, inside in statements(tree)
        if (one.lineno, one.col_offset) <= (line, column) < (one.end_lineno, one.end_col_offset)
    ]
    return found[-1]


def made_at_import(tree: ast.Module, function: str) -> list[str]:
    """Names to which a module assigns what the function returns: it runs at import."""
    return [
        target.id
        for statement in tree.body
        if isinstance(statement, ast.Assign)
        and any(isinstance(one, ast.Call) and ast.unparse(one.func) == function for one in ast.walk(statement.value))
        for target in statement.targets
        if isinstance(target, ast.Name)
    ]


class Lines:
    """Tests by line, and how long each takes."""

    def __init__(self, folder: Path, source: Path) -> None:
        """``folder``: of `record`; ``source``: the package's folder."""
        self.folder, self.source = folder, source
        data = json.loads((folder / "lines.json").read_text())
        self.seconds: dict[str, float] = data["seconds"]
        self._names: list[str] = data["names"]
        self._lines: dict[str, dict[str, list[int]]] = data["lines"]

    def of_lines(self, module: str, lines: range) -> set[str]:
        """Tests that run one of the lines."""
        known = self._lines.get(module, {})
        return {self._names[at] for line in lines for at in known.get(str(line), ())}

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        return {module: (self.source / module).read_text().split("\n") for module in self._lines}

    def of_name(self, name: str) -> set[str]:
        """Tests that run a line with the name, in any module that is measured."""
        word, found = re.compile(rf"\b{re.escape(name)}\b"), set()
        for module, lines in self._texts.items():
            for number in self._lines[module]:
                if word.search(lines[int(number) - 1]):
                    found |= self.of_lines(module, range(int(number), int(number) + 1))
        return found

    def of_module(self, module: str) -> set[str]:
        """Tests that run any function of the module."""
        numbers = [int(number) for number in self._lines.get(module, {})]
        return self.of_lines(module, range(min(numbers, default=0), max(numbers, default=0) + 1))

    def groups(self, module: str, line: int, column: int) -> list[set[str]]:
        """Sets of tests that may notice a change at a place, the likeliest first; none where no test runs it."""
        tree = ast.parse((self.source / module).read_text())
        statement, inside = around(tree, line, column)
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) and not inside:  # the default of a parameter
            body = range(statement.body[0].lineno, (statement.end_lineno or 0) + 1)
            return [self.of_lines(module, body), self.of_module(module)]
        made = made_at_import(tree, inside)
        if inside and not made:
            found = self.of_lines(module, head(statement))
            return [found] if found else []
        if made:
            return [set().union(*map(self.of_name, made)), self.of_module(module)]
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        names = [node.id for target in targets if target for node in ast.walk(target) if isinstance(node, ast.Name)]
        return [set().union(*map(self.of_name, names)), self.of_module(module)]


def digest(folder: Path, packages: Path) -> None:
    """Read what the processes of a recording wrote into ``folder``, and write ``lines.json`` there."""
    import coverage

    tests = [json.loads(line) for path in folder.glob("tests-*.jsonl") for line in path.read_text().splitlines()]
    seconds = {one["test"]: one["seconds"] for one in tests if one["passed"]}
    using = defaultdict(set)
    for one in tests:
        for fixture in one["fixtures"] if one["passed"] else ():
            using[fixture].add(one["test"])
    names = sorted(seconds)
    number = {name: at for at, name in enumerate(names)}
    found: dict[str, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(folder.glob("lines.*")):
        if path.suffix == ".json":
            continue
        data = coverage.CoverageData(str(path))
        data.read()
        for file in data.measured_files():
            module = file.rpartition("/src/elmoe/")[2]
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    name = context.removeprefix("import|")
                    found[module][line] |= {number[test] for test in using.get(name, {name}) if test in number}
    lines = {
        module: {line: sorted(by) for line, by in sorted(known.items()) if by} for module, known in sorted(found.items())
    }
    (folder / "lines.json").write_text(json.dumps({"seconds": seconds, "names": names, "lines": lines}))
    failed = sorted(one["test"] for one in tests if not one["passed"])
    print(f"{len(seconds)} tests, {sum(seconds.values()):.0f} s; not counted, because they fail here: {failed}", flush=True)
