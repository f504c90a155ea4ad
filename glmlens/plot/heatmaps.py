"""Heatmaps: numbers by two axes, patching grids, the logit lens, attention, head scores, the residual stream."""

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

STEEP_LABEL_AXES = ("pos", "key", "part")  # axes whose labels are drawn steeply
LABEL_LENGTHS = {"part": 28, "pair": 28}  # characters of labels that name wavelengths
MAX_WRITTEN_CELLS = 400  # so many cells have their number written in them


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
    """Numbers with two axes as colours, the first axis upwards (with `down`, downwards) and the second to the right.

    Signed numbers have zero in the middle of the colours; without `signed`, those are signed of which any is negative.
    `limits` are the ends of the colours.
    """
    return draw_heatmap(as_labelled(data, list_axes(axes), labels), what, signed, down, limits, max_cells, look)


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
    """The heatmap of labelled numbers.

    `text` is written in the cells, or the numbers, or with False nothing; `more` is a line of hover and its data.
    """
    whole = data.values
    signed = bool(whole[np.isfinite(whole)].min(initial=0) < 0) if signed is None else signed
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
    tall = {"height": max(150, min(24 * data.shape[0], 560)) + (110 if columns in STEEP_LABEL_AXES else 50)}
    known = {**({} if what == "value" else {"metric": what}), **data.about}
    return apply_style(figure, name or metric_title(data), known, (*notes, note), **(tall | (look or {})))  # type: ignore[arg-type]


def cell_texts(values: np.ndarray, words: np.ndarray, scale: Mapping[str, Any]) -> dict[str, Any]:
    """Words over the cells of a heatmap, black or white by its scale; nothing over a cell that is not known."""
    y, x = np.nonzero(np.isfinite(values))
    font = {"size": 10, "color": text_colors(values[y, x], **scale)}
    return {"x": x, "y": y, "text": words[y, x].tolist(), "mode": "text", "textfont": font, "hoverinfo": "skip"}


def format_cells(values: np.ndarray) -> np.ndarray | None:
    """Numbers as they are written in their cells, where they have room."""
    if values.shape[1] > 16 or values.size > MAX_WRITTEN_CELLS:
        return None
    most = finite_most(values)
    first = int(np.floor(np.log10(most))) if most else 0  # the place of the largest number's first digit
    form = f"{{:.{max(0, (2 if first >= 0 else 1) - max(first, -5))}f}}"
    return np.array([[format_signed(form, v) for v in row] for row in values.tolist()], dtype=object)


def patch_grid(
    sweep: Numbers, labels: Labels = None, *, max_cells: int = MOST_CELLS, **look: Unpack[Look]
) -> go.Figure:
    """Effects of a sweep over two axes, zero in the middle; on hover the interval over pairs and the null's floor.

    A Sweep brings its interval (`low`, `high`) and `floor`; plain numbers [row, column] have none.
    """
    data = as_labelled(sweep, ("layer", "pos"), labels)
    name = f"Effect of patching {data.about['site']}" if "site" in data.about else "Effect of patching"
    known = [(word, getattr(sweep, name, None)) for word, name in (("from", "low"), ("to", "high"), ("null", "floor"))]
    sheets = [(word, to_float_array(sheet.values)) for word, sheet in known if sheet is not None]
    sheets = [(word, values) for word, values in sheets if np.isfinite(values).any()]
    if not sheets or max(data.shape) > max_cells:
        return draw_heatmap(data, "effect", True, max_cells=max_cells, look=look, name=name)
    lines = {"from": "95 %% interval %s", "to": "to %s", "null": "null floor %s"}
    said = " ".join(lines[word] % f"%{{customdata[{i}]:.3g}}" for i, (word, _) in enumerate(sheets))
    more = (said, np.stack([values for _, values in sheets], -1))
    return draw_heatmap(data, "effect", True, max_cells=max_cells, look=look, hover=more, name=name)


def logit_lens(
    result: Any,
    show: str = "probability",
    *,
    prompt: Integer | str = 0,
    max_cells: int = MOST_CELLS,
    **look: Unpack[Look],
) -> go.Figure:
    """What every layer would say next: layer upwards, position to the right, the most probable tokens on hover.

    `show` colours by "probability" (of the most probable token), "kl" (nats to the model's output), "target_rank" or
    "target_probability". Where there is room the most probable token is written in its cell. Of more positions than
    `max_cells`, every so many are drawn.
    """
    sheets = {name: select_prompt(sheet, prompt) for name, sheet in result.sheets().items()}
    if show not in ("probability", "kl", "target_rank", "target_probability") or show not in sheets:
        raise ValueError(
            f"show is {show!r}; this result has {', '.join(n for n in sheets if n not in ('token', 'word'))}"
        )
    step = -(-sheets["kl"].shape[1] // read_integer(max_cells, "max_cells", least=1))
    word, probability = (sheets[name].stride("pos", step) for name in ("word", "probability"))
    data = sheets[show] if show != "probability" else sheets["probability"].at(rank=0)
    about = {key: said for key, said in data.about.items() if key != "direction"}
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
    """One prompt of a result of several."""
    return sheet.at(prompt=prompt) if "prompt" in sheet.axes else sheet


def hover_candidates(words: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """The most probable tokens of every cell as lines of hover."""
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
    """One head's attention [query, key], the first query on top.

    With `value_norms` [key] every weight is multiplied by the length of the value it brings (Kobayashi et al. 2020,
    arXiv 2004.10102): little of what is attended to may be taken.
    """
    data = as_labelled(pattern, ("query", "key"), labels)
    if value_norms is None:
        return draw_heatmap(data, "attention", False, True, (0, 1), max_cells, look, False, name="Attention")
    with np.errstate(invalid="ignore", over="ignore"):
        products = data.values * to_float_array(value_norms)[None, :]
    weighted = Labelled(products, data.axes, data.labels, data.about)
    return draw_heatmap(
        weighted, "attention x length of value", False, True, None, max_cells, look, False, name="Attention by value"
    )


def head_scores(
    scores: Any,
    score: str = "induction",
    *,
    what: str = "score",
    n_kv_heads: int | None = None,
    **look: Unpack[Look],
) -> go.Figure:
    """A number for every head [layer, head], layer 0 at the bottom; lines part the groups that share a key-value head.

    Of a result with several scores, `score` is the one that is drawn; `what` says what plain numbers are.
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
    """The length of the residual stream [layer, pos, model] after every layer and at every position."""
    data = as_labelled(residual, ("layer", "pos", "model"), labels)
    norms = np.linalg.norm(data.values.astype(np.float64), axis=-1)
    return draw_heatmap(
        drop_axis(data, norms, "model"), "length", False, look=look, name="Length of the residual stream"
    )


def residual_angles(residual: Numbers, labels: Labels = None, **look: Unpack[Look]) -> go.Figure:
    """Degrees by which each layer turns the residual stream [layer, pos, model] from what it was a layer before."""
    data = as_labelled(residual, ("layer", "pos", "model"), labels)
    exact = data.values.astype(np.float64)
    with np.errstate(invalid="ignore"):  # a stream with an infinite number has no direction: nan
        unit = exact / np.maximum(np.linalg.norm(exact, axis=-1, keepdims=True), 1e-30)
        turned = np.degrees(np.arccos(np.clip((unit[1:] * unit[:-1]).sum(-1), -1, 1)))
    later = Labelled(data.values[1:], data.axes, {**data.labels, "layer": data.labels["layer"][1:]}, data.about)
    name = "Angle between the residual stream after each layer and before it"
    return draw_heatmap(drop_axis(later, turned, "model"), "degrees", False, look=look, name=name)


def drop_axis(data: Labelled, values: np.ndarray, axis: str) -> Labelled:
    """Numbers with the labels of `data` but for one axis."""
    axes = tuple(a for a in data.axes if a != axis)
    about: Mapping[str, str] = {key: said for key, said in data.about.items() if key not in ("metric", "direction")}
    return Labelled(values, axes, {a: data.labels[a] for a in axes}, about)
