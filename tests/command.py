"""``elmoe`` in this process: its exit code, standard output and standard error, without the start of an interpreter."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from elmoe.cli.main import main


@dataclass(frozen=True)
class Ran:
    """As ``subprocess.CompletedProcess`` has it, in bytes."""

    returncode: int
    stdout: bytes
    stderr: bytes


def run(*words: str | bytes | Path, cwd: Path | None = None, stdin: bytes = b"", **environment: str) -> Ran:
    """Run a command line. What is not an error of the product's own is raised, not shown as a traceback.

    ``environment``: changes. Those that Python or the kernels read when they start have no effect: use a process."""
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding, "strict", write_through=True) for _ in range(2))
    with (
        patch.multiple(sys, argv=["elmoe", *map(os.fsdecode, words)], stdout=out, stderr=err),
        patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8")),
        patch.dict(os.environ, environment),
        _folder(cwd),
    ):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return Ran(code, out.buffer.getvalue(), err.buffer.getvalue())  # type: ignore[attr-defined]


@contextmanager
def _folder(path: Path | None) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(path or before)
    try:
        yield
    finally:
        os.chdir(before)
