"""Requests that come and go: random arrivals, aborts, failures, copies, stop strings, chunks and budgets, over both tiers.
Every finished answer must equal its own run alone, bit for bit.

``python -m tests.schedules --count 1000`` runs many; ``make test`` runs a sample.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer, decoders, models

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request, Result
from elmoe.errors import BudgetError, NumericsError, RequestError
from elmoe.grammar import Grammars
from elmoe.models.spec import ModelSpec
from elmoe.store import open_direct, open_store
from elmoe.store.synthetic import synthesize
from elmoe.text import TextStream
from tests.tiny import tiny_spec

SPEC = tiny_spec(layers=3, dense_layers=(1,), experts=8, top_k=2, max_positions=400, eos_tokens=(5,), tied_embeddings=False)
POISON = 96
"""The token whose embedding is not finite: a request that meets it fails."""


def windowed_spec() -> ModelSpec:
    """The same with sinks, and windows shorter and longer than a page in two layers."""
    layers = (
        msgspec.structs.replace(layer, attention=msgspec.structs.replace(layer.attention, window=window, sinks=True))
        for layer, window in zip(SPEC.layers, (20, None, 90), strict=True)
    )
    return msgspec.structs.replace(SPEC, layers=tuple(layers))


def poisoned_store(folder: Path, spec: ModelSpec) -> Path:
    """A random model with the poisonous token."""
    synthesize(folder / "store", spec, seed=3)
    with open_store(folder / "store") as reader:
        offsets = next(entry.offsets for entry in reader.manifest.tensors if entry.name == "embedding")
        groups = reader.matrix("embedding").scales.shape[1]
    with open(folder / "store" / "dense.bin", "r+b") as file:
        for group in range(groups):
            file.seek(offsets["scales"] + 2 * ((POISON // 16 * groups + group) * 16 + POISON % 16))
            file.write(np.array([np.inf], np.float16).tobytes())
    return folder / "store"


SCHEMAS = ({"type": "object"}, {"type": "array", "items": {"enum": ["a", 12, True]}, "maxItems": 9}, {"type": "number"})


def grammars() -> Grammars:
    """A token is a character, but for the end of sequence and what the model has beyond."""
    ids = {chr(33 + index): index for index in range(94)}
    del ids[chr(33 + SPEC.eos_tokens[0])]
    tokenizer = Tokenizer(models.BPE(ids | {"<eos>": SPEC.eos_tokens[0]}, []))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.decoder = decoders.ByteLevel()
    return Grammars(tokenizer, SPEC.vocabulary, SPEC.eos_tokens)


def words(ids) -> str:
    """A decoding of its own for every token, some of several characters."""
    return "".join(f"{token}é " for token in ids)


def text_stream(prompt, stop) -> TextStream:
    return TextStream(words, prompt, stop)


class Schedules:
    """Draws schedules on one model and checks them; answers of requests alone are computed once."""

    def __init__(self, folder: Path, spec: ModelSpec = SPEC) -> None:
        store = poisoned_store(folder, spec)
        self.memory, self.direct = open_store(store), open_direct(store)
        self._alone: dict[Request, list[Result]] = {}
        self._plain = Engine(
            self.memory, kernels, EngineOptions(mode="plain", keep_kv_digest=True, batch=1), text=text_stream
        )
        self.seen: dict[str, int] = defaultdict(int)
        self._grammars = grammars()
        self._windows = any(layer.attention.window is not None for layer in spec.layers)

    def close(self) -> None:
        self.memory.close()
        self.direct.close()

    def alone(self, request: Request) -> list[Result]:
        """The answers of a request that is served by itself, one copy after the other, without drafts."""
        if request not in self._alone:
            results = {}
            for outputs in self._plain.run([request]):
                results |= {output.choice: output.result for output in outputs if output.result is not None}
            self._alone[request] = [results[choice] for choice in range(request.copies)]
        return self._alone[request]

    def request(self, rng: np.random.Generator) -> Request:
        """One of a few hundred requests, so that runs alone are shared."""
        own = np.random.default_rng(int(rng.integers(300)))
        length = int(own.choice([1, 2, 15, 16, 17, 63, 64, 65, 130, 200]))
        prompt = own.integers(6, POISON, length)
        if own.random() < 0.5:  # begins as others do
            shared = np.random.default_rng(int(own.integers(3))).integers(6, POISON, 160)
            begun = min(length, int(own.choice([64, 100, 128, 160])))
            prompt[:begun] = shared[:begun]
        if own.random() < 0.15:
            prompt[own.integers(length)] = POISON
        sampling = SamplingParameters(float(own.choice([0.0, 0.9])), seed=int(own.integers(5)))
        if own.random() < 0.3:
            sampling = replace(
                sampling, presence_penalty=float(own.choice([0, 0.7])), frequency_penalty=float(own.choice([0, 0.4, -0.2])),
                repetition_penalty=float(own.choice([1, 1.2])), logit_bias=((int(own.integers(6, POISON)), 3.0),),
            )  # fmt: skip
        stop = (f"{own.integers(10)}é",) if own.random() < 0.3 else ()
        return Request(
            tuple(prompt.tolist()), int(own.integers(1, 90)), sampling, stop, ignore_eos=bool(own.random() < 0.5),
            stop_tokens=(int(own.integers(97)),) if own.random() < 0.2 else (), copies=int(own.choice([1, 1, 1, 2, 3])),
            alternatives=int(own.choice([0, 0, 2])), text=bool(own.random() < 0.5),
            grammar=self._grammars.json(SCHEMAS[int(own.integers(3))]) if own.random() < 0.2 else None,
        )  # fmt: skip

    def options(self, rng: np.random.Generator, direct: bool) -> EngineOptions:
        page = 64 * SPEC.kv_bytes_per_position
        prefixes = [False, True, page, 4 * page][int(rng.integers(4))]
        return EngineOptions(
            mode=str(rng.choice(["plain", "cache", "elastic", "elastic"])),  # type: ignore[arg-type]
            fast_memory=float(rng.choice([0.0, 0.3, 0.7, 1.0])) if direct or rng.random() < 0.5 else None,
            draft_length=None if rng.random() < 0.4 else int(rng.integers(0, 6)), batch=int(rng.integers(1, 7)),
            kv_memory=int(rng.choice([3, 5, 7, 14, 60])) * page, prefill_chunk=int(rng.choice([1, 7, 16, 33, 64, 300])),
            keep_kv_digest=True, split=str(rng.choice(["auto", "msb_first", "whole_experts"])),  # type: ignore[arg-type]
            staging_experts=int(rng.choice([2, 4, 16])),
            prefix_cache=bool(prefixes) if self._windows else prefixes,  # a size is refused where pages are let go
        )  # fmt: skip

    def run(self, seed: int) -> None:
        """One schedule; AssertionError where an answer differs from its run alone, or a page is lost."""
        rng = np.random.default_rng(seed)
        direct = bool(rng.random() < 0.5)
        options = self.options(rng, direct)
        engine = Engine(self.direct if direct else self.memory, kernels, options, text=text_stream)
        asked: dict[int, Request] = {}
        results: dict[tuple[int, int], Result] = {}
        texts: dict[tuple[int, int], str] = defaultdict(str)
        tokens: dict[tuple[int, int], list[int]] = defaultdict(list)
        left = int(rng.integers(2, 9))
        while engine.has_work or left:
            while left and (not engine.has_work or rng.random() < 0.2):
                left -= 1
                request = self.request(rng)
                try:
                    asked[engine.add(request)] = request
                except BudgetError:
                    self.seen["too long"] += 1
            open_ = sorted({number for number in asked for c in range(asked[number].copies) if (number, c) not in results})
            if open_ and rng.random() < 0.006:
                engine.abort(int(rng.choice(open_)))
            for output in engine.step():
                key = output.request, output.choice
                texts[key] += output.text
                tokens[key] += output.tokens
                if output.result is not None:
                    assert key not in results, "an answer ends once"
                    results[key] = output.result
        for number, request in asked.items():
            for choice in range(request.copies):
                self._check(request, choice, results[number, choice], tokens[number, choice], texts[number, choice])
        cache = engine.cache
        assert cache.bytes_in_use == cache.bytes_resting, "pages are lost"
        cache.forget_prefixes()
        assert cache.bytes_in_use == 0, "pages are lost"
        assert (cache.free_pages, cache.free_rows) == (cache.pages, options.batch), "pages or rows are lost"
        assert (cache.kernels.table == -1).all()
        assert engine.statistics.draft_slow_reads == 0
        self.seen["mixed passes"] += engine.statistics.phases["mixed"].steps
        self.seen["cached tokens"] += engine.statistics.cached_tokens
        self.seen["drafts"] += engine.statistics.verifications
        for number in asked:
            try:
                engine.abort(number)
            except RequestError:
                continue
            raise AssertionError("a request that has ended can be aborted")
        engine.tier.end_run()

    def _check(self, request: Request, choice: int, result: Result, tokens: list[int], text: str) -> None:
        expected = self.alone(request)[choice]
        assert tuple(tokens) == result.tokens, "what steps report is what the result holds"
        self.seen[result.finish] += 1
        self.seen["grammars"] += request.grammar is not None
        if result.finish == "aborted":
            assert result.tokens == expected.tokens[: len(result.tokens)]
            assert result.logprobs == expected.logprobs[: len(result.logprobs)]
            return
        if result.finish == "failed":
            assert isinstance(result.error, NumericsError) and expected.finish == "failed"
            assert result.tokens == expected.tokens
            return
        assert replace(result, error=None) == replace(expected, error=None)
        if request.text or request.stop:
            stream = text_stream(request.prompt, request.stop)
            for token in result.shown(request):
                stream.push(token)
            assert text == stream.take(last=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--windows", action="store_true", help="of a model whose layers have windows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        schedules = Schedules(Path(folder), windowed_spec() if arguments.windows else SPEC)
        for seed in range(arguments.first, arguments.first + arguments.count):
            try:
                schedules.run(seed)
            except BaseException:
                print(f"schedule {seed}")
                raise
        schedules.close()
    print(f"{arguments.count} schedules, every finished answer as alone: {dict(schedules.seen)}")


if __name__ == "__main__":
    main()
