"""A generation step by step: the chosen token, its probability, the entropy, and the most probable tokens."""

from collections.abc import Callable, Mapping
from math import ceil
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from typing_extensions import Unpack

from glmlens.integers import Integer, read_integer
from glmlens.plot.arrays import to_float_array
from glmlens.plot.style import FAINT, GREY, SERIES, Look, apply_style, escape_text


def generation(
    steps: Any, label: Callable[[int], str] | None = None, *, row: Integer = 0, top: Integer = 8, **look: Unpack[Look]
) -> go.Figure:
    """Draw the probability of each chosen token and the entropy of its step (nats), and the `top` tokens of one step.

    `steps` is a Timeline, or the steps of `lens.stream`: any objects with `tokens` [batch] and `logits` [batch, vocab],
    of which row `row` is drawn. `label` returns the label of a token id, as `lens.tokenizer.label` does. Describe plain
    steps by `about={"prompt": ...}`. A slider selects the step, in a saved file too. Probabilities are those of the
    model's logits, before any temperature. Raises ValueError for no steps.
    """
    row, top = read_integer(row, "row", least=0), read_integer(top, "top", least=1)
    label = label or token_namer(steps)
    summaries = [summarize_step(step, row, top) for step in getattr(steps, "steps", steps)]
    if not summaries:
        raise ValueError("a generation of no steps has nothing to draw: give at least one step")
    chosen = [label(ids) for ids, *_ in summaries]
    figure = make_subplots(2, 1, specs=[[{"secondary_y": True}], [{}]], row_heights=[0.5, 0.5], vertical_spacing=0.2)
    figure.add_trace(step_trace([p for _, p, *_ in summaries], "probability", 0), 1, 1)
    figure.add_trace(step_trace([h for _, _, h, *_ in summaries], "entropy, nats", 1), 1, 1, secondary_y=True)
    # Traces 2 and 3 (the ring and the bars) are replaced by the frames of the slider.
    figure.add_trace(step_marker(0, summaries[0][1]), 1, 1)
    figure.add_trace(candidate_bars(summaries[0], label), 2, 1)
    ticktext = [f"{i} {escape_text(t, 12)}" for i, t in enumerate(chosen)]
    figure.update_xaxes(tickvals=list(range(len(summaries))), ticktext=ticktext, tickangle=-55, row=1, col=1)
    figure.update_xaxes(range=[0, 1.12], tickformat=".0%", gridcolor=FAINT, showgrid=True, row=2, col=1)
    figure.update_yaxes(title="probability", range=[-0.03, 1.05], gridcolor=FAINT, showgrid=True, row=1, col=1)
    most = max((h for _, _, h, *_ in summaries if np.isfinite(h)), default=0.0)
    no_entropy = [i for i, (_, _, h, *_) in enumerate(summaries) if not np.isfinite(h)]
    lost = (
        f"no probabilities at steps {', '.join(map(str, no_entropy[:8]))}: logits are nan or infinite"
        if no_entropy
        else ""
    )
    # Both axes leave the same share of room below zero, so that their zeros are level.
    ends = [share * ceil(max(most, 0.1)) for share in (-0.03, 1.05)]
    figure.update_yaxes(title="entropy, nats", range=ends, tickformat=".1f", row=1, col=1, secondary_y=True)
    figure.update_yaxes(**candidate_axis(summaries[0], label), row=2, col=1)
    figure.frames = [step_frame(i, step, label) for i, step in enumerate(summaries)]
    figure.update_layout(
        sliders=[step_slider(ticktext)],
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    )
    tall: Look = {"height": 620}
    about = describe_generation(steps)
    edits = f"edits: {about['edits']}" if about.get("edits", "none") != "none" else ""
    apply_style(figure, "Generation step by step", about, (edits, lost), extra_space=24, **(tall | look))  # type: ignore[arg-type]
    return figure.update_layout(margin={"b": 90})


def token_namer(steps: Any) -> Callable[[int], str]:
    """Return the labels of a timeline's tokenizer; ids for plain steps, and for a model without a tokenizer."""
    tokenizer = getattr(getattr(steps, "lens", None), "tokenizer", None)
    return tokenizer.label if tokenizer else str


def describe_generation(steps: Any) -> Mapping[str, str]:
    """Return what goes under the title: a timeline's prompt and model, and the metric."""
    about = steps.entropy().about if hasattr(steps, "steps") else {}
    return {**about, "metric": "probability of the chosen token, and entropy", "direction": ""}


StepSummary = tuple[int, float, float, np.ndarray, np.ndarray]
"""The chosen id, its probability, the entropy, and the ids and probabilities of the most probable tokens."""


def summarize_step(step: Any, row: int, top: int) -> StepSummary:
    """Compute the numbers of a step that are drawn."""
    logits = to_float_array(step.logits)
    logits = (logits[row] if logits.ndim == 2 else logits).astype(float)
    if np.isnan(logits).any() or not np.isfinite(logits.max()):
        p = np.full_like(logits, np.nan)  # an overflow: no token has a probability
    else:
        p = np.exp(logits - logits.max())  # minus the maximum against overflow
        p /= p.sum()
    best = np.argsort(-p, kind="stable")[:top]
    entropy = np.nan if np.isnan(p).any() else -float((p[p > 0] * np.log(p[p > 0])).sum())
    chosen = int(step.token if hasattr(step, "token") else step.tokens.tolist()[row])
    return chosen, float(p[chosen]), entropy, best, p[best]


def step_trace(values: list[float], name: str, i: int) -> go.Scatter:
    """Return a number of every step as a line."""
    hover = f"step %{{x}}<br>{name} %{{y:.4g}}<extra></extra>"
    line = {"color": SERIES[i], "dash": ("solid", "dash")[i]}
    y = np.asarray(values, np.float32)
    return go.Scatter(x=np.arange(len(y)), y=y, name=name, mode="lines+markers", line=line, hovertemplate=hover)


def step_marker(i: int, p: float) -> go.Scatter:
    """Return the ring around the step whose candidates are shown."""
    ring = {"size": 15, "symbol": "circle-open", "color": GREY, "line": {"width": 2}}
    return go.Scatter(x=[i], y=[p], mode="markers", marker=ring, name="step shown below", hoverinfo="skip")


def candidate_bars(step: StepSummary, label: Callable[[int], str]) -> go.Bar:
    """Return the most probable tokens of a step as bars, the chosen one in another colour."""
    chosen, _, _, ids, p = step
    colors = [SERIES[5] if i == chosen else SERIES[0] for i in ids]
    text = [f"{x:.1%}" for x in p]
    names = [escape_text(label(int(i)), 40) for i in ids]
    hover = "%{customdata}<br>%{x:.2%}<extra></extra>"
    style = {"orientation": "h", "showlegend": False, "textposition": "outside", "cliponaxis": False}
    y = np.arange(len(ids))
    return go.Bar(x=p, y=y, text=text, customdata=names, marker={"color": colors}, hovertemplate=hover, **style)


def candidate_axis(step: StepSummary, label: Callable[[int], str]) -> dict[str, Any]:
    """Return the axis of the candidates, the most probable on top and the chosen one marked by an arrow."""
    chosen, _, _, ids, _ = step
    text = [f"{'▸ ' if i == chosen else ''}{escape_text(label(int(i)), 16)}" for i in ids]
    return {"tickvals": list(range(len(ids))), "ticktext": text, "range": [len(ids) - 0.5, -0.5]}


def step_frame(i: int, step: StepSummary, label: Callable[[int], str]) -> go.Frame:
    """Return the frame that the slider shows for a step."""
    return go.Frame(
        name=str(i),
        data=[step_marker(i, step[1]), candidate_bars(step, label)],
        traces=[2, 3],
        layout={"yaxis3": candidate_axis(step, label)},
    )


def step_slider(labels: list[str]) -> dict[str, Any]:
    """Return the slider over steps."""
    now = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"method": "animate", "label": label, "args": [[str(i)], now]} for i, label in enumerate(labels)]
    current = {"prefix": "step ", "font": {"size": 12, "color": GREY}, "xanchor": "left"}
    style = {"bgcolor": GREY, "bordercolor": GREY, "tickcolor": GREY, "font": {"size": 1, "color": "rgba(0,0,0,0)"}}
    return {"active": 0, "steps": steps, "currentvalue": current, "pad": {"t": 30}, **style}
