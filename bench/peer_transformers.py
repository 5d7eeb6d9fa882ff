"""transformers on a GGUF (bfloat16, 2 threads), kept loaded by a child process so that its runs can alternate with ours.

As a program it answers lines on stdin, ``decode N`` or ``prefill N``, with tokens per second.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

from bench.peer_llama import PeerError


class Transformers:
    """The parent's side: a context manager; PeerError with a reason where it cannot run."""

    def __init__(self, model: Path) -> None:
        for package in ("torch", "transformers", "gguf"):
            if find_spec(package) is None:
                raise PeerError(f"{package} is not installed: run `make .venv/.parity`")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.peer_transformers", str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._answer("load 0")

    def __enter__(self) -> Transformers:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def _answer(self, line: str) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            for answer in self._process.stdout:
                if answer.startswith("rate "):
                    return float(answer.split()[1])
        except BrokenPipeError:
            pass
        _, complaint = self._process.communicate()
        raise PeerError(f"transformers: {(complaint.strip().splitlines() or ['it ended'])[-1][:200]}")

    def decode(self, tokens: int) -> float:
        """Tokens per second of greedy decoding at batch 1 behind a prompt of 4."""
        return self._answer(f"decode {tokens}")

    def prefill(self, tokens: int) -> float:
        """Tokens per second of one forward pass over a prompt."""
        return self._answer(f"prefill {tokens}")


def serve(path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from elmoe.convert.gguf_import import GgufSource
    from elmoe.models.spec import GroupedAttention

    spec = GgufSource(path).spec  # transformers does not find the experts' width in the file by itself
    attention, moe = spec.layers[0].attention, spec.moe(spec.moe_layers[0])
    assert isinstance(attention, GroupedAttention) and attention.rope is not None
    config = Qwen3MoeConfig(
        vocab_size=spec.vocabulary, hidden_size=spec.hidden, intermediate_size=moe.width, moe_intermediate_size=moe.width,
        num_hidden_layers=len(spec.layers), num_attention_heads=attention.heads, num_key_value_heads=attention.kv_heads,
        head_dim=attention.head_dim, num_experts=spec.experts, num_experts_per_tok=spec.top_k, norm_topk_prob=True,
        rms_norm_eps=spec.norm_epsilon, rope_theta=attention.rope.theta, max_position_embeddings=spec.max_positions,
        tie_word_embeddings=spec.tied_embeddings,
    )  # fmt: skip
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, config=config, dtype=torch.bfloat16)
    model.eval()
    vocabulary = spec.vocabulary

    @torch.inference_mode()
    def decode(tokens: int) -> float:
        ids = torch.randint(vocabulary, (1, 4))
        state = model(ids, use_cache=True)
        began = perf_counter()
        for _ in range(tokens):
            ids = torch.randint(vocabulary, (1, 1))
            state = model(ids, past_key_values=state.past_key_values, use_cache=True)
        return tokens / (perf_counter() - began)

    @torch.inference_mode()
    def prefill(tokens: int) -> float:
        ids = torch.randint(vocabulary, (1, tokens))
        began = perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        return tokens / (perf_counter() - began)

    for line in sys.stdin:
        verb, number = line.split()
        rate = {"decode": decode, "prefill": prefill}[verb](int(number)) if verb != "load" else 0.0
        print(f"rate {rate}", flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
