"""Line charts: several series along layers, positions or distances, and comparisons of sweeps."""

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from typing_extensions import Unpack

from glmlens.plot.arrays import Labels, Limits, Numbers, as_labelled, metric_title, to_float_array
from glmlens.plot.style import FAINT, SERIES, SIGNED, Look, apply_style, color_bar, escape_text, finite_most, set_ticks
from glmlens.results import Labelled, list_axes

DASHES = ("solid", "dash", "dot", "dashdot")


def lines(
    data: Numbers,
    labels: Labels = None,
    *,
    axes: str | tuple[str, str] = ("series", "place"),
    along: str | None = None,
    what: str = "value",
    limits: Limits | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """Draw numbers with two axes as lines: `along` (by default the last axis) to the right, a line per other label.

    Numbers with one axis are one line. `limits` are the ends of the vertical axis.
    """
    named = list_axes(axes)
    # A single series has no axis of series yet: give it one.
    if np.ndim(data.values if isinstance(data, Labelled) else to_float_array(data)) == 1:
        data = to_single_series(as_labelled(data, named[1:], labels), what)
    table = as_labelled(data, named, labels)
    along = along or table.axes[1]
    if along not in table.axes:
        raise ValueError(f"along {along!r}; this result has {', '.join(table.axes)}")
    series = next(axis for axis in table.axes if axis != along)
    values = table.values if table.axes[1] == along else table.values.T
    figure = go.Figure()
    for i, (name, row) in enumerate(zip(table.labels[series], values, strict=True)):
        figure.add_scatter(**line_trace(i, name, row, what))
    set_ticks(figure, "x", table.labels[along], along)
    style_value_axis(figure, what, limits)
    figure.update_layout(showlegend=len(values) > 1, legend={"title": {"text": escape_text(series)}})
    return apply_style(figure, metric_title(table), table.about, **look)


def to_single_series(data: Labelled, name: str) -> Labelled:
    """Return numbers with one axis as a table of one row."""
    return Labelled(data.values[None], ("series", *data.axes), {**data.labels, "series": [name]}, data.about)


def line_trace(i: int, name: str, row: np.ndarray, what: str) -> dict:
    """Return the trace of series `i`: its own colour, and another dash once the colours repeat."""
    return {
        "x": np.arange(len(row)),
        "y": row,
        "name": escape_text(name, 40),
        "mode": "lines+markers" if len(row) <= 60 else "lines",
        "line": {"color": SERIES[i % len(SERIES)], "dash": DASHES[i // len(SERIES) % len(DASHES)], "width": 2},
        "hovertemplate": f"%{{x}}<br>{escape_text(what)} %{{y:.4g}}<extra>{escape_text(name, 40)}</extra>",
    }


def style_value_axis(figure: go.Figure, what: str, limits: Limits | None) -> None:
    """Style the vertical axis of values."""
    grid = {"showgrid": True, "gridcolor": FAINT, "zeroline": True, "zerolinecolor": FAINT}
    figure.update_yaxes(title=escape_text(what), range=limits, **grid)


def compare(sweeps: Mapping[str, Numbers], *, what: str = "effect", **look: Unpack[Look]) -> go.Figure:
    """Compare sweeps by name: over one axis as lines with intervals, over two as grids with one colour scale.

    An interval is drawn where a sweep has one (`low` and `high`). Raises ValueError unless all sweeps have the same
    axes and labels.
    """
    labelled = {
        name: as_labelled(sweep, sweep.axes if isinstance(sweep, Labelled) else default_axes(sweep))
        for name, sweep in sweeps.items()
    }
    first = next(iter(labelled.values()))
    for name, sweep in labelled.items():
        if (sweep.axes, sweep.labels) != (first.axes, first.labels):
            raise ValueError(
                f"{name!r} has other axes or labels than {next(iter(labelled))!r}: {sweep.axes} and {first.axes}"
            )
    figure = (
        draw_grids_in_row(labelled, first, what)
        if len(first.axes) == 2
        else draw_overlaid_lines(sweeps, labelled, first, what)
    )
    # Under the title goes only what holds for all of them.
    shared = set.intersection(*(set(sweep.about.items()) for sweep in labelled.values()))
    about = {
        key: text for key, text in first.about.items() if key in ("metric", "model", "pairs") and (key, text) in shared
    }
    tall: Look = {"height": 320 if len(first.axes) == 1 else 90 + max(160, 22 * first.shape[0])}
    room = 20 if len(first.axes) == 2 else 0
    return apply_style(
        figure, f"{what.capitalize()} by {' and '.join(first.axes)}", about, extra_space=room, **(tall | look)
    )  # type: ignore[arg-type]


def default_axes(values: Numbers) -> tuple[str, ...]:
    """Return the names of the axes of plain numbers."""
    return ("layer", "place")[: to_float_array(values).ndim]


def draw_overlaid_lines(
    sweeps: Mapping[str, Numbers], series: Mapping[str, Labelled], first: Labelled, what: str
) -> go.Figure:
    """Draw sweeps over one axis as lines, with their intervals as error bars."""
    figure = go.Figure()
    for i, (name, data) in enumerate(series.items()):
        ends = [getattr(sweeps[name], side, None) for side in ("low", "high")]
        error = None
        if all(end is not None and np.isfinite(end.values).any() for end in ends):
            low, high = (to_float_array(end.values) for end in ends)  # type: ignore[union-attr]
            # plotly wants the distances of both ends from the value.
            with np.errstate(invalid="ignore"):
                up, down = (np.where(np.isfinite(x), x, np.nan) for x in (high - data.values, data.values - low))
            error = {"array": up, "arrayminus": down, "symmetric": False, "thickness": 1}
        figure.add_scatter(**line_trace(i, name, data.values, what), error_y=error)
    axis = first.axes[0]
    set_ticks(figure, "x", first.labels[axis], axis)
    style_value_axis(figure, what, None)
    return figure.update_layout(showlegend=True)


def draw_grids_in_row(grids: Mapping[str, Labelled], first: Labelled, what: str) -> go.Figure:
    """Draw sweeps over two axes side by side, zero in the middle of their common colour scale."""
    from plotly.subplots import make_subplots

    names = [escape_text(name, 30) for name in grids]
    figure = make_subplots(1, len(grids), subplot_titles=names, shared_yaxes=True, horizontal_spacing=0.03)
    figure.update_annotations(font_size=12)
    most = max(finite_most(data.values, 1e-9) for data in grids.values())
    rows, columns = map(escape_text, first.axes)
    at = {"x": np.arange(first.shape[1]), "y": np.arange(first.shape[0]), "coloraxis": "coloraxis"}
    for i, (name, data) in enumerate(zip(names, grids.values(), strict=True), 1):
        hover = f"{rows} %{{y}}, {columns} %{{x}}<br>{escape_text(what)} %{{z:.4g}}<extra>{name}</extra>"
        figure.add_trace(go.Heatmap(z=data.values, hovertemplate=hover, **at), 1, i)
    below, left = ([escape_text(label, 16) for label in first.labels[axis]] for axis in reversed(first.axes))
    figure.update_xaxes(title=columns, tickvals=at["x"], ticktext=below)
    figure.update_yaxes(tickvals=at["y"], ticktext=left).update_yaxes(title=rows, col=1)
    return figure.update_layout(
        coloraxis={"colorscale": SIGNED, "cmin": -most, "cmax": most, "colorbar": color_bar(what)}
    )
