"""``elmoe cache``."""

from __future__ import annotations

from pathlib import Path

import click

from elmoe.cli.common import json_option, print_json, store_dir_option
from elmoe.cli.suggesting import SuggestingGroup


@click.group("cache", cls=SuggestingGroup)
def command() -> None:
    """List or remove models that were converted when they were first used.

    A GGUF file or a Hugging Face folder is converted once, and kept in a folder: the cache. Every subcommand has --json.
    """


@command.command("list")
@store_dir_option
@json_option
def list_command(store_dir: Path | None, as_json: bool) -> None:
    """List the cache: sources, sizes, and whether they are whole."""
    from elmoe.convert.cache import default_folder, entries
    from elmoe.terminal import counted, print_table, shown, size

    found = list(entries(store_dir))
    if as_json:
        rows = [
            {
                "name": one.entry.name, "source": one.entry.path, "store": str(one.store), "bytes": one.bytes,
                "made": one.entry.made, "whole": one.whole,
            }
            for one in found
        ]  # fmt: skip
        print_json({"folder": str(store_dir or default_folder()), "rows": rows})
        return
    title = f"{store_dir or default_folder()}: {counted(len(found), 'model')}"
    if not found:
        click.echo(shown(f"{title}; a GGUF file or a Hugging Face folder is kept here once it was used"))
        return
    print_table(
        title,
        ("source", "size", "converted"),
        [(one.entry.path, size(one.bytes), one.entry.made if one.whole else "not finished") for one in found],
    )


@command.command("remove")
@click.argument("name", required=False)
@click.option("--all", "everything", is_flag=True, help="Remove all models.")
@store_dir_option
@json_option
def remove_command(name: str | None, everything: bool, store_dir: Path | None, as_json: bool) -> None:
    """Remove a model from the cache; its source stays.

    NAME is the name of a store or of its source, or the path of the source."""
    from elmoe.convert.cache import entries, remove
    from elmoe.terminal import shown
    from elmoe.units import format_bytes

    if everything == (name is not None):
        raise click.UsageError("give one name, or --all")
    names = [name] if name is not None else [one.folder.name for one in entries(store_dir)]
    removed = [one for wanted in names for one in remove(wanted, store_dir)]
    if as_json:
        print_json({"removed": [one.entry.path for one in removed], "bytes": sum(one.bytes for one in removed)})
        return
    for one in removed:
        click.echo(shown(f"removed {one.entry.path} ({format_bytes(one.bytes)})"))
