"""A section of a report: words, tables and plots of one study. Studies write them as JSON, a page collects them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from elmoe.errors import HardwareError
from elmoe.files import write_whole

SIZE_LIMIT = 64 << 20


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """``status``: whether the numbers are simulated, measured, published, or which column is which."""

    title: str
    status: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """``plot``: a Plotly figure as its JSON object."""

    title: str
    plot: dict[str, Any]


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """``claim``: what is tested, ``verdict``: what came out, in words. ``command`` makes the section anew."""

    name: str
    title: str
    claim: str
    verdict: str
    command: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    kind: str = "section"


def write_section(section: Section, path: Path) -> None:
    """Write as JSON; the file appears when it is whole."""
    write_whole(path, msgspec.json.encode(section))


def read_section(path: Path) -> Section:
    """Read a section file; HardwareError names what is wrong with it."""
    try:
        if path.stat().st_size > SIZE_LIMIT:
            raise HardwareError(f"'{path}' is larger than {SIZE_LIMIT >> 20} MiB")
        return msgspec.json.decode(path.read_bytes(), type=Section)
    except OSError as error:
        raise HardwareError(f"cannot read '{path}': {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise HardwareError(f"'{path}' is not a section of a report: {error}", "run the study that made it anew") from error
