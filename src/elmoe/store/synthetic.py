"""Stores with the shapes of a model and deterministic random weights, written straight to disk for benchmarks."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from elmoe.bitslice import NestedMatrix, QuantizedMatrix, from_sections
from elmoe.bitslice.nested import BLOCK_ROWS, GROUP, GROUP_BYTES, ceil_div
from elmoe.models.formats import Format
from elmoe.models.spec import ModelSpec
from elmoe.models.support import check_supported
from elmoe.models.tensors import PROJECTIONS, FeedForward, Formats, Tensor
from elmoe.store.writer import Progress, StoreWriter

UNIFORM_CODE_DEVIATION = 73.9
"""Standard deviation of codes drawn evenly from -128..127."""


def random_matrix(rng: np.random.Generator, rows: int, columns: int, format: Format) -> QuantizedMatrix:
    """Uniform random codes; one scale, so that an output has about the variance of an input."""
    if format.name != "nested8":
        return _random_packed(rng, rows, columns, format)
    grid = ceil_div(rows, BLOCK_ROWS), ceil_div(columns, GROUP)
    scale = np.float16(1 / (UNIFORM_CODE_DEVIATION * np.sqrt(columns)))
    planes = [np.frombuffer(rng.bytes(grid[0] * grid[1] * GROUP_BYTES), np.uint8) for _ in range(2)]
    hi, lo = (plane.reshape(*grid, GROUP_BYTES) for plane in planes)
    return NestedMatrix(rows, columns, hi, lo, np.full((*grid, BLOCK_ROWS), scale, np.float16))


DEVIATIONS = {"affine4": 4.6, "table4_mx": 5.6, "table4": 66.0, "planes6": 18.5}
"""Standard deviations of a code's integer, drawn evenly, by format or family."""
STEP = 16
"""Every sub-scale."""


def _random_packed(rng: np.random.Generator, rows: int, columns: int, format: Format) -> QuantizedMatrix:
    """As above: random planes, scales and minima that are all the same."""
    deviation = DEVIATIONS.get(format.name) or DEVIATIONS[format.family]
    scale = 1 / (deviation * np.sqrt(columns))
    if format.name == "table4_mx":
        step = int(np.rint(np.log2(scale))) + 128
    else:
        step = STEP
        scale /= STEP if any(section.name == "steps" for section in format.sections) else 1
    sections = {}
    for section in format.sections:
        size = section.bytes_of(rows, columns)
        if section.name in ("hi", "lo"):
            sections[section.name] = np.frombuffer(rng.bytes(size), np.uint8)
        elif section.name == "steps":
            sections[section.name] = np.full(size, step, np.uint8)
        else:
            value = np.float16(scale * (7.5 if section.name == "minima" else 1))
            sections[section.name] = np.full(size // 2, value, np.float16).view(np.uint8)
    return from_sections(format, rows, columns, sections)


def byte_tokenizer(vocabulary: int) -> bytes:
    """A tokenizer.json of single bytes, filled up with tokens that text never yields."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = symbols + [f"<filler {index}>" for index in range(max(0, vocabulary - len(symbols)))]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str().encode()


class RandomWeights:
    """Random contents of a store, each tensor from a generator of its own. See ``store.writer.Weights``."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._matrix: tuple[tuple[str, Format], QuantizedMatrix] | None = None

    def _generator(self, name: str, *key: int) -> np.random.Generator:
        return np.random.Generator(np.random.SFC64([self._seed, crc32(name.encode()), *key]))

    def floats(self, tensor: Tensor) -> NDArray[np.float32]:
        """Ones; a router's rows are Gaussian, so that some experts are hotter than others."""
        if len(tensor.shape) == 1:
            return np.ones(tensor.shape, np.float32)
        values = self._generator(tensor.name).standard_normal(tensor.shape, np.float32)
        return values * np.float32(2 / np.sqrt(tensor.shape[1]))

    def matrix(self, tensor: Tensor, first: int, last: int, format: Format) -> QuantizedMatrix:
        """Rows of a random matrix."""
        name = ".".join([tensor.name, *(part.role for part in tensor.parts)]) if len(tensor.parts) == 1 else tensor.name
        if self._matrix is None or self._matrix[0] != (name, format):
            rows, columns = tensor.shape
            self._matrix = (name, format), random_matrix(self._generator(tensor.name), rows, columns, format)
        return self._matrix[1].row_blocks(first, last)

    def projections(self, part: FeedForward, expert: int, formats: tuple[Format, ...]) -> dict[str, QuantizedMatrix]:
        """A random expert."""
        rng = self._generator(part.name, expert)
        return {
            projection: random_matrix(rng, *part.shape(projection), format)
            for projection, format in zip(PROJECTIONS, formats, strict=True)
        }


def synthesize(
    path: Path, spec: ModelSpec, seed: int = 0, progress: Progress | None = None, formats: Formats | None = None
) -> None:
    """Write a store with random weights; equal spec, seed and formats give equal bytes. ``progress`` takes (done, total)
    tensors and experts.

    :raises ModelError: the engine cannot run such a model. :raises ConvertError: the target exists or the disk has no room.
    """
    check_supported(spec)
    with StoreWriter(
        path, spec, f"random weights, seed {seed}", lambda: f"synthetic {seed} {spec} {formats}", formats
    ) as writer:
        writer.write(RandomWeights(seed), progress)
        writer.finish(byte_tokenizer(spec.vocabulary))
