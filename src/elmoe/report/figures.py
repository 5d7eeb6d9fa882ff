"""Plots of result rows, as Plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elmoe.report.section import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8f7f00", "#7f7f7f"]
"""Colours that stay apart for colour-blind readers, on white and on dark (Okabe and Ito)."""


def bars(
    title: str, categories: Sequence[Any], series: Mapping[str, Sequence[float | None]], value: str, stacked: bool = False,
    logarithmic: bool = False,
) -> Figure:  # fmt: skip
    """Grouped or stacked bars over categories, from 0; on a logarithmic axis, which has no 0, dots. ``value`` names the axis
    with its unit."""
    import plotly.graph_objects as go

    names = [str(c) for c in categories]
    if logarithmic:
        dots = [go.Scatter(name=name, x=names, y=list(values), mode="markers") for name, values in series.items()]
        return _finished(go.Figure(dots).update_traces(marker_size=11), title, "", value, True)
    figure = go.Figure([go.Bar(name=name, x=names, y=list(values)) for name, values in series.items()])
    figure.update_layout(barmode="stack" if stacked else "group")
    figure.update_yaxes(rangemode="tozero")
    return _finished(figure, title, "", value, logarithmic)


def lines(
    title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], horizontal: str, vertical: str,
    logarithmic: bool = False,
) -> Figure:  # fmt: skip
    """Lines of (x, y); axes named with their units."""
    import plotly.graph_objects as go

    figure = go.Figure(
        [go.Scatter(name=name, x=list(x), y=list(y), mode="lines+markers") for name, (x, y) in series.items()]
    )
    return _finished(figure, title, horizontal, vertical, logarithmic)


def tornado(
    title: str, names: Sequence[str], low: Sequence[float], high: Sequence[float], base: float, value: str
) -> Figure:
    """How far a result moves from ``base`` when each constant goes to its least and greatest value."""
    import plotly.graph_objects as go

    order = sorted(range(len(names)), key=lambda i: abs(high[i] - low[i]))
    labels = [names[i] for i in order]
    figure = go.Figure(
        [
            go.Bar(
                name=label, y=labels, x=[values[i] - base for i in order], orientation="h",
                hovertext=[f"{values[i]:.3f}" for i in order],
            )
            for label, values in (("at its least", low), ("at its greatest", high))
        ]
    )  # fmt: skip
    figure.update_layout(barmode="overlay", height=120 + 28 * len(names))
    figure.update_yaxes(automargin=True)
    return _finished(figure, title, f"{value}: change from {base:.3g}", "", False)


def heat_map(
    title: str, columns: Sequence[str], rows: Sequence[str], values: Sequence[Sequence[float]], horizontal: str,
    vertical: str, wanted: float,
) -> Figure:  # fmt: skip
    """Cells with their values written in them; colours part at ``wanted``, white. Rows go upwards."""
    import plotly.graph_objects as go

    most = max(abs(value - wanted) for line in values for value in line)
    cells = go.Heatmap(
        x=list(columns), y=list(rows), z=[list(line) for line in values], texttemplate="%{z:.1f}", zmid=wanted,
        zmin=wanted - most, zmax=wanted + most, colorscale=["#e69f00", "#ffffff", "#0072b2"], colorbar_title="x",
    )  # fmt: skip
    figure = go.Figure(cells)
    figure.update_xaxes(type="category")
    figure.update_yaxes(type="category", automargin=True)
    return _finished(figure, title, horizontal, vertical, False)


def _finished(figure: go.Figure, title: str, horizontal: str, vertical: str, logarithmic: bool) -> Figure:
    import json

    figure.update_layout(
        title=title,
        xaxis_title=horizontal,
        yaxis_title=vertical,
        template="plotly_white",
        legend_orientation="h",
        legend_y=-0.2,
        colorway=PALETTE,
    )
    if logarithmic:
        figure.update_yaxes(type="log")
    return Figure(title=title, plot=json.loads(figure.to_json()))
