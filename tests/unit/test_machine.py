"""Available memory through control groups of both versions."""

from __future__ import annotations

import os
from pathlib import Path

from elmoe.processors import processors
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


def test_page_cache_that_the_kernel_gives_back_counts_as_free_in_version_two(tmp_path):
    stat = "anon 500000\nfile 7000000\ninactive_file 6000000\nactive_file 1000000\nslab_reclaimable 0\n"
    files = {"memory.max": "8000000\n", "memory.current": "7500000\n", "memory.stat": stat}
    assert available_memory(*machine(tmp_path, "0::/\n", files)) == 6_500_000


def test_page_cache_that_the_kernel_gives_back_counts_as_free_in_version_one(tmp_path):
    stat = "cache 7000000\ninactive_file 1\ntotal_inactive_file 6000000\n"
    files = {
        "memory/memory.limit_in_bytes": "8000000\n", "memory/memory.usage_in_bytes": "7500000\n", "memory/memory.stat": stat,
    }  # fmt: skip
    assert available_memory(*machine(tmp_path, "4:memory:/\n", files)) == 6_500_000


def test_anonymous_memory_stays_counted_and_a_cache_larger_than_the_use_does_not_exceed_the_limit(tmp_path):
    for name, stat, free in (("a", "anon 7500000\ninactive_file 0\n", 500_000), ("b", "inactive_file 9000000\n", 8_000_000)):
        files = {"memory.max": "8000000\n", "memory.current": "7500000\n", "memory.stat": stat}
        assert available_memory(*machine(tmp_path / name, "0::/\n", files)) == free


def test_processors_are_those_of_the_quota_and_never_more_than_the_affinity(tmp_path):
    mine = len(os.sched_getaffinity(0))
    cases = {
        "two": ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        "ancestor": ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "max 100000\n"}, 1),
        "part": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        "many": ("0::/\n", {"cpu.max": "99900000 100000\n"}, mine),
        "one": ("3:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "100000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 1),
        "unlimited": ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, mine),
        "nothing": ("0::/\n", {}, mine),
        "broken": ("rubbish\n", {"cpu.max": "rubbish\n"}, mine),
    }
    for name, (cgroup, files, count) in cases.items():
        assert processors(*machine(tmp_path / name, cgroup, files)) == count, name
