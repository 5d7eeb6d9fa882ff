"""``elmoe export``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from elmoe.cli.common import json_option, print_json, store_dir_option
from elmoe.terminal import progress_bar


@click.command("export")
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@store_dir_option
@json_option
def command(store: str, out: Path, store_dir: Path | None, as_json: bool) -> None:
    """Write STORE as the GGUF file OUT, which llama.cpp reads; every weight keeps its bits."""
    from elmoe.convert.cache import naming_mend, stored
    from elmoe.convert.gguf_export import export_store
    from elmoe.files import check_output
    from elmoe.store import open_store

    if not os.path.exists(out):  # one that exists is refused by the export itself
        check_output(out, what="file", folders=True)
    path = stored(store, store_dir)
    with naming_mend(store, path), open_store(path) as reader, progress_bar("writing", None, bytes_=True) as bar:
        export_store(reader, out, lambda done, total: bar(done, total))
    if as_json:
        print_json({"file": str(out), "bytes": out.stat().st_size})
    else:
        click.echo(f"wrote {out}")
