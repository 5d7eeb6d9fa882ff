"""Commands and snippets of the README and the documentation: what is shown runs, and every option exists."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import elmoe.store
from elmoe.cli.main import VERBS, cli
from elmoe.convert import convert_checkpoint
from elmoe.convert.gguf_export import export_store
from elmoe.store import open_store
from tests.checkpoints import tiny_config, write_checkpoint
from tests.unit.test_dense import LLAMA

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md",
    *sorted(path for path in ROOT.glob("docs/*.md") if path.name not in ("log.md", "cli.md")),
]  # fmt: skip
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
ELSEWHERE = {
    "make ": "test_make_targets_that_are_shown_exist; CI runs check, test and docs",
    ". .venv/bin/activate": "the environment that these tests run in",
    "pip install ": ".ci/try_wheel, and make demo",
    "elmoe demo": "tests/smoke/test_cli.py",
    "elmoe serve": "tests/server",
    "elmoe chat": "tests/server",
    "python -m tests.fuzz.run ": "tests/fuzz",
    ".venv/bin/python -m pytest ": "this very run",
}
"""Beginnings of commands that are not run here, and what runs them."""


def blocks(language: str) -> list[tuple[str, str]]:
    """Name of the document and text of the blocks that are to be run."""
    return [
        (str(path.relative_to(ROOT)), text)
        for path in DOCUMENTS
        for skipped, kind, text in BLOCK.findall(path.read_text())
        if kind == language and not skipped
    ]


def shown_commands() -> list[tuple[str, list[str]]]:
    """Every ``elmoe`` command of a block or of the prose, as words."""
    found = []
    for path in DOCUMENTS:
        text = path.read_text()
        lines = [line for _, kind, block in BLOCK.findall(text) if kind == "bash" for line in block.splitlines()]
        lines += [part for part in re.findall(r"`([^`\n]+)`", text) if re.match(r"elmoe [a-z]", part)]
        for line in lines:
            words = shlex.split(line.split(" > ")[0], comments=True)
            if words[:1] == ["elmoe"]:
                found.append((path.name, words[1:]))
    return found


def unknown(words: list[str]) -> str | None:
    """What of a command does not exist: a verb, a subcommand or an option."""
    context = click.Context(cli)
    command, rest = cli, list(words)
    while isinstance(command, click.Group):
        if not rest or rest[0].startswith("-"):
            break
        name = rest.pop(0)
        if name not in command.list_commands(context):
            return name
        command = command.get_command(context, name)
    options = {option for parameter in command.get_params(context) for option in parameter.opts}
    return next((word for word in rest if word.startswith("--") and word.split("=")[0] not in options), None)


def test_commands_that_do_not_exist_are_noticed():
    assert unknown(["generate", "demo", "--prompt", "x", "--json"]) is None and unknown(["trace", "show", "x"]) is None
    assert unknown(["generat", "demo"]) == "generat" and unknown(["trace", "shw"]) == "shw"
    assert unknown(["generate", "--promt", "x"]) == "--promt"


def test_every_documented_command_and_option_exists():
    commands = shown_commands()
    assert (
        {words[0] for _, words in commands} >= {"generate", "convert", "inspect", "simulate", "doctor", "demo"} <= set(VERBS)
    )
    wrong = [(document, words) for document, words in commands if unknown(words)]
    assert len(commands) > 20 and not wrong


def to_run(name: str) -> list[str]:
    """The commands of a document, in order."""
    lines = [line for document, text in blocks("bash") if document == name for line in text.splitlines() if line.strip()]
    return [line for line in lines if not line.startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """What the documents take as given: a GGUF file with a chat template, its store, a config.json, files of prompts."""
    folder = tmp_path_factory.mktemp("given")
    source = write_checkpoint(folder / "source", LLAMA)
    (source / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[answer]")
    convert_checkpoint(source, folder / "my-store")
    with open_store(folder / "my-store") as reader:
        export_store(reader, folder / "model.gguf")
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    (folder / "prompt.txt").write_text("The whale\n")
    (folder / "prompts.jsonl").write_text('"The whale"\n{"prompt": "The sea"}\n')
    return folder


@pytest.mark.parametrize("name", [name for name in NAMES if to_run(name)])
def test_commands_run_as_written_and_in_order(name, given, tmp_path, monkeypatch):
    commands = to_run(name)
    for path in given.iterdir():
        if path.name != "my-store" or not any("convert" in line for line in commands):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for line in commands:
        words = shlex.split(line, comments=True)
        if words[0] != "elmoe" or "|" in words:
            done = subprocess.run(["bash", "-ec", line], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{line}\n{done.stderr}"
            continue
        words, out = (words[1:-2], Path(words[-1])) if ">" in words else (words[1:], None)
        with monkeypatch.context() as patched:
            if words[0] == "doctor":  # which measures a quarter of it
                patched.setattr(elmoe.store, "available_memory", lambda: 64 << 20)
            ran = CliRunner().invoke(cli, words)
        told = f"{line}\n{ran.output}\n{ran.exception!r}"
        assert ran.exit_code == 0 and ran.exception is None and ran.stdout.strip(), told
        if out is not None:
            out.write_text(ran.stdout)


def test_every_command_is_run_or_run_elsewhere():
    lines = [line for _, text in blocks("bash") for line in text.splitlines() if line.strip()]
    ran = [line for name in NAMES for line in to_run(name)]
    assert len(ran) >= 25 and {line.split()[1] for line in ran if line.startswith("elmoe")} >= {
        "generate", "inspect", "convert", "cache", "doctor", "simulate",
    }  # fmt: skip
    assert all(any(line.startswith(start) for line in lines) for start in ELSEWHERE)


@pytest.mark.parametrize(("document", "text"), blocks("python"), ids=lambda value: value[:20].strip())
def test_python_snippets_run_as_written(document, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(text, document, "exec"), {})
    assert len(shown.getvalue()) > 15


def test_make_targets_that_are_shown_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [path.read_text() for path in (*ROOT.glob("*.md"), *DOCUMENTS)]
    named = {name for text in texts for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert named and named <= targets


def test_benchmarks_say_what_they_measure():
    """Each of `bench` answers `--help`, though argparse chokes on a percent sign in a text."""
    names = [f"bench.{path.stem}" for path in sorted((ROOT / "bench").glob("*.py")) if "__main__" in path.read_text()]
    needs_torch = {"bench.peer_transformers"}
    program = (
        "import runpy, sys\n"
        "for name in sys.argv[1].split():\n"
        "    sys.argv = [name, '--help']\n"
        "    try: runpy.run_module(name, run_name='__main__', alter_sys=False)\n"
        "    except SystemExit as end: assert not end.code, name\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, " ".join(sorted(set(names) - needs_torch))],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(names) - 1 > 10


def test_what_the_study_runs_is_what_the_documents_say():
    """Draft lengths that a form may take, and batch sizes of the headline."""
    from elmoe.sim.grid import Grid
    from elmoe.sim.simulate import DRAFT_LENGTHS

    method = (ROOT / "docs" / "simulator.md").read_text()
    assert f"draft lengths {', '.join(map(str, DRAFT_LENGTHS))} per condition" in " ".join(method.split())
    *first, last = Grid((), (), ()).batches
    told = " ".join((ROOT / "docs" / "performance.md").read_text().split())
    assert f"batch {', '.join(map(str, first))} and {last}," in told
