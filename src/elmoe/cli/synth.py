"""``elmoe synth``."""

from __future__ import annotations

from pathlib import Path

import click

from elmoe.cli.common import json_option, print_json
from elmoe.terminal import progress_bar


@click.command("synth")
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--layers", type=click.IntRange(1), help="Write only this many layers.")
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), default=0, show_default=True, help="Of the weights.")
@json_option
def command(config: Path, store: Path, layers: int | None, seed: int, as_json: bool) -> None:
    """Write STORE with random weights and the shapes of CONFIG, a model's config.json, in the formats of the family's
    published weights."""
    import msgspec

    from elmoe.errors import ConvertError
    from elmoe.files import check_new_folder
    from elmoe.models import family_of, spec_of_config
    from elmoe.store.synthetic import synthesize
    from elmoe.untrusted import load_object, read_bytes

    check_new_folder(store, "store")
    raw = read_bytes(config, ConvertError, 1 << 20, "config.json")
    values = load_object(raw, str(config), ConvertError, "expected a model's config.json", repeated_keys=True)
    spec, formats = spec_of_config(values, config.name), family_of(values, config.name).formats
    if layers is not None:
        spec = msgspec.structs.replace(spec, layers=(spec.layers * layers)[:layers])
    experts = {f"layers.{layer}.experts": formats["experts"] for layer in spec.moe_layers if "experts" in formats}
    with progress_bar("tensors and experts", None) as bar:
        synthesize(store, spec, seed, bar, experts)
    if as_json:
        print_json({"store": str(store)})
    else:
        click.echo(f"wrote {store}")
