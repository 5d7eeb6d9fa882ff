"""Does llama.cpp compute from an exported GGUF what our engine computes from the store? Tokens, logits, perplexity.

    .venv/bin/python -m bench.gguf_agreement [--store demo] [--json]        # needs `make peers`

Both are fed the same ids of TEXT (this repository's README). llama.cpp is fed twice, all tokens at once and one by one: how
far it agrees with itself is the yardstick.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from elmoe.convert.gguf_export import export_store
from elmoe.llm import Model, load
from elmoe.measure.perplexity import TeacherForcing
from elmoe.terminal import print_table

SOURCE = Path(__file__).with_name("llama_logits.cpp")


def build(peers: Path) -> Path:
    """Compile the logits program against the libraries that `make peers` left."""
    program, source, libraries = peers / "bin" / "llama_logits", peers / "source/vendor/llama.cpp", peers / "build"
    if not program.exists():
        names = ("src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a")
        command = ["g++", "-O2", "-std=c++17", f"-I{source}/include", f"-I{source}/ggml/include", str(SOURCE)]
        command += [str(libraries / name) for name in names]
        subprocess.run([*command, "-fopenmp", "-lpthread", "-ldl", "-o", str(program)], check=True)
    return program


def our_logits(model: Model, ids: np.ndarray) -> np.ndarray:
    """Logits (tokens, vocabulary) behind every token, float32."""
    return np.concatenate(list(TeacherForcing(model, len(ids)).logits(ids)))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compare(one: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """How far two sets of logits agree: share of equal most likely tokens, and Kullback-Leibler divergence in nats."""
    a, b = log_probabilities(one), log_probabilities(other)
    return {
        "same_most_likely": float((one.argmax(axis=1) == other.argmax(axis=1)).mean()),
        "mean_divergence": float((np.exp(a) * (a - b)).sum(axis=1).mean()),
        "largest_logit_difference": float(np.abs(one - other).max()),
    }


def perplexity(logits: np.ndarray, ids: np.ndarray) -> float:
    return float(np.exp(-log_probabilities(logits[:-1])[np.arange(len(ids) - 1), ids[1:]].mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", default="demo")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--text", type=Path, default=Path(__file__).resolve().parent.parent / "README.md")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder of `make peers`")
    parser.add_argument("--program", type=Path, help="llama_logits, if it is built elsewhere")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    program = arguments.program or build(arguments.peers)
    with tempfile.TemporaryDirectory() as folder, load(arguments.store) as model:
        gguf, out = Path(folder) / "model.gguf", Path(folder) / "logits"
        export_store(model.reader, gguf)
        all_ids = model.encode(arguments.text.read_text(encoding="utf-8"))
        ids = np.array(all_ids[: arguments.tokens], np.int32)
        done = subprocess.run(
            [str(program), str(gguf), str(arguments.text), str(out)], input="\n".join(map(str, ids)),
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
        )  # fmt: skip
        together, single = np.fromfile(out, np.float32).reshape(2, len(ids), model.reader.spec.vocabulary)
        ours = our_logits(model, ids)
    data: dict[str, Any] = {
        "tokens": len(ids),
        "same_tokenization": [int(line) for line in done.stdout.split()] == list(all_ids),
        "perplexity": {name: perplexity(x, ids) for name, x in (("ours", ours), ("llama.cpp", together))},
        "ours_and_llamacpp": compare(ours, together),
        "llamacpp_and_itself": compare(single, together),
    }
    if arguments.json:
        print(json.dumps(data, indent=1))
        return
    print_table(
        f"{len(ids)} tokens; same tokenization: {'yes' if data['same_tokenization'] else 'NO'}; perplexity "
        f"{data['perplexity']['ours']:.4f} (ours), {data['perplexity']['llama.cpp']:.4f} (llama.cpp)",
        ("pair", "same most likely token", "mean divergence, nats", "largest difference of logits"),
        [
            (pair.replace("_", " "), f"{row['same_most_likely']:.2%}", f"{row['mean_divergence']:.2e}",
             f"{row['largest_logit_difference']:.3f}")
            for pair, row in data.items() if pair.endswith(("llamacpp", "itself"))
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
