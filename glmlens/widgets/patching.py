"""Patching: two prompts, a grid of effects, and the change of logits and attention by one cell of it."""

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
from glmlens.patch.interventions import Intervention
from glmlens.patch.metrics import Metric, as_metric
from glmlens.patch.replacement_values import Swap, to_token_ids
from glmlens.patch.sites import PatchError, Site, SiteResolver
from glmlens.patch.sweep import Sweep, sweep
from glmlens.patch.sweep_axes import list_places, site_field
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
    """Outputs of a run: the logits at the last position, and the attention patterns of every layer."""

    logits: Float[Tensor, "vocab"]
    patterns: Float[Tensor, "layer head query key"]


@dataclass(frozen=True, eq=False)
class PatchResult:
    """A sweep of one pair of prompts, and the unpatched runs "clean" and "corrupt".

    A cell patches activations of `source` into a run of `base` (token ids). `grid` holds the places along each axis.
    """

    sweep: Sweep
    plain_runs: Mapping[str, RunOutputs]
    base: tuple[int, ...]
    source: tuple[int, ...]
    site: Site
    grid: Mapping[str, list[Any]]
    answers: tuple[int, int]

    def intervention_at(self, row: int, column: int) -> Intervention:
        """Return the intervention of a cell of the grid."""
        where = {
            site_field(self.site, axis): here[i]
            for (axis, here), i in zip(self.grid.items(), (row, column), strict=True)
        }
        return Intervention(self.site.at(**where), Swap(self.source))


class PatchExplorer(Explorer):
    """Explore activation patching between two prompts: a grid of effects, and the outputs of the run of any cell.

    `clean` and `corrupt` are texts of equally many tokens, and `answers` the right and the wrong next token. Or `clean`
    is a task's Examples and `corrupt` the name of a counterfactual (by default the first), and a slider selects the
    example. `metrics` are further metrics by name: functions of logits [row, vocab] that return a number per row.
    Places: row and column of the grid, view ("logits", "heads", "head"), layer and head whose attention is shown,
    example. Raises PatchError for other arguments.
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
            "over": W.Dropdown(options=GRID_AXES, description="grid: layer ×", style={"description_width": "initial"}),
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
        charts = [self.grid_chart, self.detail_chart]
        super().__init__(lens, inputs, places, views=charts, initial_state=given)
        self.run_first()

    def example_texts(self, i: int) -> dict[str, str]:
        """Return the prompts and answers of an example of the task."""
        assert self.examples is not None
        example = self.examples[i]
        task = self.examples.task
        name = self.counterfactual or next(iter(task.counterfactuals))
        if name not in example.item.counterfactuals:
            raise PatchError(f"{task.name} has no counterfactual {name!r}; it has {', '.join(task.counterfactuals)}")
        other = example.item.counterfactuals[name]
        item = example.item
        return {"clean": item.text, "corrupt": other.text, "right": item.correct[0], "wrong": item.wrong[0]}

    def compute(self, inputs: Mapping[str, Any]) -> PatchResult:
        """Sweep the grid, and run both prompts unpatched."""
        lens = self.lens
        site = Site(inputs["site"])
        (clean,) = to_token_ids(lens, inputs["clean"])
        (corrupt,) = to_token_ids(lens, inputs["corrupt"])
        answers = lens.to_single_token(inputs["right"]), lens.to_single_token(inputs["wrong"])
        metric, direction = inputs["metric"], inputs["direction"]
        axes = ("layer", inputs["over"])
        grid = {axis: list_places(SiteResolver(lens), site, axis, [clean]) for axis in axes}
        reporting = self.report_metric(
            self.make_metric(metric, answers), int(np.prod([len(here) for here in grid.values()]))
        )
        swept = sweep(lens, [list(clean)], [list(corrupt)], site, over=axes, metric=reporting, direction=direction,
                      normalise=metric not in self.extra_metrics, progress=False)  # fmt: skip
        runs = {"clean": self.run_prompt(clean), "corrupt": self.run_prompt(corrupt)}
        base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        return PatchResult(
            sweep=swept, plain_runs=runs, base=base, source=source, site=site, grid=grid, answers=answers
        )

    def make_metric(self, name: str, answers: tuple[int, int]) -> Metric:
        """Return the metric of this name."""
        if name == DIFFERENCE_METRIC:
            return as_metric(answers, self.lens, 1)
        measure = self.extra_metrics.get(name, lambda logits: logits.softmax(-1)[:, answers[0]])
        return Metric(name, lambda logits, _: measure(logits[:, -1]))

    def report_metric(self, metric: Metric, total: int) -> Metric:
        """Return the metric, reporting progress at every call: how a sweep is followed and stopped."""
        done = 0

        def measure(logits: Tensor, example: Tensor) -> Tensor:
            nonlocal done
            # Two plain runs are measured too, so more rows come than there are cells.
            self.report_progress(min(done, total), total, "cells")
            done += len(logits)
            return metric.of(logits, example)

        return replace(metric, of=measure)

    def run_prompt(self, tokens: tuple[int, ...], change: Intervention | None = None) -> RunOutputs:
        """Run these tokens, with an intervention or without."""
        lens = self.lens
        n = len(tokens)
        # `end` is the position name that a site may use for the last token.
        hooks = [] if change is None else AppliedInterventions.compile(lens, [change], n, {"end": n - 1}).hooks
        row = torch.tensor([tokens], device=lens.device)
        logits, acts = lens.run_with_cache(row, pattern_points(lens), hooks, attention_mask=torch.ones_like(row))
        at = torch.arange(n, device=lens.device)[None]
        patterns = [layer_pattern(acts, layer, at, at)[0].float() for layer in range(lens.cfg.n_layers)]
        assert logits is not None
        return RunOutputs(logits[0, -1].float(), torch.stack(patterns))

    def select(self, **places: Any) -> None:
        """Select a cell (row, column), what to show of it (view, layer, head), or an example.

        Another example is run; a cell given with it is a cell of its grid. Raises ValueError for a value out of range.
        """
        before = self._state.get("example")
        # Select row and column after the run: the grid of the other example may be larger.
        later = ("row", "column") if places.get("example", before) != before else ()
        cell = {name: places.pop(name) for name in later if name in places}
        super().select(**places)
        if self._state["example"] != before:
            self.run(**self.example_texts(self._state["example"]))
            super().select(**cell)

    def on_place_change(self, name: str, value: Any) -> None:
        """Select the value of a place's control; another example is run in a thread."""
        if name != "example" or self.quiet:
            super().on_place_change(name, value)
            return
        self.pending_inputs |= self.example_texts(value)
        self._state["example"] = value
        self.start()  # in a thread, so that the Stop button works

    def show(self, result: PatchResult | None = None) -> None:
        """Draw the grid and the details of the selected cell; after a run, select the cell of largest effect."""
        if result is not None:
            self.result = result
            self.changed_run = None
            for name, size in zip(("row", "column"), result.sweep.shape, strict=True):
                self.places[name].max = size - 1
            best = np.nanargmax(np.abs(np.nan_to_num(result.sweep.values)))
            self._state |= dict(
                zip(("row", "column"), map(int, np.unravel_index(best, result.sweep.shape)), strict=True)
            )
        if self.result is None:
            return
        cell = self._state["row"], self._state["column"]
        if self.changed_run is None or self.changed_run[0] != cell:  # run the cell once per selection
            self.changed_run = cell, self.run_prompt(self.result.base, self.result.intervention_at(*cell))
        if result is not None:
            self.grid_chart.draw(self.grid_figure(), cell)
        else:
            self.grid_chart.mark(cell)  # the grid is the same: move the frame alone
        self.detail_chart.draw(self.detail_figure())

    def grid_figure(self) -> go.Figure:
        """Return the grid of effects as a figure."""
        swept = self.require_result().sweep
        note = "" if swept.finished else "stopped: the cells without a colour were not run · "
        subtitle = f"{note}{swept.about['metric']} · {swept.about['direction']} · {swept.about['baselines']}"
        labels = {axis: [show_control_characters(label) for label in swept.labels[axis]] for axis in swept.axes}
        return patch_grid(Labelled(swept.values, swept.axes, labels, swept.about), subtitle=subtitle)

    def require_result(self) -> PatchResult:
        """Return the result; raise ValueError before the first run."""
        if self.result is None:
            raise ValueError("nothing has been run yet: run()")
        return self.result

    def detail_figure(self) -> go.Figure:
        """Return what the selected cell changes, in the selected view."""
        views = {"logits": self.logits_figure, "heads": self.heads_figure, "head": self.head_figure}
        return views[self._state["view"]]()

    def describe_cell(self) -> str:
        """Return the selected cell as text: "layer 2, pos 5 ·John"."""
        swept = self.require_result().sweep
        cell = (self._state["row"], self._state["column"])
        return ", ".join(f"{axis} {label}" for axis, label in zip(swept.axes, swept.labels_at(cell), strict=True))

    def base_and_changed_run(self) -> tuple[RunOutputs, RunOutputs]:
        """Return the run that is patched, and the patched run of the selected cell."""
        result = self.require_result()
        assert self.changed_run is not None
        base = "corrupt" if self._state["direction"] == "denoise" else "clean"
        return result.plain_runs[base], self.changed_run[1]

    def logits_figure(self) -> go.Figure:
        """Return the change of the logits of the answers and of both runs' four top tokens."""
        result = self.require_result()
        base, changed = self.base_and_changed_run()
        tokens = list(dict.fromkeys([*result.answers, *changed.logits.topk(4).indices.tolist(),
                                     *base.logits.topk(4).indices.tolist()]))  # fmt: skip
        names = self.lens.to_labels(torch.tensor([tokens]))
        probabilities = [run.logits.softmax(-1)[tokens].tolist() for run in (base, changed)]
        labels = [
            f"{show_control_characters(name)} {a:.1%} → {b:.1%}"
            for name, a, b in zip(names, *probabilities, strict=True)
        ]
        change = (changed.logits - base.logits)[tokens]
        title = f"Change of logits from patching {result.site.point} at {self.describe_cell()}"
        return bars(change, {"part": labels}, what="logits", title=title, subtitle="token, probability before → after")

    def heads_figure(self) -> go.Figure:
        """Return the change of each head's attention: total variation distance to the base run, mean over queries."""
        base, changed = self.base_and_changed_run()
        distance = (changed.patterns - base.patterns).abs().sum(-1).mean(-1) / 2
        title = f"Attention changed by patching {self.require_result().site.point} at {self.describe_cell()}"
        return heatmap(distance, axes=("layer", "head"), what="total variation", signed=False, title=title,
                       subtitle="mean over queries; a click shows that head")  # fmt: skip

    def head_figure(self) -> go.Figure:
        """Return the change of the selected head's attention [query, key]."""
        base, changed = self.base_and_changed_run()
        layer, head = self._state["layer"], self._state["head"]
        change = (changed.patterns - base.patterns)[layer, head]
        labels = [
            f"{i} {show_control_characters(t)}"
            for i, t in enumerate(self.lens.to_labels(torch.tensor([self.require_result().base])))
        ]
        cell = f"{self.require_result().site.point} at {self.describe_cell()}"
        title = f"Change of attention of head {layer}.{head} from patching {cell}"
        axes = ("query", "key")
        named = {"query": labels, "key": labels}
        return heatmap(change, named, axes=axes, what="change", signed=True, down=True, title=title)

    def on_detail_click(self, *place: int) -> None:
        if self._state["view"] == "heads" and len(place) == 2:
            self.select_safely(layer=place[0], head=place[1], view="head")

    def figure(self) -> go.Figure:
        """Return the grid of effects as a figure."""
        self.require_open()
        return self.grid_figure()


def check_texts(clean: Any, corrupt: Any, answers: Any) -> dict[str, str]:
    """Return the texts of the four boxes; raise PatchError if they are not texts and answers."""
    if not isinstance(clean, str) or not isinstance(corrupt, str) or answers is None:
        raise PatchError(
            "a PatchExplorer takes two texts and answers=(right, wrong), or a task's Examples; "
            f"got {type(clean).__name__}, {type(corrupt).__name__} and answers {answers!r}"
        )
    return {"clean": clean, "corrupt": corrupt, "right": answers[0], "wrong": answers[1]}
