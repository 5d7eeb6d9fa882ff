"""Available memory through control groups of both versions."""

from __future__ import annotations

from pathlib import Path

from elmoe.store.machine import available_memory, parse_groups


def machine(tmp_path: Path, cgroup: str, files: dict[str, str]) -> tuple[Path, Path]:
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:    8000 kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "proc", tmp_path / "cgroup"


def test_without_limits(tmp_path):
    assert available_memory(*machine(tmp_path, "0::/\n", {})) == 8000 * 1024


def test_version_two_takes_the_tightest_ancestor(tmp_path):
    files = {
        "a/memory.max": "5000000\n", "a/memory.current": "1000000\n",
        "a/b/memory.max": "max\n", "a/b/memory.current": "500000\n",
    }  # fmt: skip
    assert available_memory(*machine(tmp_path, "0::/a/b\n", files)) == 4_000_000


def test_version_one(tmp_path):
    files = {
        "memory/x/memory.limit_in_bytes": "3000000\n", "memory/x/memory.usage_in_bytes": "2900000\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n", "memory/memory.usage_in_bytes": "5\n",
    }  # fmt: skip
    assert available_memory(*machine(tmp_path, "5:cpu:/y\n4:memory:/x\n", files)) == 100_000


def test_group_lines():
    assert parse_groups("12:cpu,cpuacct:/a\n9:memory:/b\n0::/c\n") == [("memory", "/b"), ("", "/c")]


def test_this_machine():
    assert available_memory() > 10 << 20
