"""Promises about the source: sizes of files and functions, who imports what, and documented commands that exist."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILE_LIMIT, FUNCTION_LIMIT = 450, 80
"""Lines."""
SOURCES = sorted((ROOT / "src").rglob("*.py"))
PROGRAMS = sorted(path for folder in ("bench", "experiments") for path in (ROOT / folder).rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
COMMAND = re.compile(r"python -m ((?:bench|experiments|tools|tests)(?:\.\w+)+)")


def too_long(text: str, name: str) -> list[str]:
    """What of a Python file is above the limits: the file, or functions with their lines."""
    lines = text.count("\n")
    found = [f"{name}: {lines} lines"] if lines > FILE_LIMIT else []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LIMIT:
                found.append(f"{name}: {node.name} has {length} lines")
    return found


def test_no_file_and_no_function_is_too_long():
    found = [item for path in SOURCES for item in too_long(path.read_text(), str(path.relative_to(ROOT)))]
    assert SOURCES and not found


def test_the_limits_are_tight():
    function = "def f():\n" + "    x = 1\n" * (FUNCTION_LIMIT - 1)
    assert not too_long(function, "a") and too_long(function + "    x = 1\n", "a") == ["a: f has 81 lines"]
    assert not too_long("x = 1\n" * FILE_LIMIT, "a") and too_long("x = 1\n" * (FILE_LIMIT + 1), "a") == ["a: 451 lines"]


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", PROGRAMS + EXAMPLES, ids=lambda path: str(path.relative_to(ROOT)))
def test_benches_experiments_and_examples_import_the_library_only(path):
    wrong = [name for name in imported(path) if re.match(r"(elmoe\.cli|tests)(\.|$)", name)]
    assert not wrong and "sys.path" not in path.read_text()


def test_benches_and_experiments_can_be_imported_from_the_root():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PROGRAMS if path.stem != "__init__"]
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    run = subprocess.run([sys.executable, "-c", code, *modules], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_documented_commands_name_modules_that_exist():
    documents = [*ROOT.glob("*.md"), ROOT / "Makefile", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md"), *PROGRAMS]
    named = {name for path in documents for name in COMMAND.findall(path.read_text())}
    assert {"bench.offload", "experiments.fig01_speedup.run", "tests.lossless"} <= named
    missing = [name for name in named if not (ROOT / Path(*name.split("."))).with_suffix(".py").is_file()]
    assert not missing
