"""A section of a report: words, tables and plots of one study. Studies write them as JSON, a page collects them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from elmoe.errors import HardwareError
from elmoe.files import write_whole
from elmoe.untrusted import decode_json, read_bytes

SIZE_LIMIT = 64 << 20


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """``status``: whether the numbers are simulated, measured, published, or which column is which. ``folded``: shown
    when it is opened, left out in print."""

    title: str
    status: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    folded: bool = False


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """``plot``: a Plotly figure as its JSON object."""

    title: str
    plot: dict[str, Any]

    def __post_init__(self) -> None:
        data, layout = self.plot.get("data"), self.plot.get("layout")
        if not isinstance(data, list) or not isinstance(layout, dict):
            raise ValueError("a plot has a list 'data' and an object 'layout'")
        if not isinstance(layout.get("height", 0), int | float | None):
            raise ValueError("the height of a plot is no number")


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """``claim``: what is tested, ``verdict``: what came out, in words. ``command`` makes the section anew; ``date``: when it
    was made, ``file``: the result it was read from."""

    name: str
    title: str
    claim: str
    verdict: str
    command: str
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    kind: str = "section"
    date: str = ""
    file: str = ""


def labelled(section: Section, words: str) -> Section:
    """The section with ``words`` of its conditions in the status of every table and in the title of every figure."""
    if not words:
        return section
    tables = (msgspec.structs.replace(table, status=f"{table.status}; {words}") for table in section.tables)
    figures = (_titled(figure, f"{figure.title}; {words}") for figure in section.figures)
    return msgspec.structs.replace(section, tables=tuple(tables), figures=tuple(figures))


def _titled(figure: Figure, title: str) -> Figure:
    layout = figure.plot["layout"]
    shown = {"text": title} | {key: value for key, value in _title_of(layout).items() if key != "text"}
    return Figure(title=title, plot=figure.plot | {"layout": layout | {"title": shown}})


def _title_of(layout: dict[str, Any]) -> dict[str, Any]:
    title = layout.get("title")
    return title if isinstance(title, dict) else {}


def write_section(section: Section, path: Path) -> None:
    """Write as JSON; the file appears when it is whole."""
    write_whole(path, msgspec.json.encode(section))


def read_section(path: Path) -> Section:
    """Read a section file; HardwareError names what is wrong with it."""
    raw = read_bytes(path, HardwareError, SIZE_LIMIT, "section of a report")
    return decode_json(
        raw, str(path), Section, HardwareError, "not a section of a report", "run the study that made it anew"
    )
