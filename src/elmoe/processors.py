"""How many processors this process may use: by affinity, and by the quota of its control groups (version 1 and 2)."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath


def processors(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """At least 1; the affinity mask's count or the quota in whole processors (rounded up), whichever is less."""
    count = len(os.sched_getaffinity(0))
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            quota = _quota(groups, *line.split(":", 2)[1:]) if line.count(":") >= 2 else None
            if quota is not None:
                count = min(count, max(1, math.ceil(quota)))
    return max(1, count)


def _quota(root: Path, controllers: str, path: str) -> float | None:
    """The least quota of a group and its ancestors, in processors; None where nothing limits."""
    if controllers and "cpu" not in controllers.split(","):
        return None
    least = None
    for group in (PurePosixPath(path), *PurePosixPath(path).parents):
        inside = str(group).lstrip("/")
        for base in (root, root / "cpu", root / "cpu,cpuacct") if controllers else (root,):
            with suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    quota = int((base / inside / "cpu.cfs_quota_us").read_text())
                    period = int((base / inside / "cpu.cfs_period_us").read_text())
                else:
                    first, second = (base / inside / "cpu.max").read_text().split()
                    quota, period = -1 if first == "max" else int(first), int(second)
                if quota > 0:
                    least = min(quota / period, math.inf if least is None else least)
    return least
