"""Commands and snippets of the README and the documentation: what is shown runs, and every option exists."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from elmoe.cli.main import VERBS, cli

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted(path for path in ROOT.glob("docs/*.md") if path.name not in ("log.md", "cli.md"))]
BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?```(bash|python)\n(.*?)```", re.DOTALL)
SKIPPED = ("my-store", "model.gguf", "config.json", "my.yaml", "doctor", "--show-preset", "--timeline")
"""Words of commands that are checked, not run: they need a file of the user, or seconds of measuring."""


def blocks(language: str) -> list[tuple[str, str]]:
    """Name of the document and text of the blocks that are to be run."""
    return [
        (path.name, text)
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


RUN = sorted(
    {
        shlex.join(words)
        for document in ("README.md", "getting-started.md", "larger-than-memory.md")
        for name, text in blocks("bash")
        if name == document
        for line in text.splitlines()
        if (words := shlex.split(line, comments=True))[:1] == ["elmoe"] and not set(words) & set(SKIPPED)
    }
)


@pytest.mark.parametrize("line", RUN)
def test_commands_run_as_written(line, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(line)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_enough_commands_are_run():
    assert len(RUN) >= 4 and any("simulate" in line for line in RUN)


@pytest.mark.parametrize(("document", "text"), blocks("python"), ids=lambda value: value[:20].strip())
def test_python_snippets_run_as_written(document, text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        exec(compile(text, document, "exec"), {})
    assert len(shown.getvalue()) > 20


def test_make_targets_that_are_shown_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [path.read_text() for path in (*ROOT.glob("*.md"), *DOCUMENTS)]
    named = {name for text in texts for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert named and named <= targets
