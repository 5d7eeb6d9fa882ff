"""Plots of result rows, as Plotly figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from elmoe.report.section import Figure

if TYPE_CHECKING:
    import plotly.graph_objects as go


def bars(
    title: str, categories: Sequence[Any], series: Mapping[str, Sequence[float | None]], value: str, stacked: bool = False,
    logarithmic: bool = False,
) -> Figure:  # fmt: skip
    """Grouped or stacked bars over categories; ``value`` names the axis with its unit."""
    import plotly.graph_objects as go

    figure = go.Figure(
        [go.Bar(name=name, x=[str(c) for c in categories], y=list(values)) for name, values in series.items()]
    )
    figure.update_layout(barmode="stack" if stacked else "group")
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
    """How far a result moves when each constant goes to its least and greatest value."""
    import plotly.graph_objects as go

    order = sorted(range(len(names)), key=lambda i: abs(high[i] - low[i]))
    labels = [names[i] for i in order]
    figure = go.Figure(
        [
            go.Bar(
                name=label, y=labels, x=[values[i] - base for i in order], base=base, orientation="h",
                hovertext=[f"{values[i]:.3f}" for i in order],
            )
            for label, values in (("at its least", low), ("at its greatest", high))
        ]
    )  # fmt: skip
    figure.update_layout(barmode="overlay", height=120 + 28 * len(names), margin={"l": 260})
    figure.add_vline(x=base, line_dash="dot")
    return _finished(figure, title, value, "", False)


def _finished(figure: go.Figure, title: str, horizontal: str, vertical: str, logarithmic: bool) -> Figure:
    import json

    figure.update_layout(
        title=title,
        xaxis_title=horizontal,
        yaxis_title=vertical,
        template="plotly_white",
        legend_orientation="h",
        legend_y=-0.2,
    )
    if logarithmic:
        figure.update_yaxes(type="log")
    return Figure(title=title, plot=json.loads(figure.to_json()))
