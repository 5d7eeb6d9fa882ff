"""The process that runs inputs, with limits of time and memory: ``python -m tests.fuzz.child TARGET FOLDER ...``.

The input it works on is in FOLDER/current, so that an input that ends the process is known. Faults are JSON lines in the
file ``--found``.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import re
import resource
import signal
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random
from time import monotonic

from tests.fuzz.mutation import mutated
from tests.fuzz.targets import SELFTEST, TARGETS, Target, is_expected, prepared

SECONDS = int(os.environ.get("ELMOE_FUZZ_SECONDS", "20"))
"""Most seconds of processor time of an input."""
WAITS = 6
"""Most seconds by the clock, times ``SECONDS``: of an input that only waits; a machine that others use is slow."""
GROWTH = 1 << 30
"""Most bytes that the process may grow by."""
ROOM = 3 << 30
"""Bytes of address space beyond those of the start: a wish for more fails, so that the machine is not filled."""


def limit() -> None:
    """Of address space, and no core files."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def peak(reset: bool = False) -> int:
    """Most bytes of memory so far; ``reset``: from now on. Not ``ru_maxrss``, which begins with that of the parent."""
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def place_of(error: BaseException) -> str:
    """What tells one fault from another: the kind, and the last function of the product; of errors on purpose the words."""
    frames = traceback.extract_tb(error.__traceback__)
    if is_expected(error):
        return re.sub(r"'[^']*'|[^a-z ]", "", str(error))[:70]
    mine = [frame for frame in frames if "/elmoe/" in frame.filename] or list(frames)
    return f"{type(error).__name__} at {Path(mine[-1].filename).name}:{mine[-1].name}"


def attempt(target: Target, folder: Path, raw: bytes) -> tuple[str, str]:
    """(fault, place): a fault is empty where the input was read, or refused as it should be."""
    (folder / "current").write_bytes(raw)
    before = peak(reset=True)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITS * SECONDS)
    faulthandler.dump_traceback_later(WAITS * SECONDS - 1)
    fault, place = "", "read"
    try:
        target.run(folder, raw)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust package is no Exception
        place = place_of(error)
        if not is_expected(error):
            fault = "".join(traceback.format_exception(error))[-3000:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
    grown = peak() - before
    if grown > GROWTH:
        fault, place = f"the process grew by {grown >> 20} MiB", "growth"
    return fault, place


def inputs(target: Target, seeds: list[bytes], replay: list[Path], seed: int) -> Iterator[bytes]:
    """Files to replay, or the seeds and changes of them without end."""
    if replay:
        yield from (corpus_bytes(path) for path in replay)
        return
    yield from seeds
    rng = Random(f"{target.name} {seed}")
    while True:
        yield mutated(rng, seeds, target.kind)


def corpus_bytes(path: Path) -> bytes:
    """An input of the corpus; large ones are compressed."""
    import zlib

    raw = path.read_bytes()
    return zlib.decompress(raw) if path.suffix == ".z" else raw


def note(path: Path, data: dict[str, object]) -> None:
    """Add a JSON line."""
    with path.open("a") as file:
        file.write(json.dumps(data) + "\n")


def main() -> None:
    """Run inputs until the time is up, and print the faults."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=sorted([*TARGETS, SELFTEST.name]))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", type=Path, nargs="*", default=[])
    parser.add_argument("--found", type=Path, required=True)
    parser.add_argument("--places", type=Path, help="Keep the shortest input of each place at which one was refused here.")
    arguments = parser.parse_args()
    end = monotonic() + arguments.seconds
    faulthandler.enable()
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    faulthandler.register(signal.SIGPROF, chain=True)
    warnings.simplefilter("ignore")
    target = (TARGETS | {SELFTEST.name: SELFTEST})[arguments.target]
    seeds = prepared(target, arguments.folder)
    target.run(arguments.folder, seeds[0])  # imports and pools are there before the limits
    limit()
    known: dict[str, int] = {}
    count = 0
    for raw in inputs(target, seeds, arguments.replay, arguments.seed):
        if monotonic() > end and count >= 5:
            break
        count += 1
        fault, place = attempt(target, arguments.folder, raw)
        name = f"{target.name}-{hashlib.blake2b(raw, digest_size=5).hexdigest()}"
        if fault and place not in known:
            known[place] = len(raw)
            note(arguments.found, {"target": target.name, "place": place, "name": name, "fault": fault})
            (arguments.folder.parent / name).write_bytes(raw)
        elif arguments.places and len(raw) < known.get(place, 1 << 14):
            known[place] = len(raw)
            arguments.places.mkdir(parents=True, exist_ok=True)
            (arguments.places / place.replace(" ", "_").replace("/", "_")[:80]).write_bytes(raw)
    note(arguments.found, {"target": target.name, "inputs": count})


if __name__ == "__main__":
    main()
