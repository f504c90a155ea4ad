"""Heatmaps: any numbers with two axes, patching grids, the logit lens, attention, head scores, the residual stream."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go
from typing_extensions import Unpack

from glmlens.integers import Integer, read_integer
from glmlens.plot.arrays import Labels, Limits, Numbers, as_labelled, metric_title, pool_blocks, to_float_array
from glmlens.plot.style import (
    GREY,
    MOST_CELLS,
    Look,
    apply_style,
    color_bar,
    color_scale,
    escape_text,
    finite_most,
    format_signed,
    set_ticks,
    text_colors,
)
from glmlens.results import Labelled, list_axes

STEEP_LABEL_AXES = ("pos", "key", "part")  # long labels: drawn at an angle, below the axis
LABEL_LENGTHS = {"part": 28, "pair": 28}  # characters; these labels name wavelengths
MAX_WRITTEN_CELLS = 400  # up to so many cells, the number is written in each


def heatmap(
    data: Numbers,
    labels: Labels = None,
    *,
    axes: str | tuple[str, str] = ("row", "column"),
    what: str = "value",
    signed: bool | None = None,
    down: bool = False,
    limits: Limits | None = None,
    max_cells: int = MOST_CELLS,
    **look: Unpack[Look],
) -> go.Figure:
    """Draw numbers with two axes as colours: the first axis upwards (downwards with `down`), the second to the right.

    `signed` numbers have zero in the middle of the colour scale; by default they are signed if any is negative.
    `limits` are the ends of the colour scale.
    """
    labelled = as_labelled(data, list_axes(axes), labels)
    return draw_heatmap(labelled, what, signed, down=down, limits=limits, max_cells=max_cells, look=look)


def draw_heatmap(
    data: Labelled,
    what: str,
    signed: bool | None = None,
    down: bool = False,
    limits: Limits | None = None,
    max_cells: int = MOST_CELLS,
    look: Look | None = None,
    text: np.ndarray | bool = True,
    hover: tuple[str, np.ndarray] | None = None,
    name: str | None = None,
    notes: tuple[str, ...] = (),
) -> go.Figure:
    """Draw a heatmap of labelled numbers.

    `text` is written in the cells: an array, the numbers (True, where they have room), or nothing (False). `hover` is a
    further line of hover text and its customdata. `name` is the title, and `notes` go under it.
    """
    if signed is None:
        signed = bool(data.values[np.isfinite(data.values)].min(initial=0) < 0)
    data, note = pool_blocks(data, max_cells)
    rows, columns = data.axes
    scale = color_scale(data.values, signed)
    if limits is not None:
        scale |= {"zmin": limits[0], "zmax": limits[1]}
    lines = [
        f"{escape_text(rows)} %{{y}}, {escape_text(columns)} %{{x}}",
        f"{escape_text(what)} %{{z:.4g}}",
        *([hover[0]] if hover else []),
    ]
    heat = go.Heatmap(
        z=data.values,
        x=np.arange(data.shape[1]),
        y=np.arange(data.shape[0]),
        customdata=hover[1] if hover else None,
        hovertemplate="<br>".join(lines) + "<extra></extra>",
        hoverongaps=False,
        colorbar=color_bar(what),
        **scale,
    )
    figure = go.Figure(heat)
    words = format_cells(data.values) if isinstance(text, bool) else text
    if text is not False and words is not None:
        figure.add_scatter(**cell_texts(data.values, words, scale))
    set_ticks(figure, "x", data.labels[columns], columns, max_length=LABEL_LENGTHS.get(columns, 16))
    set_ticks(
        figure, "y", data.labels[rows], rows, first_on_top=down, max_ticks=30, max_length=LABEL_LENGTHS.get(rows, 16)
    )
    # 24 pixels a row within limits, and room for labels drawn at an angle.
    tall = {"height": max(150, min(24 * data.shape[0], 560)) + (110 if columns in STEEP_LABEL_AXES else 50)}
    known = {**({} if what == "value" else {"metric": what}), **data.about}
    return apply_style(figure, name or metric_title(data), known, (*notes, note), **(tall | (look or {})))  # type: ignore[arg-type]


def cell_texts(values: np.ndarray, words: np.ndarray, scale: Mapping[str, Any]) -> dict[str, Any]:
    """Return text over the cells of a heatmap, black or white by the cell's colour; none over nan and infinities."""
    y, x = np.nonzero(np.isfinite(values))
    font = {"size": 10, "color": text_colors(values[y, x], **scale)}
    return {"x": x, "y": y, "text": words[y, x].tolist(), "mode": "text", "textfont": font, "hoverinfo": "skip"}


def format_cells(values: np.ndarray) -> np.ndarray | None:
    """Return the numbers as text with the digits that the largest needs, or None if cells are too small or too many."""
    if values.shape[1] > 16 or values.size > MAX_WRITTEN_CELLS:
        return None
    most = finite_most(values)
    first = int(np.floor(np.log10(most))) if most else 0  # exponent of the largest number
    form = f"{{:.{max(0, (2 if first >= 0 else 1) - max(first, -5))}f}}"
    return np.array([[format_signed(form, v) for v in row] for row in values.tolist()], dtype=object)


def patch_grid(
    sweep: Numbers, labels: Labels = None, *, max_cells: int = MOST_CELLS, **look: Unpack[Look]
) -> go.Figure:
    """Draw the effects of a patching sweep over two axes, zero in the middle of the colour scale.

    For a Sweep, the hover shows the interval over pairs (`low`, `high`) and the null floor (`floor`); plain numbers
    [row, column] have none.
    """
    data = as_labelled(sweep, ("layer", "pos"), labels)
    name = f"Effect of patching {data.about['site']}" if "site" in data.about else "Effect of patching"
    known = [(word, getattr(sweep, name, None)) for word, name in (("from", "low"), ("to", "high"), ("null", "floor"))]
    sheets = [(word, to_float_array(sheet.values)) for word, sheet in known if sheet is not None]
    # A sweep over one pair has no interval: its sheets are all nan.
    sheets = [(word, values) for word, values in sheets if np.isfinite(values).any()]
    if not sheets or max(data.shape) > max_cells:
        return draw_heatmap(data, "effect", True, max_cells=max_cells, look=look, name=name)
    templates = {"from": "95 %% interval %s", "to": "to %s", "null": "null floor %s"}
    line = " ".join(templates[word] % f"%{{customdata[{i}]:.3g}}" for i, (word, _) in enumerate(sheets))
    more = (line, np.stack([values for _, values in sheets], -1))
    return draw_heatmap(data, "effect", True, max_cells=max_cells, look=look, hover=more, name=name)


def logit_lens(
    result: Any,
    show: str = "probability",
    *,
    prompt: Integer | str = 0,
    max_cells: int = MOST_CELLS,
    **look: Unpack[Look],
) -> go.Figure:
    """Draw the logit lens: layer upwards, position to the right, the most probable next tokens on hover.

    `result` is that of `analysis.logit_lens`. `show` is "probability" (of the most probable token), "kl" (nats to the
    model's output), "target_rank" or "target_probability". The most probable token is written in its cell, where there
    is room. Of more than `max_cells` positions, every nth is drawn.
    """
    sheets = {name: select_prompt(sheet, prompt) for name, sheet in result.sheets().items()}
    if show not in ("probability", "kl", "target_rank", "target_probability") or show not in sheets:
        raise ValueError(
            f"show is {show!r}; this result has {', '.join(n for n in sheets if n not in ('token', 'word'))}"
        )
    # Tokens cannot be pooled like numbers: draw every nth position.
    step = -(-sheets["kl"].shape[1] // read_integer(max_cells, "max_cells", least=1))
    word, probability = (sheets[name].stride("pos", step) for name in ("word", "probability"))
    data = sheets[show] if show != "probability" else sheets["probability"].at(rank=0)
    about = {key: text for key, text in data.about.items() if key != "direction"}
    data = Labelled(to_float_array(data.values), data.axes, data.labels, about).stride("pos", step)
    words: np.ndarray | bool = False
    if data.shape[1] <= 18:
        words = np.array([[escape_text(t, 8) for t in row] for row in word.values[..., 0]])
    note = f"one position of every {step} is drawn, of {sheets['kl'].shape[1]:,}" if step > 1 else ""
    name = {"probability": "Logit lens: the most probable next token after each layer"}.get(
        show, f"Logit lens: {data.about.get('metric', show)}"
    )
    more = ("%{customdata}", hover_candidates(word.values, probability.values))
    return draw_heatmap(
        data,
        show.replace("_", " "),
        False,
        max_cells=max_cells,
        look=look,
        text=words,
        hover=more,
        name=name,
        notes=(note,),
    )


def select_prompt(sheet: Labelled, prompt: Integer | str) -> Labelled:
    """Select one prompt, if the result has several."""
    return sheet.at(prompt=prompt) if "prompt" in sheet.axes else sheet


def hover_candidates(words: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return the most probable tokens of every cell as hover text."""
    flat = zip(words.reshape(-1, words.shape[-1]), probabilities.reshape(-1, words.shape[-1]), strict=True)
    cells = ["<br>".join(f"{p:.1%} {escape_text(w, 24)}" for w, p in zip(*cell, strict=True) if w) for cell in flat]
    return np.array(cells, dtype=object).reshape(words.shape[:-1])


def attention_pattern(
    pattern: Numbers,
    labels: Labels = None,
    *,
    value_norms: Numbers = None,
    max_cells: int = MOST_CELLS,
    **look: Unpack[Look],
) -> go.Figure:
    """Draw one head's attention [query, key], the first query on top.

    With `value_norms` [key] every weight is multiplied by the norm of the value at its key (Kobayashi et al. 2020,
    arXiv 2004.10102): a head can attend to a token whose value is near zero, and so move little from there.
    """
    data = as_labelled(pattern, ("query", "key"), labels)
    if value_norms is None:
        return draw_heatmap(
            data,
            "attention",
            signed=False,
            down=True,
            limits=(0, 1),
            max_cells=max_cells,
            look=look,
            text=False,
            name="Attention",
        )
    with np.errstate(invalid="ignore", over="ignore"):
        products = data.values * to_float_array(value_norms)[None, :]
    weighted = Labelled(products, data.axes, data.labels, data.about)
    return draw_heatmap(
        weighted,
        "attention × value norm",
        signed=False,
        down=True,
        max_cells=max_cells,
        look=look,
        text=False,
        name="Attention weighted by value norm",
    )


def head_scores(
    scores: Any,
    score: str = "induction",
    *,
    what: str = "score",
    n_kv_heads: int | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """Draw a number for every head [layer, head], layer 0 at the bottom, with lines between KV groups.

    Of a result with several scores, `score` is drawn; `what` names plain numbers. The lines need `n_kv_heads`.
    """
    sheets = scores.sheets() if hasattr(scores, "sheets") else {}
    if sheets and score not in sheets:
        raise ValueError(f"score is {score!r}; this result has {', '.join(sheets)}")
    data = as_labelled(sheets.get(score, scores), ("layer", "head"))
    chance = getattr(scores, "chance", {}).get(score)
    note = f"by chance {chance:.3f}" if chance is not None else ""
    named = score.replace("_", " ") if sheets else what
    name = f"{named.capitalize()} score of every head" if sheets else metric_title(data)
    figure = draw_heatmap(data, named, look=look, name=name, notes=(note,))
    if n_kv_heads:
        for head in range(0, data.shape[1], data.shape[1] // n_kv_heads)[1:]:
            figure.add_vline(head - 0.5, line={"color": GREY, "width": 2})
    return figure


def residual_norms(residual: Numbers, labels: Labels = None, **look: Unpack[Look]) -> go.Figure:
    """Draw the norm of the residual stream [layer, pos, model] at every layer and position."""
    data = as_labelled(residual, ("layer", "pos", "model"), labels)
    norms = np.linalg.norm(data.values.astype(np.float64), axis=-1)
    return draw_heatmap(drop_axis(data, norms, "model"), "norm", False, look=look, name="Norm of the residual stream")


def residual_angles(residual: Numbers, labels: Labels = None, **look: Unpack[Look]) -> go.Figure:
    """Draw the angle in degrees between the residual stream [layer, pos, model] after and before each layer."""
    data = as_labelled(residual, ("layer", "pos", "model"), labels)
    exact = data.values.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a stream with an infinite number has no direction: the angle is nan
        unit = exact / np.maximum(np.linalg.norm(exact, axis=-1, keepdims=True), 1e-30)
        angles = np.degrees(np.arccos(np.clip((unit[1:] * unit[:-1]).sum(-1), -1, 1)))
    later = Labelled(data.values[1:], data.axes, {**data.labels, "layer": data.labels["layer"][1:]}, data.about)
    name = "Angle between the residual stream after each layer and before it"
    return draw_heatmap(drop_axis(later, angles, "model"), "degrees", False, look=look, name=name)


def drop_axis(data: Labelled, values: np.ndarray, axis: str) -> Labelled:
    """Return numbers with the labels of `data`, without one axis."""
    axes = tuple(a for a in data.axes if a != axis)
    about: Mapping[str, str] = {key: text for key, text in data.about.items() if key not in ("metric", "direction")}
    return Labelled(values, axes, {a: data.labels[a] for a in axes}, about)
