"""``elmoe serve`` in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from time import monotonic, sleep
from typing import Any


class LiveServer:
    """A context manager; ``url`` is known once requests can come."""

    def __init__(self, store: str, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._log = tempfile.NamedTemporaryFile("w+")  # noqa: SIM115
        began = monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "elmoe", "serve", store, "--port", "0", "--json", *arguments],
            stderr=self._log, stdout=subprocess.DEVNULL, env=environment,
        )  # fmt: skip
        while not (found := [line["url"] for line in self.log() if line.get("message") == "listening"]):
            if self.process.poll() is not None or monotonic() > began + 120:
                text = self.text()
                self.close()
                raise RuntimeError(text)
            sleep(0.02)
        self.url: str = found[0]

    def text(self) -> str:
        """The log."""
        with open(self._log.name) as file:
            return file.read()

    def log(self) -> list[dict[str, Any]]:
        """Lines of the log; those that are no JSON are errors of the command line."""
        return [json.loads(line) for line in self.text().splitlines() if line.startswith("{") and line.endswith("}")]

    def memory(self) -> int:
        """Resident bytes."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmRSS:")) * 1024

    def close(self) -> int:
        """End it; its exit status."""
        for _ in range(2):
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    continue
        if self.process.poll() is None:
            self.process.kill()
        self._log.close()
        return self.process.wait()

    def __enter__(self) -> LiveServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
