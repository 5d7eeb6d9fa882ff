"""Which files this process has open: those of a test's own folder, because what other tests left may close at any time."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def open_below(folder: Path) -> list[str]:
    """Files below a folder that a descriptor of this process refers to, one for each."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return sorted(path for path in found if Path(path).is_relative_to(folder.resolve()))
