"""Quantisations by the names of files (``q8_0``, ``q4_k_m``, ``mxfp4`` ...): which formats a store has that holds such a
file bit for bit, and stores of random weights in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice import QuantizedMatrix, quantized
from elmoe.models import spec_of_config
from elmoe.models.formats import FORMATS, Format, joined_formats
from elmoe.models.spec import ModelSpec
from elmoe.models.tensors import PROJECTIONS, FeedForward, Tensor, feed_forward, tensors
from elmoe.store.synthetic import RandomWeights, byte_tokenizer
from elmoe.store.writer import StoreWriter, Weights

UNIFORM = {kind.lower(): name for name, format in FORMATS.items() for kind in format.exact}
"""Name of a type of GGUF -> format that holds it."""
MIXED = "q4_k_m"
NAMES = (MIXED, *UNIFORM)


def formats_of(spec: ModelSpec, name: str) -> dict[str, str]:
    """Store name of every matrix and feed-forward -> format, as in a file of that quantisation."""
    if name not in NAMES:
        raise SystemExit(f"there is no quantisation '{name}': {', '.join(NAMES)}")

    def format(role: str, layer: int | None) -> str:
        return UNIFORM[name] if name != MIXED else _mixed(role, layer, len(spec.layers))

    found = {
        tensor.name: joined_formats([format(part.role, tensor.layer) for part in tensor.parts])
        for tensor in tensors(spec)
        if tensor.kind == "matrix"
    }
    for layer in range(len(spec.layers)):
        one = feed_forward(spec, layer)
        found[one.name] = joined_formats([format(projection, layer) for projection in PROJECTIONS])
    return found


def _mixed(role: str, layer: int | None, layers: int) -> str:
    """What llama.cpp gives a matrix in a Q4_K_M file: Q6_K to the head, and to values and down projections of the first and
    last eighth of the layers and of every third between."""
    more = layer is not None and (layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2)
    return UNIFORM["q6_k" if role == "head" or (more and role in ("value", "down")) else "q4_k"]


class SkewedRouters(RandomWeights):
    """Random weights whose routers favour some experts: row e of a router has the standard deviation ``exp(skew * q)``, q
    from 1 down to -1 in a random order of experts."""

    def __init__(self, seed: int, skew: float) -> None:
        super().__init__(seed)
        self._skew = skew

    def floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """Ones, or a router."""
        if len(tensor.shape) == 1:
            return super().floats(tensor)
        experts, hidden = tensor.shape
        rng = self._generator(tensor.name)
        skew = np.exp(self._skew * rng.permutation(np.linspace(1, -1, experts)))[:, None]
        return (rng.standard_normal((experts, hidden)) * skew / np.sqrt(hidden)).astype(np.float32)


class UnevenWeights(RandomWeights):
    """Gaussian weights, quantised, whose spread and mean differ from group to group: no two scales, minima or sub-scales are
    alike, so that a swap of two of them shows."""

    def matrix(self, tensor: Tensor, first: int, last: int, format: Format) -> QuantizedMatrix:
        """Rows of a matrix."""
        role = tensor.parts[0].role if len(tensor.parts) == 1 else "all"
        return self._uneven(format, tensor.shape, f"{tensor.name} {role}").row_blocks(first, last)

    def projections(self, part: FeedForward, expert: int, formats: tuple[Format, ...]) -> dict[str, QuantizedMatrix]:
        """An expert."""
        return {
            projection: self._uneven(format, part.shape(projection), f"{part.name} {projection}", expert)
            for projection, format in zip(PROJECTIONS, formats, strict=True)
        }

    def _uneven(self, format: Format, shape: tuple[int, ...], name: str, *key: int) -> QuantizedMatrix:
        rng, (rows, columns) = self._generator(name, *key), shape
        groups = rng.standard_normal((rows, columns // 16, 16), np.float32)
        spread = np.exp(rng.normal(0, 0.7, (rows, columns // 16, 1))).astype(np.float32)
        mean = rng.normal(0, 0.5, (rows, columns // 16, 1)).astype(np.float32)
        weights = (groups + mean) * spread * np.float32(0.7 / np.sqrt(columns))
        return quantized(format, weights.reshape(rows, columns), name)


def write_store(path: Path, spec: ModelSpec, name: str, weights: Weights) -> None:
    """A store of a spec in a quantisation, unless it is there."""
    if not path.exists():
        formats = formats_of(spec, name)
        with StoreWriter(path, spec, f"random weights, {name}", lambda: f"bench {name} {spec}", formats) as writer:
            writer.write(weights)
            writer.finish(byte_tokenizer(spec.vocabulary))


def shapes_of(path: Path, **changes: object) -> ModelSpec:
    """The spec of a config.json with some values changed."""
    return spec_of_config(json.loads(path.read_text()) | changes, path.name)
