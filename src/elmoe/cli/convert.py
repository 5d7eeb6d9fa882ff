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
@click.option(
    "--format",
    "formats",
    multiple=True,
    metavar="[KIND=]FORMAT",
    help="Format of all matrices, or of a KIND (experts, matrices): nested8, affine4, table4, planes6, or one of their "
    "variants; for gate, up and down of experts three, joined by + [default: the one that holds the file's type exactly, "
    "else the nearest].",
)
@json_option
def command(source: Path, store: Path, tokenizer: Path | None, formats: tuple[str, ...], as_json: bool) -> None:
    """Convert SOURCE to STORE: a Hugging Face folder, or a GGUF file.

    Q8_0, Q4_0, Q4_1, Q4_K, Q6_K, IQ4_NL, IQ4_XS and MXFP4 are kept bit for bit; for other types a line tells the format and
    the error. If a conversion was interrupted, the same command continues it.
    """
    from elmoe.convert import convert_checkpoint
    from elmoe.convert.convert import left_out_lines
    from elmoe.convert.losses import FormatChoice
    from elmoe.files import check_new_folder

    check_new_folder(store, "store")
    choice, lines = FormatChoice.parse(formats) if formats else None, list[str]()
    with progress_bar("tensors and experts", None) as bar:
        left_out = convert_checkpoint(source, store, lambda done, total: bar(done, total), tokenizer, choice, lines.extend)
    if as_json:
        print_json({"store": str(store), "formats": lines, "left_out": list(left_out)})
    else:
        for line in (*left_out_lines(left_out), *lines):
            click.echo(line, err=True)
        click.echo(f"wrote {store}; look at it with: elmoe inspect {store}")
