"""``elmoe doctor``."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import click

from elmoe.cli.common import Quantity, force_option, json_option, print_json
from elmoe.terminal import print_table
from elmoe.units import format_bytes, parse_bandwidth

FITS = 0.9
"""Share of the memory available that a store may take to be served from memory."""


@click.command("doctor")
@click.option("--store", default="demo", show_default=True, help="Store whose disk is measured.")
@click.option("--quick", is_flag=True, help="Leave out what is measured.")
@click.option("--hardware", type=click.Path(dir_okay=False, path_type=Path),
              help="Write this machine, measured on the store, for `elmoe simulate --hardware`.")  # fmt: skip
@click.option(
    "--slow-bandwidth",
    type=Quantity("BYTES/S", parse_bandwidth),
    help="With --hardware: measure with the disk read no faster than this.",
)
@force_option
@json_option
def command(
    store: str, quick: bool, hardware: Path | None, slow_bandwidth: float | None, force: bool, as_json: bool
) -> None:  # fmt: skip
    """Tell what this machine can do: instruction set, threads, memory and disk bandwidth, and how fast it computes STORE;
    and advise. That speed is kept for the forecasts of elmoe serve."""
    from elmoe import __version__, kernels
    from elmoe.convert.cache import stored
    from elmoe.engine.prefetch_distance import choose_prefetch_distance
    from elmoe.files import check_output
    from elmoe.measure.probe import disk_bandwidth, memory_bandwidth
    from elmoe.processors import processors
    from elmoe.store import available_memory, open_direct, open_store

    check_output(hardware, force, "hardware description")
    cores, available = processors(), available_memory()
    data: dict[str, object] = {
        "elmoe": __version__,
        "store": store,
        "native_kernels": True,  # importing elmoe.kernels fails without them
        "variant": kernels.variant(),
        "variants": list(kernels.variants()),
        "cores": cores,
        "available_memory_bytes": available,
    }
    path = stored(store)
    with open_store(path) as reader:
        data["store_bytes"] = sum(file.bytes for file in reader.manifest.files)
        if not quick:
            # Beyond any last-level cache where memory allows.
            probe = min(2 << 30, available // 4)
            _telling("memory")
            for threads in sorted({1, cores}):
                data[f"memory_read_bytes_per_second_{threads}_threads"] = memory_bandwidth(probe, threads)
            _telling("prefetch and disk")
            largest = max(reader.manifest.files, key=lambda file: file.bytes)
            data["prefetch_seconds"] = choose_prefetch_distance(reader)
            data["prefetch_bytes"] = kernels.prefetch()
            data["disk_read_bytes_per_second"] = disk_bandwidth(reader.path / largest.name)
            if int(str(data["store_bytes"])) <= FITS * available:
                from elmoe.measure.speeds import keep, measure
                from elmoe.opening import use_threads

                _telling("decoding and prompts of the store: a minute or more for a large one")
                use_threads("native")
                speeds = measure(reader)
                keep(speeds)
                data["decode_tokens_per_second"] = 1 / speeds.decode_seconds
                data["prompt_tokens_per_second"] = 1 / speeds.prompt_seconds
        if hardware is not None:
            from elmoe.measure.calibrate import calibrate, hardware_of
            from elmoe.opening import use_threads
            from elmoe.schema.hardware import write_hardware

            use_threads("native")
            direct = open_direct(path)
            with direct:
                machine = calibrate(direct, slow_bandwidth)
            write_hardware(hardware_of(machine, available, shutil.disk_usage(reader.path).total), hardware)
            data |= {"hardware": str(hardware), "pass_cost_fit_error": machine.error}
    if as_json:
        print_json(data)
        return
    print_table("this machine", ("", "value"), _lines(data))
    for advice in _advice(data):
        click.echo(advice)


def _telling(what: str) -> None:
    click.echo(f"measuring {what} ...", err=True)


def _lines(data: dict[str, Any]) -> list[tuple[str, str]]:
    """What was found, in words and units."""
    cores = data["cores"]
    others = [name for name in data["variants"] if name != data["variant"]]
    lines = [
        ("elmoe", data["elmoe"]),
        ("kernels for this processor", data["variant"] + (f" (also {', '.join(others)})" if others else "")),
        ("processors to use", f"{cores}" + (f" of {os.cpu_count()}" if os.cpu_count() != cores else "")),
        ("memory available", format_bytes(data["available_memory_bytes"])),
        (f"size of the store '{data['store']}'", format_bytes(data["store_bytes"])),
    ]
    for threads in sorted({1, cores}):
        rate = data.get(f"memory_read_bytes_per_second_{threads}_threads")
        if rate is not None:
            lines.append((f"memory read by {threads} thread{'s' * (threads > 1)}", f"{rate / 1e9:.1f} GB/s"))
    if "prefetch_bytes" in data:
        ahead = data["prefetch_bytes"]
        lines.append(("software prefetch", f"{format_bytes(ahead)} ahead" if ahead else "off: it does not help here"))
    if "disk_read_bytes_per_second" in data:
        lines.append(("disk read, past the page cache", f"{data['disk_read_bytes_per_second'] / 1e9:.2f} GB/s"))
    if "decode_tokens_per_second" in data:
        lines.append(("plain decoding, one answer", f"{data['decode_tokens_per_second']:,.0f} tokens/s"))
        lines.append(("prompts", f"{data['prompt_tokens_per_second']:,.0f} tokens/s"))
    if "hardware" in data:
        lines.append(("hardware description", data["hardware"]))
        lines.append(("mean error of its pass times", f"{data['pass_cost_fit_error']:.1%}"))
    return lines


def _advice(data: dict[str, Any]) -> list[str]:
    """What to do with it."""
    store, available = data["store_bytes"], data["available_memory_bytes"]
    advice = []
    if data["variant"] == "portable":
        advice.append("This processor has no AVX2: the portable kernels are used, which are several times slower.")
    if store <= FITS * available:
        advice.append("The store fits in memory: no --fast-memory is needed.")
    else:
        budget = format_bytes(0.8 * available).replace(" ", "")
        advice.append(f"The store is larger than the memory available: try --fast-memory {budget}.")
        rate = data.get("disk_read_bytes_per_second")
        if rate is not None and rate < 1e9:
            advice.append(f"Its disk reads {rate / 1e9:.2f} GB/s: experts that are not in memory will be slow to come.")
    if data["cores"] < (os.cpu_count() or 1):
        advice.append(f"This process may use {data['cores']} of {os.cpu_count()} processors (affinity or a quota).")
    return advice
