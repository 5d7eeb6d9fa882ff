"""Would drafts from the upper 3 or 2 bits of 4-bit experts pay? Agreement with the target at equal bytes, trained weights.

    .venv/bin/python -m bench.low_bits [--format affine4_k] [--windows 4] [--json]

The demo model's experts become 4-bit codes, everything else stays as it is. A draft takes the upper bits of the codes of
those experts that the target used most in the window before, with the middle of what the lower bits can add, in NumPy. A
share is of all experts' bytes; fewer bits hold more experts in the same bytes. The text is what the model writes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elmoe.bitslice.formats.affine4 import ZERO_POINT, AffineMatrix
from elmoe.bitslice.matmul import Activations
from elmoe.bitslice.nested import GROUP
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.losses import FormatChoice
from elmoe.llm import load
from elmoe.measure.openings import OPENINGS
from elmoe.measure.perplexity import evaluate
from elmoe.models.formats import FORMATS
from elmoe.store import open_store
from elmoe.terminal import print_table

SHARES, BITS = (1.0, 0.5, 0.25), (4, 3, 2)


@contextmanager
def drafting(bits: int) -> Iterator[None]:
    """Products of 4-bit matrices take the upper bits of codes where they draft."""
    real, step = AffineMatrix.matmul, 1 << 4 - bits

    def matmul(self: AffineMatrix, x: Activations, draft: bool, offset: float) -> NDArray[np.float32]:
        if not draft or bits == 4:
            return real(self, x, draft, offset)
        codes = (self.nibbles & np.uint8(16 - step)).astype(np.float32) + np.float32((step - 1) / 2)
        codes, minima = codes.reshape(len(codes), -1, GROUP), self._minima
        least = self._scales * np.float32(ZERO_POINT) if minima is None else minima
        weights = codes * self._scales[:, :, None] - least[:, :, None]
        values = x.codes.reshape(len(x.codes), -1, GROUP).astype(np.float32) * x.scales[:, :, None]
        return values.reshape(len(values), -1) @ weights.reshape(len(weights), -1).T

    AffineMatrix.matmul = matmul  # type: ignore[method-assign]
    try:
        yield
    finally:
        AffineMatrix.matmul = real  # type: ignore[method-assign]


def written(tokens: int) -> str:
    """What the demo model writes at temperature 0.8."""
    with load("demo") as model:
        return model.generate(OPENINGS[0], max_tokens=tokens, temperature=0.8, seed=1, ignore_eos=True).text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", default="affine4_k", choices=[name for name in FORMATS if name.startswith("affine4")])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    text, (whole,) = written(arguments.window * (arguments.windows + 1)), FORMATS[arguments.format].bits
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_store("demo") as reader:
            export_store(reader, folder / "demo.gguf")
        convert_checkpoint(folder / "demo.gguf", folder / "store", choice=FormatChoice(experts=arguments.format))
        with load(folder / "store", backend="reference") as model:
            for share in SHARES:
                for bits in BITS:
                    experts = min(1.0, share * whole / (whole - 4 + bits))
                    with drafting(bits):
                        found = evaluate(model, text, arguments.window, arguments.windows, experts)
                    rows.append({"bytes": share, "bits": bits, "experts": experts, "agreement": found.agreement,
                                 "draft_perplexity": found.draft, "perplexity": found.target})  # fmt: skip
                    print(rows[-1], file=sys.stderr)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return
    print_table(
        f"drafts from upper bits of {arguments.format}; perplexity of the target {rows[0]['perplexity']:.2f}",
        ("share of bytes", "bits", "experts", "same most likely token", "draft's perplexity"),
        [
            (f"{r['bytes']:.0%}", r["bits"], f"{r['experts']:.0%}", f"{r['agreement']:.1%}", f"{r['draft_perplexity']:.2f}")
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
