"""What drafts tell of their verification: how many of its missing slices they route to, and further candidates for a token.

``python -m bench.foresight``: the demo model drafts 4 tokens with more or fewer experts resident. Of the slices that
verification lacks, the share that the draft named; of those that the draft named, the share that verification used; and how
often the target's token is the draft's first, second ... choice, given that it is none before (greedy).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from elmoe import kernels
from elmoe.bitslice import SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.options import EngineOptions
from elmoe.engine.passes import Pass
from elmoe.engine.request import Request
from elmoe.llm import load
from elmoe.sim.recorded import predict
from elmoe.store import open_store
from elmoe.trace import TraceRecorder, read_trace

TEXTS = (
    "The history of the city", "def add(a, b):", "Q: How many apples", "Once upon a time", "In physics, energy is",
    "The whale", "The sea was calm and", "for i in range(10):",
)  # fmt: skip
LENGTH, CANDIDATES = 4, 4


class Ranks:
    """An observer: places of the target's tokens among a draft's logits, of tokens whose prefix was accepted."""

    kernels = False

    def __init__(self, engine: Engine) -> None:
        self._engine, self._drafts, self.found = engine, {}, []

    def on_kernel(self, name: str, began: float, ended: float) -> None:
        """See ``Observer``."""

    def on_pass(self, done: Pass) -> None:
        """See ``Observer``."""
        accepted: dict[int, bool] = {}
        for index, row in enumerate(done.rows[: done.sampled]):
            key = row.sequence.index, row.position
            if done.phase == "draft":
                self._drafts[key] = self._engine._passes.logits[index].copy()
            elif done.phase == "verify" and key in self._drafts:
                logits, target = self._drafts.pop(key), done.samples[index].token
                if accepted.get(row.sequence.index, True):
                    self.found.append(int((logits > logits[target]).sum()))
                    accepted[row.sequence.index] = self.found[-1] == 0

    def candidates(self) -> list[float]:
        """Acceptance of the first, second ... candidate, where those before it were not it."""
        ranks, odds = np.array(self.found), []
        for rank in range(CANDIDATES):
            odds.append(float((ranks == rank).sum() / max(1, (ranks >= rank).sum())))
        return odds


def main() -> None:
    """Print a line per share of the experts and temperature."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    with load("demo") as model:
        prompts = [model.encode(text) for text in TEXTS]
    print("temperature  share  foreseen/missing  used/foreseen  candidates")
    for temperature in (0.0, 0.8):
        requests = [
            Request(ids, arguments.tokens, SamplingParameters(temperature, seed=seed), ignore_eos=True)
            for seed, ids in enumerate(prompts)
        ]
        for share in (0.1, 0.25, 0.5):
            options = EngineOptions(
                mode="elastic", fast_memory=share, split="msb_first", batch=4, draft_length=LENGTH, all_ranks=True
            )
            with TemporaryDirectory() as folder, open_store("demo") as reader:
                engine, path = Engine(reader, kernels, options), Path(folder) / "run.trace"
                ranks, watch = Ranks(engine), engine._passes.watch
                engine._passes.watch = lambda observers, ranks=ranks, watch=watch: watch([*observers, ranks])
                with TraceRecorder(path, reader.spec, {"ignore_eos": True}, all_ranks=True) as recorder:
                    engine.generate(requests, recorder=recorder)
                sizes = engine.fitting.sizes(requests)
                verify = predict(read_trace(path), engine.fitting.slots(sizes), sizes, options.residency).phases["verify"]
            missing = verify.msb_misses + verify.lsb_misses
            told = " ".join(f"{odds:.2f}" for odds in ranks.candidates()) if not temperature else "-"
            foreseen, used = verify.foreseen / missing, verify.foreseen / verify.named
            print(f"{temperature:11.1f} {share:6.2f} {foreseen:17.2f} {used:14.2f}  {told}")


if __name__ == "__main__":
    main()
