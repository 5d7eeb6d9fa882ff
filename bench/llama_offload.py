"""llama.cpp's own bench program and other peers on the model's file, in a child memory cgroup as large as our budget.

They route for themselves. Weights are random, and so would be the routing: the rows of routers are scaled so that half of
the experts take the same share of the routing as in the recorded traces (``SKEW``); consecutive tokens stay uncorrelated.
The prompt is 4 tokens, and few are decoded per sequence: under a limit each takes seconds.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

SKEW = 0.65
"""Of the routers (see ``quantisations.SkewedRouters``): the upper half of the experts takes 77 % of the routing."""
TOKENS, TIMEOUT = 4, 900
"""Tokens decoded per sequence with 16 layers (with fewer, more), and seconds that a run may take."""
LLAMA = "-m {model} -t 2 -c {context} -npp 4 -ntg {tokens} -npl {batch} --no-repack --output-format jsonl"
RATE = re.compile(r'"speed_tg": *([\d.]+)|([\d.]+) *(?:tokens/s|tok/s|t/s|tokens per second)')
UNKNOWN = (
    "acceptance_rate", "tokens_per_verification", "msb_hit_rate", "lsb_hit_rate", "slices", "waited_share",
    "byte_ceiling_tokens_per_second", "resident_tokens_per_second", "over_lru",
)  # fmt: skip


def add_rows(
    rows: list[dict[str, Any]], model: Path, layers: int, budgets: list[int | float], batches: list[int], programs: Path,
    bandwidth: float | None = None, others: Sequence[str] = (),
) -> dict[str, str]:  # fmt: skip
    """Measure llama.cpp and other peers on a GGUF file at each budget, add their rows and elastic's ratios to them; returns
    what was done by peer, or why not.

    :param bandwidth: throttle of their reads, bytes per second. :param others: ``NAME=COMMAND``, see ``--peer``.
    """
    tokens = TOKENS * max(1, 16 // layers)
    program = programs / "llama-batched-bench"
    peers = {"llama.cpp": f"{program} {LLAMA}"} | dict(one.split("=", 1) for one in others)
    where = "in a child memory cgroup" + (", reads throttled in a block I/O cgroup" if bandwidth else "")
    done = dict.fromkeys(peers, where)
    if not program.exists():
        done["llama.cpp"] = "not built: run `make peers`"
        del peers["llama.cpp"]
    for (name, command), budget, batch in product(peers.items(), budgets, batches):
        if batch > 1 and "{batch}" not in command:
            continue
        values = {
            "model": model,
            "tokens": tokens,
            "batch": batch,
            "budget": int(budget),
            "context": max(256, batch * (tokens + 8)),
        }
        parts = [part.format(**values) for part in shlex.split(command)]
        try:
            rate = run(parts, model, int(budget), bandwidth)
        except (OSError, subprocess.SubprocessError) as error:
            done[name] = f"failed at batch {batch} under a limit of {budget} bytes: {error}"
            continue
        print(f"{name}, {budget / 2**30:.3g} GiB, batch {batch}: {rate:.2f} tokens/s", file=sys.stderr)
        cell = [row for row in rows if (row["batch"], row["budget"]) == (batch, budget)]
        for row in cell:
            if row["system"] == "elastic":
                row["over"][name] = row["tokens_per_second"] / rate
                row |= {"over_llamacpp": row["over"][name]} if name == "llama.cpp" else {}
        naive = next(row["tokens_per_second"] for row in cell if row["system"] == "naive")
        rows.append({"system": name, "batch": batch, "budget": budget, "tokens_per_second": rate, "identical": None,
                     "over_naive": rate / naive} | dict.fromkeys(UNKNOWN))  # fmt: skip
    return done


def run(command: list[str], model: Path, limit: int, bandwidth: float | None) -> float:
    """Decoded tokens per second of a peer's program under a memory limit of ``limit`` bytes, reading ``bandwidth`` bytes per
    second at most, the model's file not in the page cache. OSError where it printed no rate."""
    evict(model)
    with limits(limit, model, bandwidth) as enter:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, preexec_fn=enter)
    found = RATE.findall(done.stdout) or RATE.findall(done.stderr)
    if done.returncode or not found:
        raise OSError(f"no rate (exit code {done.returncode})")
    return float("".join(found[-1]))


@contextmanager
def limits(memory: int, model: Path, bandwidth: float | None) -> Iterator[Callable[[], None]]:
    """Child cgroups (version 1 or 2) that limit memory to so many bytes and, unless ``bandwidth`` is None, the reads of the
    model's disk to so many bytes per second; yields a function by which a new process enters them."""
    own = {fields[1]: fields[2] for fields in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().split())}
    old = "memory" in own
    # Controller of version 1 or nothing, file, value
    settings = [("memory", "memory.limit_in_bytes", str(memory)) if old else ("", "memory.max", str(memory))]
    if bandwidth is not None:
        device, rate = os.stat(model).st_dev, int(bandwidth)
        disk = f"{os.major(device)}:{os.minor(device)}"
        settings.append(
            ("blkio", "blkio.throttle.read_bps_device", f"{disk} {rate}") if old else ("", "io.max", f"{disk} rbps={rate}")
        )
    groups = {
        controller: Path("/sys/fs/cgroup", controller, own.get(controller, "/").lstrip("/"), f"elmoe_bench_{os.getpid()}")
        for controller, _, _ in settings
    }
    made: list[Path] = []
    try:
        for group in groups.values():
            group.mkdir()
            made.append(group)
        for controller, name, value in settings:
            (groups[controller] / name).write_text(value)
        entrances = [str(group / "cgroup.procs") for group in made]

        def enter() -> None:
            for entrance in entrances:
                with open(entrance, "w") as file:
                    file.write("0")

        yield enter
    finally:
        for group in made:
            if (group / "memory.force_empty").exists():
                (group / "memory.force_empty").write_text("0")
            group.rmdir()


def evict(path: Path) -> None:
    """Drop a file's pages: they stay charged to whoever read it before, and as small as they were read or written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # what is not on disk yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
