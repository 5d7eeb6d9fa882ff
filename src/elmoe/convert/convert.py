"""The conversion: every tensor is checked first, then written file by file, resuming where an earlier attempt stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from elmoe.chat import check_template
from elmoe.convert.identity import printable
from elmoe.convert.losses import FormatChoice
from elmoe.convert.source import Source, open_source
from elmoe.errors import ConvertError
from elmoe.store import StoreWriter
from elmoe.store.writer import Progress
from elmoe.tokenizer import load_tokenizer

SHOWN = 4
"""Names of tensors in a line."""


def convert_checkpoint(
    source: str | Path,
    store: str | Path,
    progress: Progress | None = None,
    tokenizer: Path | None = None,
    choice: FormatChoice | None = None,
    told: Callable[[list[str]], None] | None = None,
) -> tuple[str, ...]:
    """Convert a Hugging Face folder or a GGUF file to a store.

    :param progress: takes (tensors and experts done, all).
    :param tokenizer: a tokenizer.json in place of the one a GGUF file describes.
    :param choice: formats of the store; None takes what holds a type exactly, or comes nearest.
    :param told: takes a line for each type of the source, its format and the error in dB of what was converted now.
    :returns: names of tensors that were left out: those of layers that predict further tokens, and constants.
    :raises ConvertError: the checkpoint is incomplete or not supported, or the store cannot be written.
    :raises NumericsError: a weight is NaN or infinite; the message names the tensor.
    """
    model = open_source(Path(source), tokenizer, choice)
    model.check()
    convert_source(model, Path(store), progress)
    if told is not None:
        told(model.losses.lines())
    return model.left_out


def left_out_lines(names: tuple[str, ...]) -> list[str]:
    """A line that names tensors that are not converted, none where all are."""
    if not names:
        return []
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return [f"left out, since the model runs without them: {', '.join(map(printable, names[:SHOWN]))}{more}"]


def convert_source(model: Source, store: Path, progress: Progress | None = None, written: Progress | None = None) -> None:
    """Convert an open source that was checked. ``written`` takes (bytes of the store, all of them)."""
    texts = texts_of(model)
    with StoreWriter(
        store, model.spec, f"converted from {printable(model.name)}", model.fingerprint, model.formats
    ) as writer:
        writer.write(model, progress, written)
        writer.finish(*texts)


def texts_of(model: Source) -> tuple[bytes, str | None, dict[str, str]]:
    """The tokenizer.json, chat template and special tokens of a source; ConvertError where one cannot be used."""
    tokenizer, template, special_tokens = model.tokenizer(), model.chat_template(), model.special_tokens()
    load_tokenizer(tokenizer, "tokenizer.json", ConvertError)
    if template is not None:
        check_template(template, ConvertError)
    return tokenizer, template, special_tokens
