"""Every example runs on the embedded model as its first lines say, and so do the snippets of the documentation."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.templated import templated_store

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHOWN = {
    "generate": ("ended by", "The sea"),
    "stream": ("The whale", "A prime number is"),
    "chat": ("\n",),
    "offload": ("elastic", "same text: yes"),
    "trace": ("acceptance", "belady", "elmoe3d_8gb"),
    "simulate": ("mine", "elmoe3d_8gb"),
}
SNIPPET = """
import elmoe
model = elmoe.load("demo", fast_memory="4GiB")                    # a store, a GGUF file, a Hugging Face folder
model.generate("The whale", max_tokens=64).text                   # str -> Generation, list[str] -> list[Generation]
for piece in model.stream("The whale"): print(piece.text, end="")
model.chat([{"role": "user", "content": "What is gravity?"}], temperature=0.7, seed=1).text
"""
"""As the design has it, word for word."""


def run(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=300, cwd=folder,
        env=os.environ | {"PYTHONWARNINGS": "error"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr
    return done.stdout


def test_every_example_has_a_test_and_a_line_in_the_list():
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert files == {f"{name}.py" for name in SHOWN} | {"headline.ipynb"}
    listed = re.findall(r"\]\(([^)]+)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(files)


@pytest.mark.parametrize("name", SHOWN)
def test_examples_run_from_any_folder(name, tmp_path):
    text = run(str(EXAMPLES / f"{name}.py"), folder=tmp_path)
    assert all(words in text for words in SHOWN[name]), text
    assert not list(tmp_path.iterdir())


def test_the_chat_example_answers_twice(tmp_path):
    text = run(str(EXAMPLES / "chat.py"), str(templated_store(tmp_path)), "Who are you?", folder=tmp_path)
    assert len(text.strip()) > 20 and text.count("\n") >= 2


def test_the_notebook_runs_and_holds_no_outputs():
    notebook = json.loads((EXAMPLES / "headline.ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 3 and not any(cell["outputs"] for cell in code)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        for cell in code:
            exec(compile("".join(cell["source"]), "headline.ipynb", "exec"), names)
    assert "speed over xPU: the claim of 6.6x" in shown.getvalue() and "elmoe3d_8gb" in shown.getvalue()
    assert len(names["figure"].data) == 3  # type: ignore[attr-defined]


def test_the_snippets_of_the_design_run_as_written():
    lines = SNIPPET.strip().splitlines()
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec("\n".join(lines), names)
        names["model"].close()  # type: ignore[attr-defined]
    assert len(shown.getvalue()) > 20
