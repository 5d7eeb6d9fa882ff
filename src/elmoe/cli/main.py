"""``elmoe``: the group of verbs, loaded lazily so that ``elmoe --help`` stays fast."""

from __future__ import annotations

import sys
from importlib import import_module

import click

from elmoe.errors import ElmoeError

VERBS = {
    "demo": "The whole story on the embedded model: plain and elastic decoding side by side.",
    "convert": "Convert a Hugging Face folder or a GGUF file to a store.",
    "export": "Write a store as a GGUF file.",
    "inspect": "Show what is in a store, and verify its checksums.",
    "generate": "Generate text.",
    "eval": "Perplexity of the target and of its draft on a text.",
    "bench": "Throughput, acceptance, hit rates and bytes for modes and batch sizes.",
    "trace": "Record the facts of a run, and look at them.",
    "synth": "Write a store with a config's shapes and random weights, for benchmarks.",
    "simulate": "Price systems x models x batch sizes on described hardware.",
    "report": "One HTML page from result files.",
    "doctor": "What this machine can do: kernels, threads, memory and disk bandwidth.",
}


class LazyGroup(click.Group):
    """Imports ``elmoe.cli.<verb>`` when the verb is used; help texts of the list come from ``VERBS``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All verbs, in the order of a user's journey."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of a verb, imported now."""
        if cmd_name not in VERBS:
            return None
        command: click.Command = import_module(f"elmoe.cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="elmoe")
def cli() -> None:
    """Elastic self-speculative decoding for Mixture-of-Experts models over two memory tiers."""


def main() -> None:
    """Entry point: errors raised on purpose become two lines on stderr and exit code 1."""
    try:
        cli(standalone_mode=True)
    except ElmoeError as error:
        click.echo(f"error: {error}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
