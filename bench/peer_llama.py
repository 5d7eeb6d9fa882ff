"""llama.cpp's bench programs on a GGUF: one process per figure, so that runs can alternate with ours."""

from __future__ import annotations

import json
import subprocess
import threading
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep

TIMEOUT = 300
"""Seconds after which a run counts as failed."""
ATTEMPTS = 5
"""llama-batched-bench sometimes ends well and prints nothing."""
Variants = dict[str, tuple[list[str], list[str]]]
"""Options of ``llama-bench`` and of ``llama-batched-bench`` by name."""
REPACK: Variants = {"repacked": (["--repack", "1"], []), "not repacked": (["--repack", "0"], ["--no-repack"])}
"""Weights copied into the layout of the processor's matrix units, or used as they lie in the file."""
IK: Variants = {"ik, repacked": (["-rtr", "1"], ["-rtr"]), "ik": ([], [])}
"""The same of ik_llama.cpp. Its batched bench feeds one token to all sequences, so only batch 1 is compared."""


class PeerError(Exception):
    """A peer's program is missing, crashed, or took too long."""


@dataclass(frozen=True)
class Child:
    """A finished process: what it wrote, wall-clock seconds, and its peak resident memory, bytes."""

    stdout: str
    seconds: float
    peak: int


def run(command: list[str], timeout: float = TIMEOUT) -> Child:
    """Run a program; its peak memory is VmHWM, read while it runs (ru_maxrss would report a large parent's)."""
    peak = 0
    began = perf_counter()
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError as error:
        raise PeerError(f"{Path(command[0]).name}: {error.strerror}") from error

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except OSError:
                return
            peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))])
            sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        stdout, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise PeerError(f"{Path(command[0]).name} took more than {timeout:g} s") from None
    seconds = perf_counter() - began
    watcher.join()
    if process.returncode:
        raise PeerError(f"{Path(command[0]).name} ended with code {process.returncode}")
    return Child(stdout, seconds, peak)


class Llama:
    """llama.cpp, or ik_llama.cpp, on a model file with 2 threads; rates are tokens per second."""

    def __init__(self, programs: Path, model: Path, variants: Variants = REPACK) -> None:
        self.variants = variants
        self._bench, self._batched, self._model = programs / "llama-bench", programs / "llama-batched-bench", str(model)
        for program in (self._bench, self._batched):
            if not program.exists():
                raise PeerError(f"{program.name} is not built: run `make peers`")

    def bench(self, variant: str, prompt: int, tokens: int, warm_up: bool = True) -> tuple[float, Child]:
        """Rate of ``llama-bench``: decoding ``tokens``, or else the prompt."""
        command = [str(self._bench), "-m", self._model, "-t", "2", "-r", "1", "-p", str(prompt), "-n", str(tokens), "-o",
                   "json", *self.variants[variant][0], *([] if warm_up else ["--no-warmup"])]  # fmt: skip
        child = run(command)
        return float(json.loads(child.stdout)[-1]["avg_ts"]), child

    def decode(self, variant: str, batch: int, tokens: int) -> float:
        """Rate of decoding ``tokens`` for each of ``batch`` sequences with a prompt of 4."""
        if batch == 1:
            return self.bench(variant, 0, tokens)[0]
        command = [str(self._batched), "-m", self._model, "-t", "2", "-c", str(max(512, batch * (tokens + 8))), "-npp", "4",
                   "-ntg", str(tokens), "-npl", str(batch), "--output-format", "jsonl"]  # fmt: skip
        for _ in range(ATTEMPTS):
            child = run(command + self.variants[variant][1])
            for line in child.stdout.splitlines():
                if line.startswith("{") and "speed_tg" in line:
                    return float(json.loads(line)["speed_tg"])
        raise PeerError(f"llama-batched-bench printed no result {ATTEMPTS} times")
