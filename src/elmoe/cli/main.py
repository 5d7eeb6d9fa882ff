"""``elmoe``: the group of verbs, loaded lazily so that ``elmoe --help`` stays fast."""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import NoReturn

import click

from elmoe.cli.suggesting import SuggestingGroup
from elmoe.errors import ElmoeError
from elmoe.extras import naming_extra

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
VERBS = {
    "demo": "Text of the embedded model with and without drafts, and simulated hardware.",
    "convert": "Convert a Hugging Face folder or a GGUF file to a store.",
    "export": "Write a store as a GGUF file.",
    "cache": "List or remove models that were converted when they were first used.",
    "inspect": "Show the sizes of a store, and verify its checksums.",
    "generate": "Generate text.",
    "chat": "Talk with a model in the terminal.",
    "serve": "Serve a model to clients of OpenAI's API.",
    "eval": "Measure the perplexity of a model and of its 4-bit draft on a text.",
    "bench": "Measure throughput, acceptance, hit rates and bytes of modes and batch sizes.",
    "trace": "Record the routing and the drafts of a run, and look at them.",
    "synth": "Write a store of random weights with a model's shapes, for benchmarks.",
    "simulate": "Simulate models on described hardware: speed, energy and bytes.",
    "report": "Write one HTML page from result files.",
    "doctor": "Tell what this machine can do: kernels, threads, memory and disk bandwidth.",
}


class LazyGroup(SuggestingGroup):
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
    """Run Mixture-of-Experts language models in less memory than they need, with identical output.

    Start with `elmoe demo`. Then give a GGUF file or a Hugging Face folder to `elmoe generate`.
    """


def main() -> None:
    """Entry point: errors raised on purpose become two lines on stderr and exit code 1, Ctrl-C exit code 130."""
    _accept_any_text()
    try:
        with naming_extra(" ".join(["elmoe", *[word for word in sys.argv[1:2] if word in VERBS]])):
            status = cli.main(prog_name="elmoe", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except ElmoeError as error:
        _end(f"error: {error}", error.hint)
    except click.Abort:
        _end("interrupted", None, INTERRUPTED)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        told = error.format_message().rstrip(".").replace("a valid integer range", "a whole number")
        context = error.ctx if isinstance(error, click.UsageError) else None
        _end(f"error: {told}", f"{context.command_path} --help" if context else None, error.exit_code)
    except MemoryError:
        _end("error: out of memory", "give a smaller --fast-memory or --batch, or shorter prompts")
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        # Nobody reads, or the disk behind a file is full: what is buffered cannot be written either.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.EPIPE:
            sys.exit(1)
        _end(f"error: cannot write the output: {error.strerror}", "free some disk, or write elsewhere")
    sys.exit(status if isinstance(status, int) else 0)


def _accept_any_text() -> None:
    """Names and texts that the terminal's encoding does not hold are shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(message: str, hint: str | None, status: int = 1) -> NoReturn:
    from elmoe.terminal import shown

    with suppress(OSError, ValueError):
        click.echo(shown(message), err=True)
        if hint:
            click.echo(f"hint: {shown(hint)}", err=True)
    sys.exit(status)


if __name__ == "__main__":
    main()
