"""``elmoe doctor``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import Quantity, json_option, print_json
from elmoe.terminal import print_table
from elmoe.units import format_bytes, parse_bandwidth


@click.command("doctor")
@click.option("--store", default="demo", show_default=True, help="Store whose disk is measured.")
@click.option("--quick", is_flag=True, help="Leave out the bandwidth measurements.")
@click.option("--hardware", type=click.Path(dir_okay=False, path_type=Path),
              help="Write this machine, measured on the store, for `elmoe simulate --hardware`.")  # fmt: skip
@click.option("--slow-bandwidth", type=Quantity("BYTES/S", parse_bandwidth), help="With --hardware: the throttle in force.")
@json_option
def command(store: str, quick: bool, hardware: Path | None, slow_bandwidth: float | None, as_json: bool) -> None:
    """What this machine can do: instruction set, threads, memory and disk bandwidth, native kernels."""
    from elmoe import __version__, kernels
    from elmoe.engine.prefetch_distance import choose_prefetch_distance
    from elmoe.measure.probe import disk_bandwidth, memory_bandwidth
    from elmoe.store import available_memory, open_direct, open_store

    cores, available = len(os.sched_getaffinity(0)), available_memory()
    data: dict[str, object] = {
        "elmoe": __version__,
        "native_kernels": True,  # importing elmoe.kernels fails without them
        "variant": kernels.variant(),
        "variants": list(kernels.variants()),
        "cores": cores,
        "available_memory_bytes": available,
    }
    with open_store(store) as reader:
        data["store_bytes"] = sum(file.bytes for file in reader.manifest.files)
        if not quick:
            # Beyond any last-level cache where memory allows.
            probe = min(2 << 30, available // 4)
            for threads in sorted({1, cores}):
                data[f"memory_read_bytes_per_second_{threads}_threads"] = memory_bandwidth(probe, threads)
            largest = max(reader.manifest.files, key=lambda file: file.bytes)
            data["prefetch_seconds"] = choose_prefetch_distance(reader)
            data["prefetch_bytes"] = kernels.prefetch()
            data["disk_read_bytes_per_second"] = disk_bandwidth(reader.path / largest.name)
        if hardware is not None:
            from elmoe.engine.session import use_threads
            from elmoe.measure.calibrate import calibrate, hardware_of
            from elmoe.schema.hardware import write_hardware

            use_threads("native")
            direct = open_direct(store)
            with direct:
                machine = calibrate(direct, slow_bandwidth)
            write_hardware(hardware_of(machine, available, shutil.disk_usage(reader.path).total), hardware)
            data |= {"hardware": str(hardware), "pass_cost_fit_error": machine.error}
    if as_json:
        print_json(data)
        return
    print_table("this machine", ("", "value"), [(key.replace("_", " "), _shown(key, value)) for key, value in data.items()])


def _shown(key: str, value: Any) -> str:
    """A value with the unit its key ends in."""
    if "bytes_per_second" in key:
        return f"{value / 1e9:.1f} GB/s"
    if key.endswith("bytes"):
        return format_bytes(value)
    return ", ".join(value) if isinstance(value, list) else str(value)
