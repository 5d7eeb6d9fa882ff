"""Random requests to a server at random times: each answer equals that of the Python API alone, bit for bit.

python -m tests.server.load [--requests 500] [--fast-memory 24MiB]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

import elmoe
from elmoe.generation import SamplingParams
from tests.server.live import LiveServer
from tests.templated import templated_store

WORDS = ["the", "whale", "sea", "ship", "captain", "old", "white", "and", "of", "a", "in", "his", "with", "upon", "all"]
KNOWN = {field.name for field in fields(SamplingParams)}
SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"type": "integer"}},
    "required": ["name", "size"], "additionalProperties": False,
}  # fmt: skip
WHOLE, STREAM, LEAVE, HURRY = "whole", "stream", "leave", "hurry"
CONCURRENT = 16
LONGEST_HURRY = 0.3
"""Seconds after which a client in a hurry has left."""


@dataclass(frozen=True)
class Case:
    """A request, and how it is asked: as a whole, streamed, left behind the first event of a stream, or left at a random
    time if it has not ended by then."""

    path: str
    body: dict[str, Any]
    way: str

    def alone(self, model: elmoe.Model) -> list[tuple[str, list[float]]]:
        """Text and log-probabilities of each answer, of one call of the Python API."""
        names = KNOWN & set(self.body) - {"logprobs", "logit_bias"}
        params: dict[str, Any] = {name: self.body[name] for name in names}
        if "logit_bias" in self.body:
            params["logit_bias"] = {int(token): value for token, value in self.body["logit_bias"].items()}
        wanted = self.body.get("response_format", {})
        if wanted.get("type") == "json_schema":
            params["json_schema"] = wanted["json_schema"]["schema"]
        params["json_object"] = wanted.get("type") == "json_object"
        ask = model.generate if "prompt" in self.body else model.chat
        first = ask(self.body.get("prompt") or self.body["messages"], SamplingParams(**params))
        answers = [first, *first.others]
        return [(one.text, list(one.logprobs[: len(one.token_ids) - (one.finish_reason == "eos")])) for one in answers]


def random_case(rng: random.Random) -> Case:
    """One of them; equal beginnings are frequent, so that a prefix cache has something to find."""
    beginning = " ".join(random.Random(rng.randrange(4)).choices(WORDS, k=150)) if rng.random() < 0.4 else ""
    text = f"{beginning} {' '.join(rng.choices(WORDS, k=rng.choice((1, 5, 20, 100))))}".strip()
    body: dict[str, Any] = {
        "model": "whale", "seed": rng.randrange(1000), "max_tokens": rng.choice((1, 5, 30, 60)),
        "temperature": rng.choice((0, 0.5, 1, 1.5)), "n": rng.choice((1, 1, 1, 3)), "top_p": rng.choice((1, 0.9)),
        "top_k": rng.choice((0, 50)), "min_p": rng.choice((0, 0.05)),
    }  # fmt: skip
    if rng.random() < 0.3:
        body["stop"] = [rng.choice((" the", ",", "\n"))]
    if rng.random() < 0.4:
        body |= {"presence_penalty": rng.choice((0, 1.5)), "frequency_penalty": rng.choice((0, 0.5)),
                 "repetition_penalty": rng.choice((1, 1.3)), "logit_bias": {str(rng.randrange(4096)): 5.0}}  # fmt: skip
    way = rng.choice((WHOLE, WHOLE, STREAM, STREAM, LEAVE, HURRY))
    if rng.random() < 0.4:
        body.pop("stop", None)
        schema = {"type": "json_schema", "json_schema": {"name": "whale", "schema": SCHEMA}}
        body["response_format"] = rng.choice((schema, schema, {"type": "json_object"}))
    if rng.random() < 0.5:
        return Case("/v1/completions", body | {"prompt": text, "logprobs": 0}, way)
    return Case("/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}], "logprobs": True}, way)


def part_of(choice: dict[str, Any]) -> tuple[str, list[float]]:
    """Text and log-probabilities of a choice, whole or of an event."""
    holder = choice.get("message") or choice.get("delta") or choice
    logprobs = choice["logprobs"] or {}
    entries = logprobs.get("token_logprobs")
    values = [entry["logprob"] for entry in logprobs.get("content", [])] if entries is None else entries
    return holder.get("content", holder.get("text", "")), values


async def ask(http: httpx.AsyncClient, case: Case) -> list[tuple[str, list[float]]] | None:
    """The answers to a case; None where it was left."""
    if case.way == WHOLE:
        response = await http.post(case.path, json=case.body)
        assert response.status_code == 200, response.text
        return [part_of(choice) for choice in response.json()["choices"]]
    texts: list[str] = [""] * case.body["n"]
    values: list[list[float]] = [[] for _ in texts]
    async with http.stream("POST", case.path, json=case.body | {"stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                if case.way == LEAVE:
                    return None
                for choice in json.loads(line[6:])["choices"]:
                    text, logprobs = part_of(choice)
                    texts[choice["index"]] += text
                    values[choice["index"]] += logprobs
    return list(zip(texts, values, strict=True))


def answers(url: str, cases: list[Case], seed: int = 0, pause: float = 0.02) -> list[list[tuple[str, list[float]]] | None]:
    """Ask all, ``CONCURRENT`` at once, with random pauses of ``pause`` seconds on average."""
    rng = random.Random(seed)

    async def main() -> list[Any]:
        turns = asyncio.Semaphore(CONCURRENT)
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:

            async def one(case: Case) -> Any:
                async with turns:
                    await asyncio.sleep(rng.expovariate(1 / pause))
                    with suppress(TimeoutError):
                        async with asyncio.timeout(rng.random() * LONGEST_HURRY if case.way == HURRY else None):
                            return await ask(http, case)

            return await asyncio.gather(*(one(case) for case in cases))

    return asyncio.run(main())


def differing(model: elmoe.Model, cases: list[Case], found: list[Any]) -> list[Case]:
    """Cases whose answers are not those that the model gives alone."""
    return [case for case, answer in zip(cases, found, strict=True) if answer is not None and answer != case.alone(model)]


def main() -> None:
    """Ask many, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--fast-memory", help="the budget of an enforced tier [default: all in memory]")
    wanted = parser.parse_args()
    rng = random.Random(1)
    cases = [random_case(rng) for _ in range(wanted.requests)]
    with TemporaryDirectory() as folder:
        store = templated_store(Path(folder))
        budget = ("--fast-memory", wanted.fast_memory) if wanted.fast_memory else ()
        with LiveServer(str(store), "--model-name", "whale", "--queue", "256", *budget) as server:
            found = answers(server.url, cases)
            metrics = httpx.get(f"{server.url}/metrics").text
        with elmoe.load(store, mode="plain") as model:
            wrong = differing(model, cases, found)
    counted = [
        line
        for line in metrics.splitlines()
        if line.startswith(("elmoe_prefix", "elmoe_spec", "elmoe_request_", "elmoe_read"))
    ]
    print("\n".join(counted))
    print(f"{len(cases)} requests, {sum(answer is None for answer in found)} left early, {len(wrong)} differ")
    for case in wrong[:5]:
        print("differs:", case)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
