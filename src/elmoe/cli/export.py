"""``elmoe export``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from elmoe.cli.common import force_option, json_option, print_json, store_dir_option
from elmoe.terminal import progress_bar


@click.command("export")
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path))
@force_option
@store_dir_option
@json_option
def command(store: str, out: Path, force: bool, store_dir: Path | None, as_json: bool) -> None:
    """Write STORE as the GGUF file OUT, which llama.cpp reads; every weight keeps its bits."""
    from elmoe.convert.cache import naming_mend, stored
    from elmoe.convert.gguf_export import export_store
    from elmoe.convert.identity import part_paths
    from elmoe.files import check_output, same_file
    from elmoe.store import open_store

    place = Path(os.path.realpath(store))
    if os.path.isdir(place) and Path(os.path.realpath(out)).is_relative_to(place):
        raise click.UsageError(f"'{out}' is a file of '{store}' itself")
    if os.path.isfile(place) and any(same_file(part, out) for part in part_paths(Path(store))):
        raise click.UsageError(f"'{out}' is the file that is read")
    check_output(out, force, "file", folders=True)
    path = stored(store, store_dir)
    with naming_mend(store, path), open_store(path) as reader, progress_bar("writing", None, bytes_=True) as bar:
        export_store(reader, out, lambda done, total: bar(done, total), replace=force)
    if as_json:
        print_json({"file": str(out), "bytes": out.stat().st_size})
    else:
        click.echo(f"wrote {out}")
