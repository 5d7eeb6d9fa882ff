"""This process's memory: how much it may still use, seen through its control groups (version 1 and 2), how much it used, and
memory to read a disk into."""

from __future__ import annotations

import mmap
from contextlib import suppress
from pathlib import Path, PurePosixPath

UNLIMITED = 1 << 60
"""Limits above this mean none (version 1 writes a huge number)."""


def private_memory(size: int) -> mmap.mmap:
    """``size`` bytes, page-aligned, in huge pages where the system grants them: reads into those are faster."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has no huge pages
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def peak_memory() -> int:
    """Most memory this program ever had resident, bytes (mapped files included). Not ``ru_maxrss``: that survives ``exec``,
    so a small child of a large parent would report the parent."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmHWM line")


def parse_available(meminfo: str) -> int:
    """``MemAvailable`` of /proc/meminfo, bytes."""
    for line in meminfo.splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no MemAvailable line")


def parse_groups(cgroup: str) -> list[tuple[str, str]]:
    """(controller, path) of the memory groups in /proc/self/cgroup; controller ``""`` is version 2."""
    groups = []
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            groups.append(("" if controllers == "" else "memory", path))
    return groups


def reclaimable(stat: str, controller: str) -> int:
    """Bytes of a group's use that the kernel gives back at once, from its memory.stat: file pages not used lately."""
    name = "inactive_file" if controller == "" else "total_inactive_file"
    for line in stat.splitlines():
        key, _, value = line.partition(" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return 0


def group_headroom(root: Path, controller: str, path: str) -> int | None:
    """The least limit minus use of a group and its ancestors, bytes; None where nothing limits. Page cache that the kernel
    gives back is not counted as used."""
    if controller == "":
        base, limit_name, usage_name = root, "memory.max", "memory.current"
    else:
        base, limit_name, usage_name = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
    least = None
    for group in (PurePosixPath(path), *PurePosixPath(path).parents):
        folder = base / str(group).lstrip("/")
        try:
            limit = (folder / limit_name).read_text().strip()
            usage = int((folder / usage_name).read_text())
            if limit == "max" or int(limit) > UNLIMITED:
                continue
        except (OSError, ValueError):
            continue
        with suppress(OSError):
            usage = max(0, usage - reclaimable((folder / "memory.stat").read_text(), controller))
        headroom = max(0, int(limit) - usage)
        least = headroom if least is None else min(least, headroom)
    return least


def available_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes this process may still use: the machine's available memory or a control group's headroom, whichever is less."""
    available = parse_available((proc / "meminfo").read_text())
    try:
        memberships = parse_groups((proc / "self" / "cgroup").read_text())
    except (OSError, ValueError):
        memberships = []
    for controller, path in memberships:
        headroom = group_headroom(groups, controller, path)
        if headroom is not None:
            available = min(available, headroom)
    return available
