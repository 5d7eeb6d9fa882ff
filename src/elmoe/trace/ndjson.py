"""Routing facts from step logs of other programs: newline-delimited JSON, a header with model facts, then decode steps.

The header is an object (facts may lie in an object within it) under the names that tools around llama.cpp and transformers
use: ``n_expert``, ``num_experts``, ``n_expert_used``, ``top_k``, ``n_layer``, ``n_layers_routed`` and so on. A step is one
of

- an object with a flat list of layer, expert, layer, expert, ... under ``e`` (moearc-trace-v1), or a list per layer under
  ``e``, ``experts``, ``layers``, ``layer_experts`` or ``routing``; a ``phase`` of ``prefill`` counts it to the prompt,
- a bare list of such, or
- one line ``[layer, expert, expert, ...]`` per layer, a step's layers one after another.

A list per layer is ``[layer, expert, ...]`` or ``[expert, ...]``, best first. Layers ascend, the same ones in every step.
Objects that hold no list at all are passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np

from elmoe.errors import TraceError
from elmoe.trace.facts import MAX_EXPERTS, MAX_IDS, RoutingFacts

EXPERT_KEYS = ("n_expert", "n_experts", "num_experts", "num_local_experts", "n_routed_experts", "experts")
TOP_K_KEYS = ("n_expert_used", "top_k", "num_experts_per_tok", "num_experts_per_token", "n_experts_used", "k")
ROUTED_KEYS = ("n_layers_routed", "n_moe_layers", "moe_layers")
LAYER_KEYS = ("n_layer", "n_layers", "num_hidden_layers", "num_layers", "layers")
STEP_KEYS = ("e", "experts", "layers", "layer_experts", "routing")
LINE_LIMIT = 1 << 20
MAX_LAYERS = 4096
Layer = tuple[int, list[int]]


def import_ndjson(path: str | Path) -> RoutingFacts:
    """The one sequence of a step log; ranks are its top-k.

    :raises TraceError: the file is no such log, or a step does not fit its header; names file and line.
    """
    return _Log(Path(path)).facts()


class _Log:
    def __init__(self, path: Path) -> None:
        self._path, self._line = path, 0
        self._layers: list[int] | None = None

    def fail(self, message: str, hint: str | None = None) -> NoReturn:
        raise TraceError(f"'{self._path}', line {self._line}: {message}", hint)

    def facts(self) -> RoutingFacts:
        lines = self.lines()
        header = next(lines, None)
        if not isinstance(header, dict):
            self.fail("there is no header object", 'begin with {"n_layers": ..., "n_experts": ..., "top_k": ...}')
        self.experts = self.fact(header, EXPERT_KEYS, MAX_EXPERTS)
        self.top_k = self.fact(header, TOP_K_KEYS, self.experts)
        self.routed = self.fact(header, ROUTED_KEYS, MAX_LAYERS, required=False)
        self.depth = self.fact(header, LAYER_KEYS, MAX_LAYERS, required=not self.routed) or MAX_LAYERS
        rows: list[np.ndarray] = []
        prefill = 0
        for phase, step in self.steps(lines):
            if phase == "prefill":
                if prefill < len(rows):
                    self.fail("a prefill step follows a decode step", "split the log: one sequence per file")
                prefill += 1
            rows.append(np.array([ids for _, ids in step], np.uint16))
            if len(rows) * rows[0].size > MAX_IDS:
                self.fail(f"there are more than {MAX_IDS} expert ids", "split the log")
        if not rows:
            self.fail("there is no step behind the header")
        count = np.array([len(rows)], np.int32)
        name = next(
            (header[key] for key in ("model", "model_file", "model_id") if isinstance(header.get(key), str)), "a model"
        )
        source = f"imported: {name}, {rows[0].shape[0]} layers, top {self.top_k} of {self.experts}; {self._path.name}"
        return RoutingFacts(np.stack(rows)[None], np.array([prefill + 1], np.int32), count, self.experts, self.top_k, source)

    def lines(self) -> Iterator[Any]:
        """Decoded lines that are not blank."""
        try:
            with self._path.open("rb") as file:
                while line := file.readline(LINE_LIMIT + 1):
                    self._line += 1
                    if len(line) > LINE_LIMIT:
                        self.fail(f"the line has more than {LINE_LIMIT} bytes", "write one step per line")
                    if line.strip():
                        try:
                            yield msgspec.json.decode(line)
                        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                            self.fail(f"not JSON: {error}", "one JSON value per line; remove what was cut off")
        except OSError as error:
            raise TraceError(f"cannot read '{self._path}': {error.strerror or error}") from error

    def fact(self, header: dict[str, Any], keys: tuple[str, ...], most: int, required: bool = True) -> int:
        """A whole number of the header; 0 if it is not there and need not be."""
        for place in (header, *(value for value in header.values() if isinstance(value, dict))):
            for key in keys:
                value = place.get(key)
                if type(value) is int:
                    if not 1 <= value <= most:
                        self.fail(f"{key} is {value}, allowed is 1..{most}")
                    return value
        if required:
            self.fail(f"the header lacks {keys[0]}", f"write one of {', '.join(keys)}")
        return 0

    def steps(self, lines: Iterator[Any]) -> Iterator[tuple[str, list[Layer]]]:
        """Steps as (phase, layers), checked against the header and the first step."""
        pending: list[Layer] = []
        for value in lines:
            phase, body = "decode", value
            if isinstance(value, dict):
                body = next((value[key] for key in STEP_KEYS if isinstance(value.get(key), list)), None)
                phase = value.get("phase", phase)
                if body is None:
                    if any(isinstance(part, list) for part in value.values()):
                        self.fail(f"an object has lists, but none under {', '.join(STEP_KEYS)}")
                    continue
            if not isinstance(body, list) or not body:
                self.fail("a step is neither an object nor a list with content")
            single = isinstance(value, list) and len(body) == self.top_k + 1 and type(body[0]) is int
            layers = [self.layer(body)] if single else self.split(body)
            if not single:
                if pending:
                    self.fail("a step begins before the one before it has all its layers")
                yield phase, self.checked(layers)
                continue
            if pending and layers[0][0] <= pending[-1][0]:
                yield phase, self.checked(pending)
                pending = []
            pending += layers
            if len(pending) > self.depth:
                self.fail(f"a step has more than {self.depth} layers", "layers ascend within a step")
        if pending:
            yield "decode", self.checked(pending)

    def split(self, body: list[Any]) -> list[Layer]:
        """All layers of a step: lists, or a flat list of (layer, expert) pairs."""
        if all(isinstance(part, list) for part in body):
            plain = all(len(part) == self.top_k for part in body)
            return [self.layer([index, *part] if plain else part) for index, part in enumerate(body)]
        if len(body) % (2 * self.top_k):
            self.fail(
                f"a flat step has {len(body)} numbers, not pairs of layer and expert, {self.top_k} per layer",
                "is this the log of another model than the header's?",
            )
        layers = []
        for start in range(0, len(body), 2 * self.top_k):
            pairs = body[start : start + 2 * self.top_k]
            if any(layer != pairs[0] for layer in pairs[::2]):
                self.fail(f"layer {pairs[0]} does not have {self.top_k} experts in a row")
            layers.append(self.layer([pairs[0], *pairs[1::2]]))
        return layers

    def layer(self, numbers: list[Any]) -> Layer:
        """One ``[layer, expert, ...]``."""
        if not numbers:
            self.fail("a layer of a step is empty", f"write the layer and its {self.top_k} experts")
        if any(type(number) is not int for number in numbers):
            self.fail("layers and experts must be whole numbers")
        layer, ids = numbers[0], numbers[1:]
        if not 0 <= layer < self.depth:
            self.fail(f"layer {layer} is named, the header says {self.depth}", "is this the log of another model?")
        if len(ids) != self.top_k:
            self.fail(
                f"layer {layer} has {len(ids)} experts, the header says top {self.top_k}", "is this another model's log?"
            )
        if not all(0 <= expert < self.experts for expert in ids):
            self.fail(f"layer {layer} names an expert outside 0..{self.experts - 1}", "is this the log of another model?")
        if len(set(ids)) < len(ids):
            self.fail(f"layer {layer} names an expert twice")
        return layer, ids

    def checked(self, step: list[Layer]) -> list[Layer]:
        """The step, if its layers are those of the first one."""
        found = [layer for layer, _ in step]
        if self._layers is None:
            if any(a >= b for a, b in pairwise(found)):
                self.fail("layers do not ascend", "sort a step's layers")
            if self.routed and len(found) != self.routed:
                self.fail(f"the first step has {len(found)} layers, the header says {self.routed}")
            self._layers = found
        elif found != self._layers:
            self.fail(f"a step has layers {_short(found)}, the first one {_short(self._layers)}", "was the log cut off?")
        return step


def _short(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) if len(layers) < 8 else f"{layers[0]}..{layers[-1]} ({len(layers)})"
