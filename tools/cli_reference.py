"""Writes docs/cli.md, the reference of the command line, from the commands themselves.

python -m tools.cli_reference [--check]
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

import click

from elmoe.cli.main import VERBS, cli

PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
HEAD = """# Command line

Written by `python -m tools.cli_reference` from the commands; change the help texts, not this page.

Data goes to standard output, notes and progress to standard error. Every command has `--json`. `STORE` is the path of a
store, or `demo` for the embedded model. Sizes take units: `2GiB`, `800MB`, `1.7GB/s`.

| command | does |
|---|---|
"""


def page() -> str:
    """The page as it should be."""
    lines = [f"| [`elmoe {verb}`](#elmoe-{verb}) | {text} |" for verb, text in VERBS.items()]
    context = click.Context(cli, info_name="elmoe")
    sections = [section for verb in VERBS for section in _sections(cli.get_command(context, verb), f"elmoe {verb}", 2)]
    return HEAD + "\n".join(lines) + "\n\n" + "\n".join(sections)


def _sections(command: click.Command | None, name: str, depth: int) -> Iterator[str]:
    """A command as Markdown, then its subcommands."""
    assert command is not None
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    text = re.sub(r"``", "`", " ".join((command.help or "").split()))
    yield f"{'#' * depth} {name}\n\n```\n{name} {usage}\n```\n\n{fill(text, 124)}\n"
    options = [parameter for parameter in command.get_params(context) if isinstance(parameter, click.Option)]
    rows = [record for option in options if (record := option.get_help_record(context))]
    if rows:
        yield "| option | meaning |\n|---|---|"
        yield "\n".join(f"| `{option.replace('|', chr(92) + '|')}` | {_cell(meaning)} |" for option, meaning in rows) + "\n"
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            yield from _sections(command.get_command(context, sub), f"{name} {sub}", depth + 1)


def _cell(text: str) -> str:
    """Text for a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main() -> None:
    """Write the page, or with ``--check`` compare it."""
    if sys.argv[1:] == ["--check"]:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/cli.md is not what the commands say: python -m tools.cli_reference")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
