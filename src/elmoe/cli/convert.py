"""``elmoe convert``."""

from __future__ import annotations

from pathlib import Path

import click

from elmoe.cli.common import json_option, print_json
from elmoe.terminal import progress_bar


@click.command("convert")
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--tokenizer", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A tokenizer.json in place of the one a GGUF file describes.",
)  # fmt: skip
@json_option
def command(source: Path, store: Path, tokenizer: Path | None, as_json: bool) -> None:
    """Convert SOURCE to STORE: a Hugging Face folder, or a GGUF file (Q8_0 bit for bit, other types quantised anew).

    Resumes where a killed conversion stopped.
    """
    from elmoe.convert import convert_checkpoint
    from elmoe.files import check_new_folder

    check_new_folder(store, "store")
    notes: list[str] = []
    with progress_bar("tensors and experts", None) as bar:
        convert_checkpoint(source, store, lambda done, total: bar(done, total), tokenizer, notes.append)
    for line in notes:
        click.echo(line, err=True)
    if as_json:
        print_json({"store": str(store)})
    else:
        click.echo(f"wrote {store}; look at it with: elmoe inspect {store}")
