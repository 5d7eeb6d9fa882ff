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
    """Show the sizes of STORE, the smallest memory it runs in, and whether its checksums hold."""
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
        whole_context = smallest_budget(reader, spec.max_positions)
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
            "minimum_fast_memory_whole_context": whole_context,
            "verified": do_verify,
        }
    if as_json:
        print_json(data)
        return
    slices = [
        (f"{experts} experts, upper bits (MSB slices)", size(sum(sizes.msb) * spec.experts)),
        (f"{experts} experts, lower bits (LSB slices)", size(sum(sizes.lsb) * spec.experts)),
    ]
    routing = f"{spec.experts} experts per layer, top-{spec.top_k}" if experts else "dense, no experts"
    print_table(
        f"{spec.family}: {len(spec.layers)} layers, {routing}",
        ("part", "size"),
        [
            ("dense parts, always in memory", size(dense)),
            *(slices if experts else []),
            ("KV cache, for each position of a text", size(kv)),
            (f"smallest --fast-memory, {PAGE_POSITIONS} positions", _rounded_up(minimum)),
            (f"smallest --fast-memory, whole context of {spec.max_positions}", _rounded_up(whole_context)),
        ],
    )
    if do_verify:
        click.echo("checksums: all hold")


def _rounded_up(count: int) -> str:
    """An amount in MiB that ``--fast-memory`` takes: less would be refused."""
    return f"{-(-count // 2**20)} MiB"
