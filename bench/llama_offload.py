"""llama.cpp's own bench program on a GGUF of the same shapes, in a child memory cgroup of the same size as our budget.

Its weights are random, and so would be its routing: the router's rows are scaled so that half of the experts take the same
share of the routing as in the recorded traces (``SKEW``); consecutive tokens stay uncorrelated. The prompt is 4 tokens, and
4 are decoded per sequence: under a limit each takes seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from elmoe.errors import ElmoeError
from elmoe.files import whole_file

HIDDEN, WIDTH, EXPERTS, TOP_K, HEADS, VOCABULARY = 2048, 1024, 64, 8, 16, 50304
SKEW = 0.65
"""Router row e has standard deviation exp(SKEW * q), q from 1 down to -1: the upper half takes 77 % of the routing."""
TOKENS, TIMEOUT = 4, 900


def add_rows(
    rows: list[dict[str, Any]], folder: Path, layers: int, budgets: list[int | float], batches: list[int], programs: Path,
    bandwidth: float | None = None,
) -> str:  # fmt: skip
    """Measure llama.cpp at each budget, add its rows and elastic's ratio to them; returns what was done, or why not.

    :param bandwidth: throttle of its reads, bytes per second.
    """
    program = programs / "llama-batched-bench"
    if not program.exists():
        return "not built: run `make peers`"
    try:
        import gguf  # noqa: F401
    except ImportError:
        return "the package gguf is missing: run `make peers`"
    model = folder / f"olmoe-{layers}.gguf"
    if not model.exists():
        with whole_file(model, ElmoeError) as partial:
            write_gguf(partial, layers)
    done = "llama-batched-bench in a child memory cgroup" + (", reads throttled in a block I/O cgroup" if bandwidth else "")
    for budget in budgets:
        try:
            rates = run(program, model, int(budget), batches, bandwidth)
        except (OSError, subprocess.SubprocessError) as error:
            done = f"llama.cpp failed under a limit of {budget} bytes: {error}"
            continue
        for batch, rate in rates.items():
            rows.append(
                {"system": "llama.cpp", "batch": batch, "budget": budget, "tokens_per_second": rate, "identical": None}
                | dict.fromkeys(("acceptance_rate", "tokens_per_verification", "msb_hit_rate", "lsb_hit_rate", "slices",
                                 "waited_share", "byte_ceiling_tokens_per_second", "resident_tokens_per_second", "over_lru"))
            )  # fmt: skip
            for row in rows:
                if (row["batch"], row["budget"]) == (batch, budget) and row["system"] == "elastic":
                    row["over_llamacpp"] = row["tokens_per_second"] / rate
    for row in rows:
        if row["system"] == "llama.cpp":
            cell = (row["batch"], row["budget"])
            naive = next(r for r in rows if r["system"] == "naive" and (r["batch"], r["budget"]) == cell)
            row["over_naive"] = row["tokens_per_second"] / naive["tokens_per_second"]
    return done


def run(program: Path, model: Path, limit: int, batches: list[int], bandwidth: float | None) -> dict[int, float]:
    """Decoded tokens per second by batch size, under a memory limit of ``limit`` bytes, at ``bandwidth`` bytes read per
    second at most."""
    rates: dict[int, float] = {}
    for batch in batches:
        evict(model)
        command = [
            str(program), "-m", str(model), "-t", "2", "-c", "1024", "-npp", "4", "-ntg", str(TOKENS), "-npl", str(batch),
            "--no-repack", "--output-format", "jsonl",
        ]  # fmt: skip
        with limits(limit, model, bandwidth) as enter:
            done = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=TIMEOUT, preexec_fn=enter
            )
        for line in done.stdout.splitlines():
            if line.startswith("{") and "speed_tg" in line:
                rates[batch] = float(json.loads(line)["speed_tg"])
        if batch not in rates:
            raise OSError(f"no result at batch {batch} (exit code {done.returncode})")
        print(f"llama.cpp, {limit / 2**30:g} GiB, batch {batch}: {rates[batch]:.2f} tokens/s", file=sys.stderr)
    return rates


@contextmanager
def limits(memory: int, model: Path, bandwidth: float | None) -> Iterator[Callable[[], None]]:
    """Child cgroups (version 1 or 2) that limit memory to so many bytes and, unless ``bandwidth`` is None, the reads of the
    model's disk to so many bytes per second; yields a function by which a new process enters them."""
    own = {fields[1]: fields[2] for fields in (line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().split())}
    old = "memory" in own
    # Controller of version 1 or nothing, file, value
    settings = [("memory", "memory.limit_in_bytes", str(memory)) if old else ("", "memory.max", str(memory))]
    if bandwidth is not None:
        device, rate = os.stat(model).st_dev, int(bandwidth)
        disk = f"{os.major(device)}:{os.minor(device)}"
        settings.append(
            ("blkio", "blkio.throttle.read_bps_device", f"{disk} {rate}") if old else ("", "io.max", f"{disk} rbps={rate}")
        )
    groups = {
        controller: Path("/sys/fs/cgroup", controller, own.get(controller, "/").lstrip("/"), f"elmoe_bench_{os.getpid()}")
        for controller, _, _ in settings
    }
    made: list[Path] = []
    try:
        for group in groups.values():
            group.mkdir()
            made.append(group)
        for controller, name, value in settings:
            (groups[controller] / name).write_text(value)
        entrances = [str(group / "cgroup.procs") for group in made]

        def enter() -> None:
            for entrance in entrances:
                with open(entrance, "w") as file:
                    file.write("0")

        yield enter
    finally:
        for group in made:
            if (group / "memory.force_empty").exists():
                (group / "memory.force_empty").write_text("0")
            group.rmdir()


def evict(path: Path) -> None:
    """Drop a file's pages: they stay charged to whoever read it before, and as small as they were read or written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)  # what is not on disk yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)


def write_gguf(path: Path, layers: int) -> None:
    """A Q8_0 GGUF of OLMoE-1B-7B's shapes with random weights, written tensor by tensor."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_block_count(layers)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(TOP_K)
    writer.add_vocab_size(VOCABULARY)
    # GPT-2's letters for the 256 bytes: printable Latin-1 stands for itself, the rest follow from 256 on.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(c) for c in (*printable, *range(256, 512 - len(printable)))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters + [f"<t{i}>" for i in range(len(letters), VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(VOCABULARY - 1)
    writer.add_eos_token_id(VOCABULARY - 2)

    def shapes() -> Iterator[tuple[str, tuple[int, ...] | np.ndarray]]:
        yield "token_embd.weight", (VOCABULARY, HIDDEN)
        yield "output.weight", (VOCABULARY, HIDDEN)
        yield "output_norm.weight", np.ones(HIDDEN, np.float32)
        for layer in range(layers):
            name = f"blk.{layer}."
            for norm in ("attn_norm", "ffn_norm", "attn_q_norm", "attn_k_norm"):
                yield f"{name}{norm}.weight", np.ones(HIDDEN, np.float32)
            for projection in ("attn_q", "attn_k", "attn_v", "attn_output"):
                yield f"{name}{projection}.weight", (HIDDEN, HIDDEN)
            skew = np.exp(SKEW * rng.permutation(np.linspace(1, -1, EXPERTS)))[:, None]
            yield f"{name}ffn_gate_inp.weight", (rng.standard_normal((EXPERTS, HIDDEN)) * skew / 45).astype(np.float32)
            yield f"{name}ffn_gate_exps.weight", (EXPERTS, WIDTH, HIDDEN)
            yield f"{name}ffn_up_exps.weight", (EXPERTS, WIDTH, HIDDEN)
            yield f"{name}ffn_down_exps.weight", (EXPERTS, HIDDEN, WIDTH)

    def blocks(shape: tuple[int, ...]) -> np.ndarray:
        data = np.frombuffer(rng.bytes(int(np.prod(shape)) // 32 * 34), np.uint8).reshape(-1, 34).copy()
        data[:, :2] = np.frombuffer(np.float16(0.02 / 73).tobytes(), np.uint8)
        return data.reshape(*shape[:-1], -1)

    described = list(shapes())
    for name, what in described:
        if isinstance(what, tuple):
            packed = (*what[:-1], what[-1] // 32 * 34)
            writer.add_tensor_info(name, packed, np.dtype(np.uint8), int(np.prod(packed)), gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor_info(name, what.shape, what.dtype, what.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, what in described:
        writer.write_tensor_data(blocks(what) if isinstance(what, tuple) else what)
    writer.close()
