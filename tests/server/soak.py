"""A server at twice its capacity, with clients that leave: nobody is lost, no slot stays taken, memory does not grow.

python -m tests.server.soak [--seconds 1800] [--store demo]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter

import httpx
import numpy as np

from tests.server.live import LiveServer

BATCH, QUEUE = 4, 4
CLIENTS = 2 * (BATCH + QUEUE)
WORDS = ["the", "whale", "sea", "ship", "captain", "old", "white", "and", "of", "a", "in", "his", "with", "upon", "all"]
KINDS = 40
"""Different requests, so that answers repeat and can be compared."""
SLOPE = 1.0
"""Most MB a minute that the memory may grow behind the first third."""


def body(kind: int) -> dict:
    """One of the requests."""
    rng = random.Random(kind)
    return {
        "model": "m", "prompt": " ".join(rng.choices(WORDS, k=rng.choice((2, 10, 100, 300)))), "seed": kind, "logprobs": 0,
        "max_tokens": rng.choice((1, 8, 40, 120)), "temperature": rng.choice((0, 0.7, 1.2)), "n": rng.choice((1, 1, 2)),
        "top_p": rng.choice((1, 0.9)), "stop": rng.choice((None, [","])),
    }  # fmt: skip


class Soak:
    """Clients of one server, and what became of their requests."""

    def __init__(self, server: LiveServer, seconds: float, seed: int = 0) -> None:
        self.server, self.seconds, self.rng = server, seconds, random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.known: dict[int, list[str]] = {}
        self.memory: list[tuple[float, int]] = []
        self.wrong: list[str] = []

    async def run(self) -> None:
        """All clients until time is up, then a look at what is left."""
        self.end = time.monotonic() + self.seconds
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=300, limits=limits) as http:
            await asyncio.gather(self.watch(), *(self.client(http) for _ in range(CLIENTS)))
            for _ in range(200):
                metrics = (await http.get("/metrics")).text
                left = [float(value) for value in re.findall(r"^elmoe_requests_(?:running|waiting) (\S+)", metrics, re.M)]
                used = float(re.search(r"^elmoe_kv_cache_usage_ratio (\S+)", metrics, re.M).group(1))
                if not any(left):
                    break
                await asyncio.sleep(0.05)
            self.counts["left"] = int(sum(left))
            if any(left):
                self.wrong.append(f"{left} answers run or wait at the end, {used:.1%} of the KV cache is taken")

    async def watch(self) -> None:
        """Note the memory of the server."""
        while time.monotonic() < self.end:
            self.memory.append((time.monotonic(), self.server.memory()))
            await asyncio.sleep(0.5)

    async def client(self, http: httpx.AsyncClient) -> None:
        """Ask again and again."""
        while time.monotonic() < self.end:
            kind = self.rng.randrange(KINDS)
            try:
                if not await self.ask(http, kind):
                    await asyncio.sleep(0.05)
            except httpx.HTTPError as error:
                self.wrong.append(f"request {kind}: {error!r}")
                await asyncio.sleep(0.1)

    async def ask(self, http: httpx.AsyncClient, kind: int) -> bool:
        """One request: whole or streamed, to its end or not. Whether it was taken."""
        way = self.rng.choice(("whole", "stream", "stream", "leave"))
        if way == "whole":
            response = await http.post("/v1/completions", json=body(kind))
            served = self.served(response)
            if served:
                self.compare(kind, [choice["text"] for choice in response.json()["choices"]])
            return served
        texts, lines = [""] * body(kind)["n"], 0
        leave = self.rng.randrange(1, 10) if way == "leave" else None
        async with http.stream("POST", "/v1/completions", json=body(kind) | {"stream": True}) as response:
            if not self.served(response):
                await response.aread()
                return False
            async for line in response.aiter_lines():
                lines += line.startswith("data: {")
                if leave is not None and lines >= leave:
                    self.counts["left early"] += 1
                    return True
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        texts[choice["index"]] += choice["text"]
                elif line == "data: [DONE]":
                    self.compare(kind, texts)
                    return True
        self.wrong.append(f"request {kind}: a stream ended without [DONE]")
        return True

    def served(self, response: httpx.Response) -> bool:
        """Whether a request was taken; anything but 429 is wrong otherwise."""
        self.counts[str(response.status_code)] += 1
        if response.status_code == 429 and "retry-after" in response.headers:
            return False
        if response.status_code != 200:
            self.wrong.append(f"status {response.status_code}")
        return response.status_code == 200

    def compare(self, kind: int, texts: list[str]) -> None:
        """Same request, same text."""
        self.counts["complete"] += 1
        if self.known.setdefault(kind, texts) != texts:
            self.wrong.append(f"request {kind} has another text: {texts} after {self.known[kind]}")

    @property
    def slope(self) -> float:
        """MB a minute that the memory grew behind the first third."""
        times, bytes_ = np.array(self.memory[len(self.memory) // 3 :], float).T
        return float(np.polyfit(times - times[0], bytes_ / 1e6, 1)[0] * 60)


def soak(store: str, seconds: float) -> Soak:
    """Run one."""
    with LiveServer(store, "--model-name", "m", "--batch", str(BATCH), "--queue", str(QUEUE)) as server:
        run = Soak(server, seconds)
        asyncio.run(run.run())
        return run


def main() -> None:
    """Run one and tell what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1800)
    parser.add_argument("--store", default="demo")
    wanted = parser.parse_args()
    run = soak(wanted.store, wanted.seconds)
    megabytes = [bytes_ / 1e6 for _, bytes_ in run.memory]
    print(
        f"{dict(run.counts)}; memory {megabytes[len(megabytes) // 3]:.1f} -> {megabytes[-1]:.1f} MB, {run.slope:+.2f} MB/min"
    )
    for wrong in run.wrong[:20]:
        print("wrong:", wrong)
    if run.wrong or run.slope > SLOPE:
        sys.exit(1)


if __name__ == "__main__":
    main()
