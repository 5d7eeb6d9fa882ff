"""``elmoe inspect``."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from elmoe.cli.common import json_option, print_json, store_dir_option
from elmoe.terminal import print_table, progress_bar, size


@click.command("inspect")
@click.argument("store")
@click.option("--verify", "do_verify", is_flag=True, help="Recompute every checksum.")
@store_dir_option
@json_option
def command(store: str, do_verify: bool, store_dir: Path | None, as_json: bool) -> None:
    """What is in STORE, its sizes per tier, and whether its checksums hold."""
    from elmoe.convert.cache import naming_mend, stored
    from elmoe.engine.fitting import smallest_budget
    from elmoe.engine.kv_cache import PAGE_POSITIONS
    from elmoe.engine.tier import tier_sizes
    from elmoe.store import open_store

    path = stored(store, store_dir)
    with naming_mend(store, path), open_store(path) as reader:
        spec = reader.spec
        if do_verify:
            total = sum(file.bytes for file in reader.manifest.files)
            with progress_bar("verifying", total, bytes_=True) as bar:
                reader.verify(bar)
        kv, dense = spec.kv_bytes_per_position, reader.dense_bytes
        sizes, minimum = tier_sizes(reader, dense, 0), smallest_budget(reader, PAGE_POSITIONS)
        experts = len(spec.moe_layers) * spec.experts
        data = {
            "path": reader.path.name,
            "model": msgspec.to_builtins(spec),
            "experts": experts,
            "msb_bytes": sum(sizes.msb) * spec.experts,
            "lsb_bytes": sum(sizes.lsb) * spec.experts,
            "dense_bytes": dense,
            "kv_bytes_per_position": kv,
            "minimum_fast_memory": minimum,
            "verified": do_verify,
        }
    if as_json:
        print_json(data)
        return
    least = f"{-(-minimum // 2**20)} MiB"  # rounded up: less is refused
    print_table(
        f"{spec.family}: {len(spec.layers)} layers, {spec.experts} experts, top-{spec.top_k}",
        ("part", "size"),
        [
            ("dense parts (fast tier)", size(dense)),
            (f"MSB slices of {experts} experts", size(sum(sizes.msb) * spec.experts)),
            (f"LSB slices of {experts} experts", size(sum(sizes.lsb) * spec.experts)),
            ("KV per position", size(kv)),
            (f"smallest --fast-memory ({PAGE_POSITIONS} positions)", least),
        ],
    )
    if do_verify:
        click.echo("checksums: all hold")
