"""Freeze what llama.cpp writes and reads: blocks of each type by its `llama-quantize`, and its own float32 values of them.

    .venv/bin/python -m tools.golden.make_llama_cpp_blocks build/peers/bin/llama-quantize

Weights are uneven from group to group; some are all zero, tiny or large.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from tests.unit.test_gguf import gguf_shapes, wide_config, write_gguf
from tests.unit.test_gguf_formats import WIDE, WIDE_METADATA

from elmoe.convert.gguf_blocks import EXACT

TARGET = Path(__file__).resolve().parents[2] / "tests" / "golden" / "llama_cpp_blocks.npz"
ROWS, TENSOR = 24, "blk.0.ffn_down_exps.weight"
NAMES = {"Q4_K": "Q4_K_S", "MXFP4": "MXFP4_MOE"}
"""What `llama-quantize` calls a file of a type, where it is not the type's name."""


def weights(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Gaussian, with another spread and mean in each group of 16; among the groups of 32 zeros and extremes."""
    groups = rng.standard_normal((*shape[:-1], shape[-1] // 16, 16))
    spread, mean = (rng.normal(0, scale, (*groups.shape[:-1], 1)) for scale in (1.0, 0.5))
    values = ((groups + mean) * np.exp(spread) * 0.05).reshape(*shape[:-1], -1, 32)
    values *= rng.choice([0.0, 1e-6, 1.0, 300.0], (*values.shape[:-1], 1), p=[0.05, 0.05, 0.85, 0.05])
    return values.reshape(shape).astype(np.float32)


def tensor_of(path: Path) -> gguf.ReaderTensor:
    """The tensor that is frozen."""
    return next(one for one in gguf.GGUFReader(path).tensors if one.name == TENSOR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="llama-quantize")
    program = parser.parse_args().program
    rng, frozen = np.random.default_rng(27), {}
    parts = {
        name: (TensorType.F32, rng.standard_normal(shape, np.float32) if plain else weights(shape, rng))
        for name, (shape, plain) in gguf_shapes(wide_config(**WIDE)).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        source, packed, back = (Path(folder) / f"{name}.gguf" for name in ("source", "packed", "back"))
        write_gguf(source, parts, metadata=WIDE_METADATA)
        for kind in EXACT:
            # No --pure: it makes all tensors, and so the experts, of the file's nominal type, which MXFP4_MOE forbids.
            flags = [] if kind == TensorType.MXFP4 else ["--pure"]
            command = [program, *flags, source, packed, NAMES.get(kind.name, kind.name)]
            subprocess.run(command, check=True, capture_output=True)
            subprocess.run([program, "--allow-requantize", packed, back, "F32"], check=True, capture_output=True)
            blocks, values = tensor_of(packed), tensor_of(back)
            if blocks.tensor_type != kind:
                raise SystemExit(f"llama-quantize gave {blocks.tensor_type.name} for {kind.name}")
            frozen[f"{kind.name} blocks"] = blocks.data[0, :ROWS].copy()  # the file is written anew
            frozen[f"{kind.name} values"] = values.data[0, :ROWS].copy()
    np.savez_compressed(TARGET, **frozen)
    print(f"wrote {TARGET.name}, {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
