"""Patching: two prompts, a grid of effects, and what one cell of it does to the logits and to attention."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.pattern import pattern, pattern_points
from glmlens.lens import Lens
from glmlens.patch.changes import Swap, ids
from glmlens.patch.grid import attribute, places
from glmlens.patch.interventions import Intervention
from glmlens.patch.metrics import Metric, as_metric
from glmlens.patch.running import Applied
from glmlens.patch.sites import Atlas, PatchError, Site
from glmlens.patch.sweep import Sweep, sweep
from glmlens.plot import heatmap, patch_grid
from glmlens.plot.bars import bars
from glmlens.plot.style import visible
from glmlens.results import Labelled
from glmlens.tasks.task import Examples
from glmlens.widgets.base import Explorer
from glmlens.widgets.chart import Chart

SITES = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "attn.z", "attn.q", "attn.k", "attn.v", "kv.k", "kv.v")
SITES += ("attn.pattern",)
OVER = ("pos", "head", "kv")
DIFFERENCE, CHANCE = "logit difference", "probability"
VIEWS = {"logits": "logits", "attention of all heads": "heads", "attention of one head": "head"}
Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Pass:
    """What a run said: the last logits, and the pattern of every layer."""

    logits: Float[Tensor, "vocab"]
    patterns: Float[Tensor, "layer head query key"]


@dataclass(frozen=True, eq=False)
class Found:
    """A sweep of one pair of prompts, its two plain runs by name, and what a cell puts in."""

    sweep: Sweep
    runs: Mapping[str, Pass]
    base: tuple[int, ...]
    source: tuple[int, ...]
    site: Site
    grid: Mapping[str, list[Any]]
    answers: tuple[int, int]

    def cell(self, row: int, column: int) -> Intervention:
        """The change that stands at a cell of the grid."""
        where = {
            attribute(self.site, axis): here[i]
            for (axis, here), i in zip(self.grid.items(), (row, column), strict=True)
        }
        return Intervention(self.site.at(**where), Swap(self.source))


class PatchExplorer(Explorer):
    """Where a difference between two prompts lives: a grid of effects, each cell of which can be run again.

    `clean` and `corrupt` are texts of as many tokens, and `answers` the right and the wrong next token; or `clean` are
    a task's Examples and `corrupt` the name of a counterfactual, and a slider chooses among them. `metrics` are more
    metrics by name, functions of logits [row, vocab] to a number per row. Places: row and column of the grid, view
    ("logits", "heads", "head"), layer and head whose attention is shown, example.
    """

    def __init__(
        self,
        lens: Lens,
        clean: str | Examples,
        corrupt: str | None = None,
        answers: tuple[str, str] | None = None,
        *,
        metrics: Mapping[str, Measure] | None = None,
    ):
        self.examples = clean if isinstance(clean, Examples) else None
        self.counterfactual = corrupt if self.examples else None
        self.measures = dict(metrics or {})
        self.found: Found | None = None
        self.again: tuple[tuple[int, int], Pass] | None = None
        texts = self.texts(0) if self.examples else asked(clean, corrupt, answers)
        wide, narrow = {"width": "min(480px, 95%)"}, {"width": "200px"}
        names = {"clean": wide, "corrupt": wide, "right": narrow, "wrong": narrow}
        boxes = {name: W.Text(texts[name], description=name, layout=layout) for name, layout in names.items()}
        sites = [site for site in SITES if any(name.endswith(f".{site}") for name in Atlas(lens).points)]
        inputs = {
            **boxes,
            "site": W.Dropdown(options=sites, description="site"),
            "over": W.Dropdown(options=OVER, description="layer by"),
            "direction": W.Dropdown(options=["denoise", "noise"], description="direction"),
            "metric": W.Dropdown(options=[DIFFERENCE, CHANCE, *self.measures], description="metric"),
        }
        places = {
            "row": W.IntSlider(0, 0, 0, description="row"),
            "column": W.IntSlider(0, 0, 0, description="column"),
            "view": W.ToggleButtons(options=list(VIEWS.items()), value="logits", style={"button_width": "auto"}),
            "layer": W.IntSlider(0, 0, lens.cfg.n_layers - 1, description="layer"),
            "head": W.IntSlider(0, 0, lens.cfg.n_heads - 1, description="head"),
            "example": W.IntSlider(0, 0, len(self.examples) - 1 if self.examples else 0, description="example"),
        }
        places["example"].disabled = not self.examples
        self.grid = Chart(lambda row, column: self.asked(row=row, column=column))
        self.detail = Chart(self.clicked)
        given = texts | {name: control.value for name, control in inputs.items() if name not in texts}
        super().__init__(lens, inputs, places, [self.grid, self.detail], given)
        self.first()

    def texts(self, i: int) -> dict[str, str]:
        """The prompts and answers of an example of the task."""
        assert self.examples is not None
        example, task = self.examples[i], self.examples.task
        name = self.counterfactual or next(iter(task.counterfactuals))
        if name not in example.item.counterfactuals:
            raise PatchError(f"{task.name} has no counterfactual {name!r}; it has {', '.join(task.counterfactuals)}")
        other, item = example.item.counterfactuals[name], example.item
        return {"clean": item.text, "corrupt": other.text, "right": item.correct[0], "wrong": item.wrong[0]}

    def compute(self, inputs: Mapping[str, Any]) -> Found:
        lens, where, over = self.lens, Site(inputs["site"]), inputs["over"]
        (one,), (other,) = ids(lens, inputs["clean"]), ids(lens, inputs["corrupt"])
        answers = lens.to_single_token(inputs["right"]), lens.to_single_token(inputs["wrong"])
        metric, direction = inputs["metric"], inputs["direction"]
        axes = ("layer", over)
        grid = {axis: places(Atlas(lens), where, axis, [one]) for axis in axes}
        watched = self.watched(self.measure(metric, answers), int(np.prod([len(here) for here in grid.values()])))
        grids = sweep(lens, [list(one)], [list(other)], where, over=axes, metric=watched, direction=direction,
                      normalise=metric not in self.measures, progress=False)  # fmt: skip
        runs = {"clean": self.passed(one), "corrupt": self.passed(other)}
        base, source = (other, one) if direction == "denoise" else (one, other)
        return Found(grids, runs, base, source, where, grid, answers)

    def measure(self, name: str, answers: tuple[int, int]) -> Metric:
        """The metric of this name."""
        if name == DIFFERENCE:
            return as_metric(answers, self.lens, 1)
        of = self.measures.get(name, lambda logits: logits.softmax(-1)[:, answers[0]])
        return Metric(name, lambda logits, _: of(logits[:, -1]))

    def watched(self, metric: Metric, total: int) -> Metric:
        """The metric, that says how many cells are done and can be stopped."""
        done = 0

        def of(logits: Tensor, example: Tensor) -> Tensor:
            nonlocal done
            self.tick(min(done, total), total, "cells")
            done += len(logits)
            return metric.of(logits, example)

        return replace(metric, of=of)

    def passed(self, tokens: tuple[int, ...], change: Intervention | None = None) -> Pass:
        """A run of these tokens, with a change."""
        lens, n = self.lens, len(tokens)
        hooks = [] if change is None else Applied.to(lens, [change], n, {"end": n - 1}).hooks
        row = torch.tensor([tokens], device=lens.device)
        logits, acts = lens.run_with_cache(row, pattern_points(lens), hooks, attention_mask=torch.ones_like(row))
        at = torch.arange(n, device=lens.device)[None]
        patterns = [pattern(acts, layer, at, at)[0].float() for layer in range(lens.cfg.n_layers)]
        assert logits is not None
        return Pass(logits[0, -1].float(), torch.stack(patterns))

    def select(self, **places: Any) -> None:
        """Look at another cell (row, column), at it in another way (view, layer, head), or at another example.

        Another example is run, and a cell given with it is one of its grid. ValueError for a place that is not there.
        """
        before = self._state.get("example")
        later = ("row", "column") if places.get("example", before) != before else ()
        cell = {name: places.pop(name) for name in later if name in places}
        super().select(**places)
        if self._state["example"] != before:
            self.run(**self.texts(self._state["example"]))
            super().select(**cell)

    def moved(self, name: str, value: Any) -> None:
        if name != "example" or self.quiet:
            super().moved(name, value)
            return
        self.wanted |= self.texts(value)
        self._state["example"] = value
        self.start()  # of its own, so that it can be stopped

    def show(self, found: Found | None = None) -> None:
        if found is not None:
            self.found, self.again = found, None
            for name, size in zip(("row", "column"), found.sweep.shape, strict=True):
                self.places[name].max = size - 1
            best = np.nanargmax(np.abs(np.nan_to_num(found.sweep.values)))
            self._state |= dict(
                zip(("row", "column"), map(int, np.unravel_index(best, found.sweep.shape)), strict=True)
            )
        if self.found is None:
            return
        cell = self._state["row"], self._state["column"]
        if self.again is None or self.again[0] != cell:
            self.again = cell, self.passed(self.found.base, self.found.cell(*cell))
        if found is not None:
            self.grid.draw(self.grid_figure(), cell)
        else:
            self.grid.mark(cell)
        self.detail.draw(self.detail_figure())

    def grid_figure(self) -> go.Figure:
        swept = self.drawn_from().sweep
        note = "" if swept.finished else "stopped: the cells without a colour were not run · "
        said = f"{note}{swept.about['metric']} · {swept.about['direction']} · {swept.about['baselines']}"
        labels = {axis: [visible(label) for label in swept.labels[axis]] for axis in swept.axes}
        return patch_grid(Labelled(swept.values, swept.axes, labels, swept.about), subtitle=said)

    def drawn_from(self) -> Found:
        if self.found is None:
            raise ValueError("nothing has been run yet: run()")
        return self.found

    def detail_figure(self) -> go.Figure:
        """What the chosen cell does, in the chosen view."""
        return {"logits": self.logits, "heads": self.all_heads, "head": self.one_head}[self._state["view"]]()

    def where(self) -> str:
        """The chosen cell in words."""
        swept, cell = self.drawn_from().sweep, (self._state["row"], self._state["column"])
        return ", ".join(f"{axis} {label}" for axis, label in zip(swept.axes, swept.labels_at(cell), strict=True))

    def runs(self) -> tuple[Pass, Pass]:
        """The run that is changed, and the changed run."""
        found = self.drawn_from()
        assert self.again is not None
        return found.runs["corrupt" if self._state["direction"] == "denoise" else "clean"], self.again[1]

    def logits(self) -> go.Figure:
        """The change of the logits of the answers and of the tokens that the changed run says."""
        found, (base, changed) = self.drawn_from(), self.runs()
        tokens = list(dict.fromkeys([*found.answers, *changed.logits.topk(4).indices.tolist(),
                                     *base.logits.topk(4).indices.tolist()]))  # fmt: skip
        names = self.lens.to_labels(torch.tensor([tokens]))
        chances = [run.logits.softmax(-1)[tokens].tolist() for run in (base, changed)]
        labels = [f"{visible(name)} {a:.1%} → {b:.1%}" for name, a, b in zip(names, *chances, strict=True)]
        change = (changed.logits - base.logits)[tokens]
        title = f"What {found.site.point} at {self.where()} does to the logits"
        return bars(change, {"part": labels}, what="logits", title=title, subtitle="token, probability before → after")

    def all_heads(self) -> go.Figure:
        """How much of its attention each head moves elsewhere: half the summed differences, mean over queries."""
        base, changed = self.runs()
        moved = (changed.patterns - base.patterns).abs().sum(-1).mean(-1) / 2
        title = f"Attention moved elsewhere by {self.drawn_from().site.point} at {self.where()}"
        return heatmap(moved, axes=("layer", "head"), what="share moved", signed=False, title=title,
                       subtitle="mean over queries; a click shows that head")  # fmt: skip

    def one_head(self) -> go.Figure:
        """How one head's attention changes, query by key."""
        base, changed = self.runs()
        layer, head = self._state["layer"], self._state["head"]
        change = (changed.patterns - base.patterns)[layer, head]
        labels = [
            f"{i} {visible(t)}" for i, t in enumerate(self.lens.to_labels(torch.tensor([self.drawn_from().base])))
        ]
        title = f"Change of attention of head {layer}.{head} by {self.drawn_from().site.point} at {self.where()}"
        named = {"query": labels, "key": labels}
        return heatmap(change, named, axes=("query", "key"), what="change", signed=True, down=True, title=title)

    def clicked(self, *place: int) -> None:
        if self._state["view"] == "heads" and len(place) == 2:
            self.asked(layer=place[0], head=place[1], view="head")

    def figure(self) -> go.Figure:
        """The grid of effects."""
        self.alive()
        return self.grid_figure()


def asked(clean: Any, corrupt: Any, answers: Any) -> dict[str, str]:
    if not isinstance(clean, str) or not isinstance(corrupt, str) or answers is None:
        raise PatchError(
            "a PatchExplorer takes two texts and answers=(right, wrong), or a task's Examples; "
            f"got {type(clean).__name__}, {type(corrupt).__name__} and answers {answers!r}"
        )
    return {"clean": clean, "corrupt": corrupt, "right": answers[0], "wrong": answers[1]}
