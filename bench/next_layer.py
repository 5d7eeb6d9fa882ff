"""How well a layer's hidden state foretells the next layer's experts, on the demo model: a case for prefetch.

    .venv/bin/python -m bench.next_layer [--json]

Router l + 1 is applied to the residual stream before layer l's experts ran. Reported per layer: the share of layer l + 1's
top-k that the prediction's top-k names, and the same share among experts that an LRU cache of half of the experts misses,
which are the only ones a prefetch would read; ``useful`` is the share of predicted misses that are then demanded.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench.prompts import prompts_of
from elmoe import bitslice, kernels
from elmoe.bitslice import LayerStack, Routings, SamplingParameters
from elmoe.engine.engine import Engine
from elmoe.engine.observe import ObservedBackend
from elmoe.engine.options import EngineOptions
from elmoe.engine.request import Request
from elmoe.llm import Model, load


class Prophet(ObservedBackend):
    """A backend that also asks each layer's successor router."""

    def __init__(self, model: Model) -> None:
        super().__init__(kernels, lambda name, began, ended: None)
        self.routers = model.engine.decoder.routers
        self.guess: set[int] | None = None
        shape = (len(self.routers), model.reader.spec.experts)
        self.used = np.full(shape, -1)
        self.time, self.cached = 0, shape[1] // 2
        self.right, self.missed, self.foreseen, self.read, self.total = (np.zeros(shape[0]) for _ in range(5))

    def forward(self, stack: LayerStack, x: np.ndarray, *rest: Any, **named: Any) -> Routings:
        return kernels.forward(stack, x, *rest, routed=partial(self.routed, x), **named)

    def routed(self, x: np.ndarray, layer: int, routings: Routings) -> None:
        experts = routings.experts[layer]
        self.time += 1
        if len(x) == 1:
            actual = set(experts[0].tolist())
            resident = set(np.argsort(-self.used[layer], kind="stable")[: self.cached].tolist())
            if layer and self.guess is not None:
                self.right[layer] += len(actual & self.guess)
                self.total[layer] += len(actual)
                self.missed[layer] += len(actual - resident)
                self.foreseen[layer] += len((actual & self.guess) - resident)
                self.read[layer] += len(self.guess - resident)
            following = self.routers[layer + 1] if layer + 1 < len(self.routers) else None
            # In NumPy: the kernels are in use until the hook returns.
            self.guess = None if following is None else set(bitslice.route(following, x).experts[0].tolist())
        self.used[layer, experts.ravel()] = self.time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="folder of prompt sets, see bench/prompts.py")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with load("demo") as model:
        prophet = Prophet(model)
        engine = Engine(model.reader, prophet, EngineOptions("plain"))
        prompts = prompts_of(arguments.prompts, 16)
        engine.generate([Request(model.encode(p)[:64], 64, SamplingParameters(0.8, seed=i)) for i, p in enumerate(prompts)])
    rows = [
        {
            "layer": layer,
            "top_k_foretold": float(prophet.right[layer] / prophet.total[layer]),
            "misses_foretold": float(prophet.foreseen[layer] / max(1, prophet.missed[layer])),
            "useful": float(prophet.foreseen[layer] / max(1, prophet.read[layer])),
        }
        for layer in range(1, len(prophet.routers))
    ]
    if arguments.json:
        print(json.dumps(rows, indent=1))
    for row in [] if arguments.json else rows:
        print(" ".join(f"{key} {value:.2f}" if key != "layer" else f"layer {value}:" for key, value in row.items()))


if __name__ == "__main__":
    main()
