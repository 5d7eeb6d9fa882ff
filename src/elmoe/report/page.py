"""One self-contained HTML page of sections: no network, plots are interactive."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from elmoe.files import write_whole
from elmoe.report.section import Section


def write_page(sections: Sequence[Section], path: Path, title: str = "elmoe: what the hardware would give") -> None:
    """Write the page; it appears when it is whole."""
    from jinja2 import Environment
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["cell"] = cell
    # JSON inside a script element: no "<" may reach the parser.
    environment.filters["script"] = lambda data: Markup(json.dumps(data).replace("<", "\\u003c"))
    template = environment.from_string((files("elmoe.report") / "page.html.jinja").read_text(encoding="utf-8"))
    plots = any(section.figures for section in sections)
    made = {"plotly": Markup(get_plotlyjs()) if plots else "", "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")}
    html = template.render(title=title, sections=sections, **made)
    write_whole(path, html.encode())


def cell(value: Any) -> str:
    """A table cell: three significant digits, zeros at the end too."""
    if value is None:
        return "-"
    return f"{value:#.3g}".rstrip(".") if isinstance(value, float) else str(value)
