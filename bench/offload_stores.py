"""What the offloading benchmarks run on, made once: stores of real shapes with random weights, traces of the demo model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.llama_offload import SKEW
from bench.prompts import prompts_of
from bench.quantisations import SkewedRouters, shapes_of, write_store
from elmoe.convert.gguf_export import export_store
from elmoe.store import open_store
from elmoe.store.synthetic import RandomWeights
from elmoe.units import parse_bytes

SHAPES = Path(__file__).with_name("olmoe_shapes.json")
SHARES = (25, 37, 50, 62, 75, 87, 100)
"""Percent of experts resident while the replayed traces were recorded."""
SEQUENCES, TRACE_TOKENS, PROMPT_TOKENS = 16, 160, 64


def recorded_traces(folder: Path, prompts: Path | None) -> list[Path]:
    """Traces of the demo model with a draft from every position, one for each share of resident experts; made once."""
    text = folder / "prompts.txt"
    if not text.exists():  # the traces that are there were recorded with the text that is there
        text.write_text("\n".join(prompts_of(prompts, SEQUENCES)))
    paths = []
    for share in SHARES:
        path = folder / f"demo-{share}.trace"
        paths.append(path)
        if not path.exists():
            run_elmoe(
                "trace", "record", "demo", str(path), "--prompts", str(text), "--prompt-tokens", str(PROMPT_TOKENS),
                "--max-tokens", str(TRACE_TOKENS), "--batch", str(SEQUENCES), "--every-position",
                "--split", "whole_experts", "--fast-memory", f"{share}%",
            )  # fmt: skip
    return paths


def synthetic_store(folder: Path, layers: int, quantisation: str = "q8_0") -> Path:
    """A store of OLMoE-1B-7B's shapes; made once."""
    store = folder / (f"olmoe-{layers}" if quantisation == "q8_0" else f"olmoe-{layers}-{quantisation}")
    write_store(store, shapes_of(SHAPES, num_hidden_layers=layers), quantisation, RandomWeights(0))
    return store


def skewed_store(folder: Path, layers: int, quantisation: str) -> tuple[Path, Path]:
    """A store of these shapes whose routers are skewed, and the GGUF file of it; made once."""
    store = folder / f"olmoe-{layers}-{quantisation}-skewed"
    # GGUF's qwen3moe rescales the chosen experts' weights
    spec = shapes_of(SHAPES, num_hidden_layers=layers, norm_topk_prob=True)
    write_store(store, spec, quantisation, SkewedRouters(0, SKEW))
    file = store.with_suffix(".gguf")
    if not file.exists():
        with open_store(store) as reader:
            export_store(reader, file)
    return store, file


def parse_budget(text: str, store: Path) -> int:
    """Bytes, or a share of the model's file such as 30%."""
    if not text.endswith("%"):
        return parse_bytes(text)
    with open_store(store) as reader:
        return int(float(text[:-1]) / 100 * sum(file.bytes for file in reader.manifest.files))


def run_elmoe(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "elmoe.cli.main", *arguments], check=True, stdout=sys.stderr)
