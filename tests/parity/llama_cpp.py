"""Does llama.cpp compute every family's GGUF file as our engine does? Tiny models of random weights in Q8_0.

    .venv/bin/python -m tests.parity.llama_cpp [--json]      # needs `make peers`

The yardstick is llama.cpp's own error: its logits of the Q8_0 file against those of the same values in F32. Ends with 1
where ours is more than twice as large.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench.gguf_agreement import ERROR_BOUND, Llama, in_floats, our_logits, relative_error
from bench.quantisations import UnevenWeights, write_store
from numpy.typing import NDArray

from elmoe.convert.gguf_export import export_store
from elmoe.llm import load
from elmoe.models import spec_of_config
from elmoe.store import open_store
from elmoe.terminal import print_table
from tests.family_configs import CONFIGS
from tests.unit.test_served_families import NOT_IN_GGUF

OTHERWISE: dict[str, dict[str, Any]] = {
    "llama_biases_yarn": {"beta_fast": 32.0, "beta_slow": 1.0},  # whatever the file says
    "gpt_oss": {"truncate": True},
}
"""What of a rope scaling llama.cpp takes otherwise than the file, or the published model, says. Ours is told the same."""

ONE_QUERY_LAYERS = 27
"""Layers by which llama.cpp tells a ``deepseek2`` file whose queries are one matrix."""


def _told_by_layers(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with as many layers as llama.cpp needs."""
    if "kv_lora_rank" not in config or config["q_lora_rank"] is not None:
        return config
    kinds = config.get("mlp_layer_types")
    more = {} if kinds is None else {"mlp_layer_types": kinds + ["sparse"] * (ONE_QUERY_LAYERS - len(kinds))}
    return config | {"num_hidden_layers": ONE_QUERY_LAYERS} | more


def compared(llama: Llama, tokens: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Tiny models of random weights of every configuration in the tests that GGUF can say."""
    rng, text = np.random.default_rng(0), folder / "text"
    text.write_text("text")
    for name, config in CONFIGS.items():
        if name in NOT_IN_GGUF:
            continue
        config = _told_by_layers(config)
        file, floats = (folder / f"{name}{end}.gguf" for end in ("", "-f32"))
        write_store(folder / name, spec_of_config(config), "q8_0", UnevenWeights(0))
        with open_store(folder / name) as reader:
            export_store(reader, file)
        in_floats(file, floats)
        ids = rng.integers(1, config["vocab_size"], tokens).astype(np.int32)
        told = config | ({"rope_scaling": config["rope_scaling"] | OTHERWISE[name]} if name in OTHERWISE else {})
        write_store(folder / f"{name}-told", spec_of_config(told), "q8_0", UnevenWeights(0))
        with load(folder / f"{name}-told") as model:
            mine = our_logits(model, ids)
        theirs, exact = (llama.logits(one, ids, text)[0][0] for one in (file, floats))
        errors = {who: typical_error(logits, exact) for who, logits in (("ours", mine), ("llama.cpp", theirs))}
        yield {
            "model": name, "tokens": tokens, "told_otherwise": OTHERWISE.get(name), "relative_error": errors,
            "same_most_likely": {
                who: float((logits.argmax(axis=1) == exact.argmax(axis=1)).mean())
                for who, logits in (("ours", mine), ("llama.cpp", theirs))
            },
            "met": errors["ours"] <= ERROR_BOUND * errors["llama.cpp"],
        }  # fmt: skip


def typical_error(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """The median of the positions' relative errors: where a choice of experts tips over, a position says nothing."""
    return float(np.median([relative_error(one[at : at + 1], other[at : at + 1]) for at in range(len(one))]))


def show(rows: list[dict[str, Any]]) -> None:
    print_table(
        f"error of logits against llama.cpp's of F32 values, median of positions; ours at most {ERROR_BOUND:g}x llama.cpp's",
        ("model", "ours", "llama.cpp of Q8_0", "same most likely token", "llama.cpp of Q8_0", "met"),
        [
            (r["model"], *(f"{r['relative_error'][who]:.5f}" for who in ("ours", "llama.cpp")),
             *(f"{r['same_most_likely'][who]:.1%}" for who in ("ours", "llama.cpp")), "yes" if r["met"] else "NO")
            for r in rows
        ],
    )  # fmt: skip


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder of `make peers`")
    parser.add_argument("--program", type=Path, default=Path("build/llama_logits"), help="compiled unless it is there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(compared(Llama(arguments.program, arguments.peers), arguments.tokens, Path(folder)))
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)
    return 0 if all(row["met"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
