"""A generation step by step: what every layer would say, and what becomes of it when a step says something else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
import torch

from glmlens.analysis.batch import Token, layer_labels, upcast
from glmlens.analysis.batch import token_label as spelt
from glmlens.integers import read_integer
from glmlens.lens import Lens
from glmlens.plot.bars import bars
from glmlens.plot.heatmaps import draw_heatmap, hover_candidates
from glmlens.plot.style import Look, escape_text, show_control_characters
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.timeline.timeline import Timeline
from glmlens.widgets.base import ROW_LAYOUT
from glmlens.widgets.chart import MAX_CELLS, Chart, block_size
from glmlens.widgets.generations import GenerationsExplorer

TOP_TOKENS = 8  # tokens of a layer and step
MAX_LABELLED_STEPS = 20  # steps whose words are written in their cells


def page_label(lens: Lens, token: int) -> str:
    """A token as it can be sent to a page."""
    return show_control_characters(spelt(lens, token))


@dataclass(frozen=True, eq=False)
class LayerPredictions:
    """What every layer's stream says at every step, read as if it were the last.

    `ids` and `chances` [layer, step, rank] are the most probable tokens, `chosen` [layer, step] the probability of the
    token that the step chose.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    chosen_probability: np.ndarray


@dataclass(frozen=True, eq=False)
class BranchResult:
    """A generation and the one that branches off it, each with its readings."""

    runs: Mapping[str, tuple[Timeline, LayerPredictions]]


class GenerationExplorer(GenerationsExplorer):
    """A generation, step by step, with what every layer would say; any step can say another token instead.

    The first picture is the logit lens of every step, coloured by the probability of the most probable token ("top")
    or of the one that was chosen ("chosen"); the second the most probable tokens of one layer and step: a click on one
    goes on with it. `branch` says any token and generates on. Places: step, layer (the last one at first), run
    ("first" or "branch"), by.
    """

    def __init__(self, lens: Lens, prompt: Prompt, length: int = 20):
        last = lens.cfg.n_layers - 1
        names = {"button_width": "auto"}
        places = {
            "step": W.IntSlider(0, 0, 0, description="step"),
            "layer": W.IntSlider(last, 0, last, description="layer"),
            "run": W.ToggleButtons(options=[("as it went", "first"), ("branch", "branch")], style=names),
            "by": W.ToggleButtons(options=[("most probable token", "top"), ("chosen token", "chosen")], style=names),
        }
        self.lens_chart, self.tokens_chart = Chart(self.on_lens_click), Chart(self.on_token_click)
        self.runs: Mapping[str, tuple[Timeline, LayerPredictions]] = {}
        self.token_box = W.Combobox(placeholder="text of one token", description="say instead", continuous_update=False)
        self.branch_button, self.undo_button = W.Button(description="Branch here"), W.Button(description="Undo")
        self.branch_button.tooltip, self.undo_button.tooltip = (
            "say this at the chosen step and generate on",
            "without the branch",
        )
        row = W.Box([self.token_box, self.branch_button, self.undo_button], layout=ROW_LAYOUT)
        super().__init__(lens, prompt, length, "branch", places, [self.lens_chart, self.tokens_chart, row])
        self.branch_button.on_click(lambda _: self.start(self.request_typed_branch))
        self.undo_button.on_click(lambda _: self.start(self.request_no_change))
        self.run_first()

    # ---- asking ----

    def branch(self, token: Token, step: int | None = None) -> None:
        """Say this token (its text or id) at a step, by default the chosen one, and generate on from there.

        The branch is off the generation as it went. ValueError for what is not one token of this model.
        """
        at = self._state["step"] if step is None else read_integer(step, "step")
        self.run(branch=(at, self.to_token_id(token)))

    def to_token_id(self, token: Token) -> int:
        found = self.lens.to_single_token(token) if isinstance(token, str) else read_integer(token, "token")
        if not 0 <= found < self.lens.cfg.d_vocab:
            raise ValueError(f"token {found}; this model has 0 to {self.lens.cfg.d_vocab - 1}")
        return found

    def request_typed_branch(self) -> None:
        self.request_branch(self._state["step"], self.token_of_label(self.token_box.value))

    def request_branch(self, step: int, token: int) -> None:
        """Want a branch at this step; ValueError where a branch is looked at, which has none."""
        if self._state["run"] != "first":
            raise ValueError("a branch goes off the generation as it went: look at that, and at the step")
        self.pending_inputs["branch"] = step, token

    def token_of_label(self, text: str) -> int:
        """The token that a label or a text names: a label of those shown is itself."""
        _, readings = self.selected_run()
        ids = readings.ids[self._state["layer"], self._state["step"]].tolist()
        labels = [page_label(self.lens, i) for i in ids]
        return ids[labels.index(text)] if text in labels else self.to_token_id(text)

    # ---- working ----

    def compute(self, inputs: Mapping[str, Any]) -> BranchResult:
        line, branch = self.run_original(inputs), inputs["branch"]
        known = self.runs.get("first")
        runs = {"first": known if known is not None and known[0] is line else (line, self.predict_by_layer(line))}
        if branch is not None:
            step, token = branch
            start = line.rerun(step, token=token, max_new_tokens=min(step + 2, max(inputs["length"], step + 1)))
            other = self.extend_timeline(start, inputs["length"])
            runs["branch"] = other, self.predict_by_layer(other)
        return BranchResult(runs)

    def predict_by_layer(self, line: Timeline) -> LayerPredictions:
        """What every layer says, a layer at a time."""
        model, found = self.lens.model, []
        chosen = torch.tensor(line.tokens, device=self.lens.device)[:, None]
        for layer in range(self.lens.cfg.n_layers):
            self.report_progress(layer, self.lens.cfg.n_layers, "layers read")
            resid = torch.stack([moment.resid[layer] for moment in line.steps])
            with torch.no_grad():
                p = upcast(model.unembed(model.ln_final(resid[None]))[0]).softmax(-1)
            top = p.topk(min(TOP_TOKENS, p.shape[-1]))
            found.append([x.cpu().numpy() for x in (top.indices, top.values, p.gather(1, chosen)[:, 0])])
        return LayerPredictions(*(np.stack(x) for x in zip(*found, strict=True)))

    # ---- showing ----

    def show(self, result: BranchResult | None = None) -> None:
        s = self._state
        if result is not None:
            self.runs = result.runs
            other = result.runs.get("branch")
            self.store_timelines(
                (s["prompt"], s["length"]), result.runs["first"][0], None if other is None else other[0]
            )
            s["run"] = s["run"] if s["run"] in result.runs else "first"
        if not self.runs:
            return
        line, _ = self.selected_run()
        self.update_ranges(s)
        s["step"] = min(s["step"], len(line.steps) - 1)
        each = block_size(len(line.steps))
        self.lens_chart.draw(self.figure(), (s["layer"], s["step"] // each))
        self.tokens_chart.draw(self.tokens_figure())
        self.text_lines.show_lines(self.describe_step())
        self.show_texts("as it went", "branch")

    def update_ranges(self, places: Mapping[str, Any]) -> None:
        if places["run"] in self.runs:
            self.places["step"].max = len(self.runs[places["run"]][0].steps) - 1

    def selected_run(self) -> tuple[Timeline, LayerPredictions]:
        run = self._state["run"]
        if run not in self.runs:
            raise ValueError("there is no branch: say another token at a step with branch(token)")
        return self.runs[run]

    def figure(self) -> go.Figure:
        """The logit lens of every step of the chosen run."""
        self.require_open()
        s, (line, readings) = self._state, self.selected_run()
        steps = [f"{i} {page_label(self.lens, token)}" for i, token in enumerate(line.tokens)]
        names = np.vectorize(lambda i: page_label(self.lens, int(i)), otypes=[object])(readings.ids)
        values = readings.probabilities[..., 0] if s["by"] == "top" else readings.chosen_probability
        data = Labelled(values.astype(np.float32), ("layer", "step"), {"layer": layer_labels(self.lens), "step": steps})
        words: Any = False
        if len(steps) <= MAX_LABELLED_STEPS:
            words = np.array(
                [[escape_text(name, max(5, 120 // len(steps))) for name in row] for row in names[..., 0]], dtype=object
            )
        more = ("%{customdata}", hover_candidates(names, readings.probabilities)) if len(steps) <= MAX_CELLS else None
        whose = {"first": "as it went", "branch": "of the branch"}[s["run"]]
        what = {"top": "most probable", "chosen": "chosen"}[s["by"]]
        name = f"Logit lens of every step {whose}: the {what} token"
        look: Look = {"subtitle": ""}
        return draw_heatmap(data, "probability", False, limits=(0, 1), text=words, hover=more, name=name, look=look)

    def tokens_figure(self) -> go.Figure:
        """The most probable tokens of the chosen layer and step."""
        s, (line, readings) = self._state, self.selected_run()
        place = s["layer"], s["step"]
        ids = readings.ids[place].tolist()
        self.token_box.options = [page_label(self.lens, i) for i in ids]
        chosen = line.tokens[s["step"]]
        names = [f"{'▸ ' if i == chosen else ''}{page_label(self.lens, i)}" for i in ids]
        more = "; a click goes on with it" if s["run"] == "first" else ""
        title = f"What layer {s['layer']} says at step {s['step']}{more}"
        return bars(readings.probabilities[place], {"part": names}, what="probability", title=title, subtitle="")

    def describe_step(self) -> str:
        """The chosen step in numbers."""
        s, (line, readings) = self._state, self.selected_run()
        step, token = s["step"], line.tokens[s["step"]]
        entropy, chance = float(line.entropy().values[step]), float(readings.chosen_probability[-1, step])
        first = np.flatnonzero(readings.ids[:, step, 0] != token)
        since = int(first[-1]) + 1 if len(first) else 0
        settled = f"said by every layer from {since} on" if since < self.lens.cfg.n_layers else "not the most probable"
        return f"step {step} says {page_label(self.lens, token)}: {chance:.2%}, entropy {entropy:.3f} nats; {settled}"

    def describe_change(self, change: tuple[int, int]) -> str:
        return f"{page_label(self.lens, change[1])} at step {change[0]}"

    def on_lens_click(self, row: int, column: int) -> None:
        self.select_safely(layer=row, step=column * block_size(self.places["step"].max + 1))

    def on_token_click(self, i: int) -> None:
        with self.show_errors():
            (_, readings), step = self.selected_run(), self._state["step"]
            token = int(readings.ids[self._state["layer"], step, i])
            self.start(lambda: self.request_branch(step, token))
