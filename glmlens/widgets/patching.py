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

from glmlens.analysis.attention import layer_pattern, pattern_points
from glmlens.lens import Lens
from glmlens.patch.apply import AppliedInterventions
from glmlens.patch.grid import list_places, site_field
from glmlens.patch.interventions import Intervention
from glmlens.patch.metrics import Metric, as_metric
from glmlens.patch.sites import PatchError, Site, SiteResolver
from glmlens.patch.sweep import Sweep, sweep
from glmlens.patch.values import Swap, to_token_ids
from glmlens.plot import heatmap, patch_grid
from glmlens.plot.bars import bars
from glmlens.plot.style import show_control_characters
from glmlens.results import Labelled
from glmlens.tasks.task import Examples
from glmlens.widgets.base import Explorer
from glmlens.widgets.chart import Chart

SITE_OPTIONS = ("resid_pre", "resid_mid", "attn_out", "mlp_out", "attn.z", "attn.q", "attn.k", "attn.v", "kv.k", "kv.v")
SITE_OPTIONS += ("attn.pattern",)
GRID_AXES = ("pos", "head", "kv")
DIFFERENCE_METRIC, PROBABILITY_METRIC = "logit difference", "probability"
VIEW_OPTIONS = {"logits": "logits", "attention of all heads": "heads", "attention of one head": "head"}
LogitsFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class RunOutputs:
    """What a run said: the last logits, and the pattern of every layer."""

    logits: Float[Tensor, "vocab"]
    patterns: Float[Tensor, "layer head query key"]


@dataclass(frozen=True, eq=False)
class PatchResult:
    """A sweep of one pair of prompts, its two plain runs by name, and what a cell puts in."""

    sweep: Sweep
    plain_runs: Mapping[str, RunOutputs]
    base: tuple[int, ...]
    source: tuple[int, ...]
    site: Site
    grid: Mapping[str, list[Any]]
    answers: tuple[int, int]

    def intervention_at(self, row: int, column: int) -> Intervention:
        """The change that stands at a cell of the grid."""
        where = {
            site_field(self.site, axis): here[i]
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
        metrics: Mapping[str, LogitsFunction] | None = None,
    ):
        self.examples = clean if isinstance(clean, Examples) else None
        self.counterfactual = corrupt if self.examples else None
        self.extra_metrics = dict(metrics or {})
        self.result: PatchResult | None = None
        self.changed_run: tuple[tuple[int, int], RunOutputs] | None = None
        texts = self.example_texts(0) if self.examples else check_texts(clean, corrupt, answers)
        wide, narrow = {"width": "min(480px, 95%)"}, {"width": "200px"}
        names = {"clean": wide, "corrupt": wide, "right": narrow, "wrong": narrow}
        boxes = {name: W.Text(texts[name], description=name, layout=layout) for name, layout in names.items()}
        sites = [site for site in SITE_OPTIONS if any(name.endswith(f".{site}") for name in SiteResolver(lens).points)]
        inputs = {
            **boxes,
            "site": W.Dropdown(options=sites, description="site"),
            "over": W.Dropdown(options=GRID_AXES, description="layer by"),
            "direction": W.Dropdown(options=["denoise", "noise"], description="direction"),
            "metric": W.Dropdown(
                options=[DIFFERENCE_METRIC, PROBABILITY_METRIC, *self.extra_metrics], description="metric"
            ),
        }
        places = {
            "row": W.IntSlider(0, 0, 0, description="row"),
            "column": W.IntSlider(0, 0, 0, description="column"),
            "view": W.ToggleButtons(options=list(VIEW_OPTIONS.items()), value="logits", style={"button_width": "auto"}),
            "layer": W.IntSlider(0, 0, lens.cfg.n_layers - 1, description="layer"),
            "head": W.IntSlider(0, 0, lens.cfg.n_heads - 1, description="head"),
            "example": W.IntSlider(0, 0, len(self.examples) - 1 if self.examples else 0, description="example"),
        }
        places["example"].disabled = not self.examples
        self.grid_chart = Chart(lambda row, column: self.select_safely(row=row, column=column))
        self.detail_chart = Chart(self.on_detail_click)
        given = texts | {name: control.value for name, control in inputs.items() if name not in texts}
        super().__init__(lens, inputs, places, [self.grid_chart, self.detail_chart], given)
        self.run_first()

    def example_texts(self, i: int) -> dict[str, str]:
        """The prompts and answers of an example of the task."""
        assert self.examples is not None
        example, task = self.examples[i], self.examples.task
        name = self.counterfactual or next(iter(task.counterfactuals))
        if name not in example.item.counterfactuals:
            raise PatchError(f"{task.name} has no counterfactual {name!r}; it has {', '.join(task.counterfactuals)}")
        other, item = example.item.counterfactuals[name], example.item
        return {"clean": item.text, "corrupt": other.text, "right": item.correct[0], "wrong": item.wrong[0]}

    def compute(self, inputs: Mapping[str, Any]) -> PatchResult:
        lens, where, over = self.lens, Site(inputs["site"]), inputs["over"]
        (one,), (other,) = to_token_ids(lens, inputs["clean"]), to_token_ids(lens, inputs["corrupt"])
        answers = lens.to_single_token(inputs["right"]), lens.to_single_token(inputs["wrong"])
        metric, direction = inputs["metric"], inputs["direction"]
        axes = ("layer", over)
        grid = {axis: list_places(SiteResolver(lens), where, axis, [one]) for axis in axes}
        watched = self.report_metric(
            self.make_metric(metric, answers), int(np.prod([len(here) for here in grid.values()]))
        )
        grids = sweep(lens, [list(one)], [list(other)], where, over=axes, metric=watched, direction=direction,
                      normalise=metric not in self.extra_metrics, progress=False)  # fmt: skip
        runs = {"clean": self.run_prompt(one), "corrupt": self.run_prompt(other)}
        base, source = (other, one) if direction == "denoise" else (one, other)
        return PatchResult(grids, runs, base, source, where, grid, answers)

    def make_metric(self, name: str, answers: tuple[int, int]) -> Metric:
        """The metric of this name."""
        if name == DIFFERENCE_METRIC:
            return as_metric(answers, self.lens, 1)
        of = self.extra_metrics.get(name, lambda logits: logits.softmax(-1)[:, answers[0]])
        return Metric(name, lambda logits, _: of(logits[:, -1]))

    def report_metric(self, metric: Metric, total: int) -> Metric:
        """The metric, that says how many cells are done and can be stopped."""
        done = 0

        def of(logits: Tensor, example: Tensor) -> Tensor:
            nonlocal done
            self.report_progress(min(done, total), total, "cells")
            done += len(logits)
            return metric.of(logits, example)

        return replace(metric, of=of)

    def run_prompt(self, tokens: tuple[int, ...], change: Intervention | None = None) -> RunOutputs:
        """A run of these tokens, with a change."""
        lens, n = self.lens, len(tokens)
        hooks = [] if change is None else AppliedInterventions.compile(lens, [change], n, {"end": n - 1}).hooks
        row = torch.tensor([tokens], device=lens.device)
        logits, acts = lens.run_with_cache(row, pattern_points(lens), hooks, attention_mask=torch.ones_like(row))
        at = torch.arange(n, device=lens.device)[None]
        patterns = [layer_pattern(acts, layer, at, at)[0].float() for layer in range(lens.cfg.n_layers)]
        assert logits is not None
        return RunOutputs(logits[0, -1].float(), torch.stack(patterns))

    def select(self, **places: Any) -> None:
        """Look at another cell (row, column), at it in another way (view, layer, head), or at another example.

        Another example is run, and a cell given with it is one of its grid. ValueError for a place that is not there.
        """
        before = self._state.get("example")
        later = ("row", "column") if places.get("example", before) != before else ()
        cell = {name: places.pop(name) for name in later if name in places}
        super().select(**places)
        if self._state["example"] != before:
            self.run(**self.example_texts(self._state["example"]))
            super().select(**cell)

    def on_place_change(self, name: str, value: Any) -> None:
        if name != "example" or self.quiet:
            super().on_place_change(name, value)
            return
        self.pending_inputs |= self.example_texts(value)
        self._state["example"] = value
        self.start()  # of its own, so that it can be stopped

    def show(self, result: PatchResult | None = None) -> None:
        if result is not None:
            self.result, self.changed_run = result, None
            for name, size in zip(("row", "column"), result.sweep.shape, strict=True):
                self.places[name].max = size - 1
            best = np.nanargmax(np.abs(np.nan_to_num(result.sweep.values)))
            self._state |= dict(
                zip(("row", "column"), map(int, np.unravel_index(best, result.sweep.shape)), strict=True)
            )
        if self.result is None:
            return
        cell = self._state["row"], self._state["column"]
        if self.changed_run is None or self.changed_run[0] != cell:
            self.changed_run = cell, self.run_prompt(self.result.base, self.result.intervention_at(*cell))
        if result is not None:
            self.grid_chart.draw(self.grid_figure(), cell)
        else:
            self.grid_chart.mark(cell)
        self.detail_chart.draw(self.detail_figure())

    def grid_figure(self) -> go.Figure:
        swept = self.require_result().sweep
        note = "" if swept.finished else "stopped: the cells without a colour were not run · "
        said = f"{note}{swept.about['metric']} · {swept.about['direction']} · {swept.about['baselines']}"
        labels = {axis: [show_control_characters(label) for label in swept.labels[axis]] for axis in swept.axes}
        return patch_grid(Labelled(swept.values, swept.axes, labels, swept.about), subtitle=said)

    def require_result(self) -> PatchResult:
        if self.result is None:
            raise ValueError("nothing has been run yet: run()")
        return self.result

    def detail_figure(self) -> go.Figure:
        """What the chosen cell does, in the chosen view."""
        return {"logits": self.logits_figure, "heads": self.heads_figure, "head": self.head_figure}[
            self._state["view"]
        ]()

    def describe_cell(self) -> str:
        """The chosen cell in words."""
        swept, cell = self.require_result().sweep, (self._state["row"], self._state["column"])
        return ", ".join(f"{axis} {label}" for axis, label in zip(swept.axes, swept.labels_at(cell), strict=True))

    def base_and_changed_run(self) -> tuple[RunOutputs, RunOutputs]:
        """The run that is changed, and the changed run."""
        found = self.require_result()
        assert self.changed_run is not None
        return found.plain_runs["corrupt" if self._state["direction"] == "denoise" else "clean"], self.changed_run[1]

    def logits_figure(self) -> go.Figure:
        """The change of the logits of the answers and of the tokens that the changed run says."""
        found, (base, changed) = self.require_result(), self.base_and_changed_run()
        tokens = list(dict.fromkeys([*found.answers, *changed.logits.topk(4).indices.tolist(),
                                     *base.logits.topk(4).indices.tolist()]))  # fmt: skip
        names = self.lens.to_labels(torch.tensor([tokens]))
        chances = [run.logits.softmax(-1)[tokens].tolist() for run in (base, changed)]
        labels = [
            f"{show_control_characters(name)} {a:.1%} → {b:.1%}" for name, a, b in zip(names, *chances, strict=True)
        ]
        change = (changed.logits - base.logits)[tokens]
        title = f"What {found.site.point} at {self.describe_cell()} does to the logits"
        return bars(change, {"part": labels}, what="logits", title=title, subtitle="token, probability before → after")

    def heads_figure(self) -> go.Figure:
        """How much of its attention each head moves elsewhere: half the summed differences, mean over queries."""
        base, changed = self.base_and_changed_run()
        moved = (changed.patterns - base.patterns).abs().sum(-1).mean(-1) / 2
        title = f"Attention moved elsewhere by {self.require_result().site.point} at {self.describe_cell()}"
        return heatmap(moved, axes=("layer", "head"), what="share moved", signed=False, title=title,
                       subtitle="mean over queries; a click shows that head")  # fmt: skip

    def head_figure(self) -> go.Figure:
        """How one head's attention changes, query by key."""
        base, changed = self.base_and_changed_run()
        layer, head = self._state["layer"], self._state["head"]
        change = (changed.patterns - base.patterns)[layer, head]
        labels = [
            f"{i} {show_control_characters(t)}"
            for i, t in enumerate(self.lens.to_labels(torch.tensor([self.require_result().base])))
        ]
        title = f"Change of attention of head {layer}.{head} by {self.require_result().site.point} at {self.describe_cell()}"
        named = {"query": labels, "key": labels}
        return heatmap(change, named, axes=("query", "key"), what="change", signed=True, down=True, title=title)

    def on_detail_click(self, *place: int) -> None:
        if self._state["view"] == "heads" and len(place) == 2:
            self.select_safely(layer=place[0], head=place[1], view="head")

    def figure(self) -> go.Figure:
        """The grid of effects."""
        self.require_open()
        return self.grid_figure()


def check_texts(clean: Any, corrupt: Any, answers: Any) -> dict[str, str]:
    if not isinstance(clean, str) or not isinstance(corrupt, str) or answers is None:
        raise PatchError(
            "a PatchExplorer takes two texts and answers=(right, wrong), or a task's Examples; "
            f"got {type(clean).__name__}, {type(corrupt).__name__} and answers {answers!r}"
        )
    return {"clean": clean, "corrupt": corrupt, "right": answers[0], "wrong": answers[1]}
