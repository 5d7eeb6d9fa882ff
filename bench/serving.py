"""Tokens per second and time to first token through the server: against `elmoe bench`, or against llama-server.

    .venv/bin/python -m bench.serving MODEL [--clients 1,16] [--prefix 1000] [--json]
    .venv/bin/python -m bench.serving FILE.gguf --peer PATH/llama-server [--clients 1,4,16] [--limit 300MiB]

Clients are OpenAI's own, streaming, in this process, on the same processors as the server; ``plain client``: one that reads
lines and does nothing with them. All clients of a row ask at the same moment; each answer has ``--tokens`` tokens, greedy.
``tokens/s``: the sum over clients of tokens behind the first over the time from the first to the last, so prompts are no
part of it; ``first token``: the median over clients. What is compared runs in alternation, and a row is the median over
rounds; a server has answered all clients once before.

``--limit``: each server runs in a memory cgroup of that size, its file not in the page cache, ours with as much as
``--memory``. ``--prefix``: time to first token of a prompt of so many tokens that is new, and when it comes again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any

import httpx
import openai

import elmoe
from bench.llama_offload import evict, limits
from bench.machine_load import observed, wait_for_calm
from elmoe.bitslice import SamplingParameters
from elmoe.convert.cache import stored
from elmoe.measure.benchmark import benchmark, random_prompts
from elmoe.store import open_store
from elmoe.terminal import print_table
from elmoe.units import parse_bytes

WORDS = ["the", "whale", "sea", "ship", "captain", "old", "white", "and", "of", "a", "in", "his", "with", "upon", "all"]
START_SECONDS, ANSWER_SECONDS, PATIENCE = 120.0, 900.0, 3.0
"""Most seconds for a server to be ready, for an answer, and of waiting for other programs to rest."""
TICK = os.sysconf("SC_CLK_TCK")
OURS, PLAIN, ENGINE, PEER = "elmoe serve", "elmoe serve, plain client", "elmoe bench", "llama-server"
THREADS = 2
"""Of llama-server, and the processors that both may use."""


def ours(model: str, options: argparse.Namespace, port: int) -> list[str]:
    """The command of our server."""
    command = [
        sys.executable, "-m", "elmoe", "serve", model, "--port", str(port), "--model-name", "m", "--mode", options.mode,
        "--batch", str(max(options.clients)), "--json",
    ]  # fmt: skip
    return command if options.limit is None else [*command, "--memory", str(options.limit)]


def peers(model: str, options: argparse.Namespace, port: int) -> list[str]:
    """The command of llama-server: one slot for each client, with the context that a row needs, or a prefix."""
    slots = max(options.clients)
    context = slots * (max(options.words * 8, options.prefix) + options.tokens + 64)
    command = [
        str(options.peer), "-m", model, "--port", str(port), "-a", "m", "-t", str(THREADS), "-np", str(slots), "-c",
        str(context), "--no-webui",
    ]  # fmt: skip
    return command if options.limit is None else [*command, "--no-repack"]


@contextmanager
def running(command: list[str], port: int, enter: Callable[[], None] | None) -> Iterator[tuple[str, int, float]]:
    """A server that is ready: its address, its process, and the seconds that it took."""
    began = perf_counter()
    with open(os.devnull, "w") as nothing:
        process = subprocess.Popen(command, stdout=nothing, stderr=nothing, preexec_fn=enter)
    try:
        while True:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            if process.poll() is not None or perf_counter() - began > START_SECONDS:
                sys.exit(f"{' '.join(command)} is not ready (exit status {process.poll()})")
            sleep(0.01)
        yield f"http://127.0.0.1:{port}/v1", process.pid, perf_counter() - began
    finally:
        process.terminate()
        process.wait(60)


def processor_seconds(process: int) -> float:
    """User and system time so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


async def answer(client: openai.AsyncOpenAI, prompt: Any, tokens: int) -> tuple[float, float]:
    """When the first text and the last event came: llama-server sends an event before there is text. An answer that is
    shorter than asked for ends the program."""
    first = last = 0.0
    usage = None
    stream = await client.completions.create(
        model="m", prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True},
        stream_options={"include_usage": True},
    )  # fmt: skip
    async for event in stream:
        if event.choices:
            last = perf_counter()
            if event.choices[0].text or event.choices[0].finish_reason:
                first = first or last
        usage = event.usage or usage
    if usage is None or usage.completion_tokens != tokens:
        sys.exit(f"an answer has another length than {tokens} tokens: {usage}")
    return first, last


async def plain_answer(url: str, prompt: str, tokens: int) -> tuple[float, float]:
    """The same with a client that reads lines and nothing else."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    body = json.dumps(
        {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    ).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\nconnection: close\r\n"
    writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
    first = last = 0.0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            last = perf_counter()
            first = first or last
    writer.close()
    return first, last


async def together(url: str, clients: int, options: argparse.Namespace, seed: int, plain: bool = False) -> dict[str, float]:
    """One row: all clients at once."""
    rng, tokens = random.Random(seed), options.tokens
    prompts = [" ".join(rng.choices(WORDS, k=options.words)) for _ in range(clients)]
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=ANSWER_SECONDS) as client:
        used, began = process_time(), perf_counter()
        asked = [plain_answer(url, one, tokens) if plain else answer(client, one, tokens) for one in prompts]
        times = await asyncio.gather(*asked)
        used = process_time() - used
    return {
        "tokens_per_second": sum((tokens - 1) / (last - first) for first, last in times),
        "first_token_seconds": median(first - began for first, _ in times),
        "seconds": max(last for _, last in times) - began,
        "client_seconds_per_token": used / (clients * tokens),
    }


async def prefix(url: str, length: int, seed: int) -> tuple[float, float]:
    """Seconds to the first token of a prompt that is new, and of the same again."""
    prompt = random.Random(seed).choices(range(4, 250), k=length)
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=ANSWER_SECONDS) as client:
        seconds = []
        for _ in range(2):
            began = perf_counter()
            first, _ = await answer(client, prompt, 1)
            seconds.append(first - began)
    return seconds[0], seconds[1]


@contextmanager
def serving(name: str, model: str, options: argparse.Namespace) -> Iterator[tuple[str, int, float]]:
    """A server that has answered all clients once."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = (peers if name == PEER else ours)(model, options, port)
    with ExitStack() as stack:
        enter = None
        if options.limit is not None:
            folder = Path(model) if Path(model).is_dir() else Path(model).parent
            for file in (path for path in folder.iterdir() if path.is_file()):
                evict(file)
            enter = stack.enter_context(limits(options.limit, Path(model), None))
        found = stack.enter_context(running(command, port, enter))
        asyncio.run(together(found[0], max(options.clients), options, 0))
        yield found


def row(name: str, server: tuple[str, int, float], clients: int, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One run of one row."""
    url, process, ready = server
    before = processor_seconds(process)
    found, others = observed(partial(asyncio.run, together(url, clients, options, seed, name == PLAIN)))
    used = (processor_seconds(process) - before) / (clients * options.tokens)
    return {"system": name, "clients": clients, "others": others, "ready_seconds": ready,
            "processor_seconds_per_token": used, **found}  # fmt: skip


def against_peer(models: dict[str, str], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of both servers, one after the other: under a limit of memory they cannot run beside each other."""
    for turn in range(options.rounds):
        for name in (OURS, PEER) if turn % 2 == 0 else (PEER, OURS):
            with serving(name, models[name], options) as server:
                for clients in options.clients:
                    yield row(name, server, clients, options, 7000 * turn + clients)
                yield from prefixes(name, server[0], options, 100 * turn)


def against_engine(store: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of our server, with both clients, and of what `elmoe bench` measures, in this process, in alternation."""
    sampling = SamplingParameters()
    with serving(OURS, store, options) as server, elmoe.load(store, mode=options.mode, batch=max(options.clients)) as model:
        for clients, turn in product(options.clients, range(options.rounds)):
            wait_for_calm(PATIENCE)
            requests = random_prompts(model, clients, options.words, options.tokens, sampling)
            (found,) = benchmark(model, requests, [options.mode], [clients], 1)
            yield {"system": ENGINE, "clients": clients, "tokens_per_second": found["tokens_per_second"]}
            for name in (OURS, PLAIN):
                yield row(name, server, clients, options, 7000 * turn + clients)
        yield from prefixes(OURS, server[0], options, 0)


def prefixes(name: str, url: str, options: argparse.Namespace, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of prompts that come twice."""
    for turn in range(options.turns if options.prefix else 0):
        new, again = asyncio.run(prefix(url, options.prefix, seed + turn))
        yield {"system": name, "clients": 0, "new_seconds": new, "again_seconds": again, "again_ratio": again / new}


def summary(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds, by system and row."""
    cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["system"], row["clients"]), []).append(row)
    found = []
    for (system, clients), own in cells.items():
        names = [name for name in own[0] if name not in ("system", "clients")]
        found.append({"system": system, "clients": clients, "runs": len(own)} | {
            name: median(one[name] for one in own) for name in names})  # fmt: skip
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a store, demo, or a GGUF file")
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--words", type=int, default=24, help="of a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", default="plain", help="of our server and of elmoe bench")
    parser.add_argument("--peer", type=Path, help="llama-server; MODEL is a GGUF file then")
    parser.add_argument("--limit", type=parse_bytes, help="memory of each server")
    parser.add_argument("--prefix", type=int, default=0)
    parser.add_argument("--turns", type=int, default=5, help="prefixes of a round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    store = str(stored(options.model))
    models = {OURS: store, PEER: options.model}
    rows = against_peer(models, options) if options.peer else against_engine(store, options)
    found = summary(rows)
    if options.json:
        given = {"model": Path(store).name, "limit": options.limit, "tokens": options.tokens}
        print(json.dumps(given | {"rows": found}, indent=1))
        return
    with open_store(store) as reader:
        title = f"{reader.path.name}; answers of {options.tokens} tokens; medians of {options.rounds} rounds"
    columns = ("system", "clients", "tokens/s", "first token ms", "server us/token", "client us/token", "others' cores")
    print_table(title, columns, [
        (row["system"], row["clients"], f"{row['tokens_per_second']:.1f}",
         *(f"{scale * row[name]:.{digits}f}" if name in row else "" for name, scale, digits in (
             ("first_token_seconds", 1e3, 1), ("processor_seconds_per_token", 1e6, 0), ("client_seconds_per_token", 1e6, 0),
             ("others", 1, 2))))
        for row in found if row["clients"]
    ])  # fmt: skip
    ready = {row["system"]: row["ready_seconds"] for row in found if "ready_seconds" in row}
    print("; ".join(f"{system} was ready after {seconds:.2f} s" for system, seconds in ready.items() if system != PLAIN))
    for row in found:
        if not row["clients"]:
            new, again = 1e3 * row["new_seconds"], 1e3 * row["again_seconds"]
            told = f"first token after {new:.1f} ms, again after {again:.1f} ms ({row['again_ratio']:.1%})"
            print(f"{row['system']}: prompt of {options.prefix} tokens, {told}")


if __name__ == "__main__":
    main()
