"""``elmoe convert``."""

from __future__ import annotations

from pathlib import Path

import click

from elmoe.cli.common import json_option, print_json, progress_bar


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@json_option
def command(source: Path, store: Path, as_json: bool) -> None:
    """Convert the Hugging Face folder SOURCE to STORE. Resumes where a killed conversion stopped."""
    from elmoe.convert import convert_checkpoint

    with progress_bar("tensors and experts", None) as bar:
        convert_checkpoint(source, store, lambda done, total: bar(done, total))
    if as_json:
        print_json({"store": str(store)})
    else:
        click.echo(f"wrote {store}; look at it with: elmoe inspect {store}")
