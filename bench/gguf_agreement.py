"""Does llama.cpp compute from a GGUF file what our engine computes from the same file? Tokens, logits, perplexity.

    .venv/bin/python -m bench.gguf_agreement [--json]                      # the demo model in --types; needs `make peers`
    .venv/bin/python -m bench.gguf_agreement --file SmolLM2-135M-Instruct.Q4_1.gguf
    .venv/bin/python -m bench.gguf_agreement --random                      # random weights in --types

Both are fed the same ids of TEXT (this repository's README); random weights are fed random ids. llama.cpp is fed twice, all
tokens at once and one by one: how far it agrees with itself is the yardstick. Ends with 1 where a bound is broken.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from bench.quantisations import UNIFORM, UnevenWeights, write_store
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.losses import FormatChoice
from elmoe.llm import Model, load
from elmoe.measure.perplexity import TeacherForcing
from elmoe.models import spec_of_config
from elmoe.store import open_store
from elmoe.terminal import number, print_table

SOURCE = Path(__file__).with_name("llama_logits.cpp")
TRAINED, RANDOM = "q8_0,q4_0,q4_1,mxfp4", "q8_0,q4_k,q6_k,iq4_xs"
PERPLEXITY_BOUND = 0.005
"""Of the ratio of perplexities less 1, on trained weights."""
ERROR_BOUND = 2.0
"""Of a type's relative error of logits over that of Q8_0, on random weights."""
SHAPES = {
    "model_type": "qwen3_moe", "vocab_size": 512, "hidden_size": 512, "intermediate_size": 512, "moe_intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 4,
    "num_experts_per_tok": 4, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
"""Of random weights. Every expert is chosen: a choice that tips over would hide what is compared."""
SWAPPED_TENSOR = "blk.1.ffn_down_exps.weight"


class Llama:
    """llama.cpp's logits program on a file."""

    def __init__(self, program: Path, peers: Path) -> None:
        self._program = program
        if not program.exists():
            source, libraries = peers / "source/vendor/llama.cpp", peers / "build"
            names = ("src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a")
            command = ["g++", "-O2", "-std=c++17", f"-I{source}/include", f"-I{source}/ggml/include", str(SOURCE)]
            command += [str(libraries / name) for name in names]
            program.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, "-fopenmp", "-lpthread", "-ldl", "-o", str(program)], check=True)

    def logits(self, file: Path, ids: NDArray[np.int32], text: Path) -> tuple[NDArray[np.float32], list[int]]:
        """(2, tokens, vocabulary) logits, of ``ids`` fed at once and one by one, and the ids of the text."""
        with tempfile.NamedTemporaryFile() as out:
            done = subprocess.run(
                [str(self._program), str(file), str(text), out.name], input="\n".join(map(str, ids)),
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
            )  # fmt: skip
            return np.fromfile(out.name, np.float32).reshape(2, len(ids), -1), [int(line) for line in done.stdout.split()]


def our_logits(model: Model, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits (tokens, vocabulary) behind every token, float32."""
    return np.concatenate(list(TeacherForcing(model, len(ids)).logits(ids)))


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def relative_error(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Root of the mean square of what differs, over that of the other's logits around their mean."""
    wide = other.astype(np.float64)
    spread = wide - wide.mean(axis=1, keepdims=True)
    return float(np.sqrt(((one - wide) ** 2).mean() / (spread**2).mean()))


def compare(one: NDArray[np.float32], other: NDArray[np.float32]) -> dict[str, float]:
    """How far two sets of logits agree: share of equal most likely tokens, Kullback-Leibler divergence in nats, error."""
    a, b = log_probabilities(one), log_probabilities(other)
    return {
        "same_most_likely": float((one.argmax(axis=1) == other.argmax(axis=1)).mean()),
        "mean_divergence": float((np.exp(a) * (a - b)).sum(axis=1).mean()),
        "largest_logit_difference": float(np.abs(one - other).max()),
        "relative_error": relative_error(one, other),
    }


def perplexity(logits: NDArray[np.float32], ids: NDArray[np.int32]) -> float:
    return float(np.exp(-log_probabilities(logits[:-1])[np.arange(len(ids) - 1), ids[1:]].mean()))


def agreement(llama: Llama, file: Path, text: Path, tokens: int) -> dict[str, Any]:
    """A file of trained weights, read by both."""
    with tempfile.TemporaryDirectory() as folder, load(file, store_dir=folder) as model:
        all_ids = model.encode(text.read_text(encoding="utf-8"))
        ids = np.array(all_ids[:tokens], np.int32)
        ours = our_logits(model, ids)
    (together, single), words = llama.logits(file, ids, text)
    found = {"ours": perplexity(ours, ids), "llama.cpp": perplexity(together, ids)}
    return {
        "file": file.name, "tokens": len(ids), "same_tokenization": words == list(all_ids), "perplexity": found,
        "ours_and_llamacpp": compare(ours, together), "llamacpp_and_itself": compare(single, together),
        "met": abs(found["ours"] / found["llama.cpp"] - 1) <= PERPLEXITY_BOUND,
    }  # fmt: skip


def as_type(store: str, kind: str, folder: Path) -> Path:
    """A model's store as a file whose matrices all have a type, quantised anew from Q8_0."""
    first, file = folder / "q8_0.gguf", folder / f"{kind}.gguf"
    if not first.exists():
        with open_store(store) as reader:
            export_store(reader, first)
    if not file.exists():
        convert_checkpoint(first, folder / kind, choice=FormatChoice(UNIFORM[kind], UNIFORM[kind]))
        with open_store(folder / kind) as reader:
            export_store(reader, file)
    return file


def in_floats(file: Path, out: Path) -> None:
    """A copy of a file whose matrices are the same values as F32, by the gguf package."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, one in reader.fields.items():
        if not name.startswith("GGUF.") and name not in ("general.architecture", "general.file_type"):
            inner = one.types[-1] if one.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, one.contents(), one.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _neighbours(first: int, size: int = 1) -> Callable[[NDArray[np.uint8]], None]:
    """Swap two fields of ``size`` bytes that lie side by side in every block."""

    def swap(blocks: NDArray[np.uint8]) -> None:
        one, other = slice(first, first + size), slice(first + size, first + 2 * size)
        blocks[:, one], blocks[:, other] = blocks[:, other].copy(), blocks[:, one].copy()

    return swap


def _pairs(first: int, size: int) -> Callable[[NDArray[np.uint8]], None]:
    """Swap a field of ``size`` bytes between every two blocks."""

    def swap(blocks: NDArray[np.uint8]) -> None:
        fields = blocks[: len(blocks) // 2 * 2].reshape(-1, 2, blocks.shape[1])[:, :, first : first + size]
        fields[:] = fields[:, ::-1].copy()

    return swap


def _nibbles(at: int) -> Callable[[NDArray[np.uint8]], None]:
    def swap(blocks: NDArray[np.uint8]) -> None:
        blocks[:, at] = blocks[:, at] >> 4 | blocks[:, at] << 4

    return swap


SWAPS: dict[str, dict[str, Callable[[NDArray[np.uint8]], None]]] = {
    "q8_0": {"scales": _pairs(0, 2)},
    "q4_0": {"scales": _pairs(0, 2)},
    "q4_1": {"scales": _pairs(0, 2), "minima": _pairs(2, 2)},
    "q4_k": {"scales": _pairs(0, 2), "minima": _pairs(2, 2), "sub-scales": _neighbours(4), "sub-minima": _neighbours(8)},
    "q6_k": {"scales": _pairs(208, 2), "sub-scales": _neighbours(192)},
    "iq4_nl": {"scales": _pairs(0, 2)},
    "iq4_xs": {"scales": _pairs(0, 2), "sub-scales": _nibbles(4)},
    "mxfp4": {"scales": _pairs(0, 1)},
}
"""What must show: fields of blocks that are swapped in one tensor."""


def swapped(file: Path, out: Path, swap: Callable[[NDArray[np.uint8]], None]) -> None:
    """A copy of a file with two fields swapped in all blocks of ``SWAPPED_TENSOR``."""
    (tensor,) = (one for one in gguf.GGUFReader(file).tensors if one.name == SWAPPED_TENSOR)
    data = np.fromfile(file, np.uint8)
    blocks = data[tensor.data_offset : tensor.data_offset + tensor.n_bytes]
    swap(blocks.reshape(-1, gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]))
    data.tofile(out)


def random_weights(llama: Llama, kinds: list[str], tokens: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Random weights of several types, Q8_0 first: ours, llama.cpp's on the same file, and on the same values as F32."""
    spec = spec_of_config(SHAPES)
    rng, text, bound = np.random.default_rng(0), folder / "text", {"llama.cpp": np.inf, "F32": np.inf}
    ids = rng.integers(0, spec.vocabulary, tokens).astype(np.int32)
    text.write_text("text")

    def ours(file: Path) -> NDArray[np.float32]:
        with tempfile.TemporaryDirectory() as cache, load(file, store_dir=cache) as model:
            return our_logits(model, ids)

    for kind in kinds:
        file, floats, changed = (folder / f"{kind}{end}.gguf" for end in ("", "-f32", "-swapped"))
        write_store(folder / kind, spec, kind, UnevenWeights(0))
        with open_store(folder / kind) as reader:
            export_store(reader, file)
        in_floats(file, floats)
        theirs = {name: llama.logits(one, ids, text)[0][0] for name, one in (("llama.cpp", file), ("F32", floats))}
        mine = ours(file)
        errors = {name: relative_error(mine, logits) for name, logits in theirs.items()}
        if kind == "q8_0":
            bound = {name: ERROR_BOUND * error for name, error in errors.items()}
        swaps = {}
        for name, swap in SWAPS[kind].items():
            swapped(file, changed, swap)
            wrong = ours(changed)
            swaps[name] = {other: relative_error(wrong, logits) for other, logits in theirs.items()}
        yield {
            "type": kind, "tokens": tokens, "relative_error": errors, "bound": bound,
            "llamacpp_over_f32": relative_error(theirs["llama.cpp"], theirs["F32"]), "swapped": swaps,
            "met": {name: errors[name] <= bound[name] for name in errors},
            "swaps_found": {name: all(found[name] > bound[name] for found in swaps.values()) for name in errors},
        }  # fmt: skip


def show_trained(rows: list[dict[str, Any]]) -> None:
    print_table(
        f"perplexity within {PERPLEXITY_BOUND:.1%}",
        ("file", "tokens", "same tokenization", "perplexity", "llama.cpp's", "ratio", "same most likely token",
         "llama.cpp and itself", "divergence, nats", "itself", "met"),
        [
            (r["file"], r["tokens"], "yes" if r["same_tokenization"] else "NO", f"{r['perplexity']['ours']:.4f}",
             f"{r['perplexity']['llama.cpp']:.4f}", f"{r['perplexity']['ours'] / r['perplexity']['llama.cpp']:.5f}",
             *(f"{r[pair]['same_most_likely']:.2%}" for pair in ("ours_and_llamacpp", "llamacpp_and_itself")),
             *(f"{r[pair]['mean_divergence']:.1e}" for pair in ("ours_and_llamacpp", "llamacpp_and_itself")),
             "yes" if r["met"] else "NO")
            for r in rows
        ],
    )  # fmt: skip


def show_random(rows: list[dict[str, Any]]) -> None:
    for name in ("llama.cpp", "F32"):
        print_table(
            "relative error of our logits against llama.cpp's " + ("of the same file" if name != "F32" else "of F32 values"),
            ("type", "error", "over Q8_0's", "met", "llama.cpp over F32", "least error of a swap", "swaps found"),
            [
                (r["type"], f"{r['relative_error'][name]:.5f}",
                 number(ERROR_BOUND * r["relative_error"][name] / r["bound"][name]), "yes" if r["met"][name] else "NO",
                 f"{r['llamacpp_over_f32']:.5f}", f"{min(found[name] for found in r['swapped'].values()):.5f}",
                 "yes" if r["swaps_found"][name] else "NO")
                for r in rows
            ],
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a GGUF file of trained weights, as it is")
    parser.add_argument("--store", default="demo", help="trained weights that become files of --types")
    parser.add_argument("--random", action="store_true", help="random weights; Q8_0 comes first")
    parser.add_argument("--types", help=f"of {', '.join(UNIFORM)} [default: {TRAINED}; --random: {RANDOM}]")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--text", type=Path, default=Path(__file__).resolve().parent.parent / "README.md")
    parser.add_argument("--peers", type=Path, default=Path("build/peers"), help="folder of `make peers`")
    parser.add_argument("--program", type=Path, default=Path("build/llama_logits"), help="compiled unless it is there")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    llama = Llama(arguments.program, arguments.peers)
    kinds = (arguments.types or (RANDOM if arguments.random else TRAINED)).split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.random:
            rows = list(random_weights(llama, kinds, min(arguments.tokens, 256), folder))
        else:
            files = [arguments.file] if arguments.file else [as_type(arguments.store, kind, folder) for kind in kinds]
            rows = [agreement(llama, file, arguments.text, arguments.tokens) for file in files]
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        (show_random if arguments.random else show_trained)(rows)
    met = [row["met"]["F32"] and row["swaps_found"]["F32"] if arguments.random else row["met"] for row in rows]
    sys.exit(0 if all(met) else 1)


if __name__ == "__main__":
    main()
