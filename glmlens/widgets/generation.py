"""A generation step by step: the logit lens of every step, and reruns in which a step is forced to another token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
import torch

from glmlens.analysis.prompt_batch import Token, layer_labels, token_label, upcast
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
from glmlens.widgets.generation_runs import GenerationsExplorer

TOP_TOKENS = 8  # most probable tokens kept per layer and step
MAX_LABELLED_STEPS = 20  # up to so many steps, the top token is written in its cell


def page_label(lens: Lens, token: int) -> str:
    """Return the label of a token, control characters replaced."""
    return show_control_characters(token_label(lens, token))


@dataclass(frozen=True, eq=False)
class LayerPredictions:
    """The logit lens of every step: the residual stream after each layer, through the final norm and unembedding.

    `ids` and `probabilities` [layer, step, rank] are the most probable tokens, `chosen_probability` [layer, step] is
    that of the token the step chose.
    """

    ids: np.ndarray
    probabilities: np.ndarray
    chosen_probability: np.ndarray


@dataclass(frozen=True, eq=False)
class BranchResult:
    """The runs by name, "first" and perhaps "branch", each with its logit lens."""

    runs: Mapping[str, tuple[Timeline, LayerPredictions]]


class GenerationExplorer(GenerationsExplorer):
    """Explore a generation step by step, and branch from any step with another token.

    The first chart is the logit lens of every step, coloured by the probability of the most probable token ("top") or
    of the chosen one ("chosen"). The second shows the most probable tokens of one layer and step; a click on one
    branches with it. `branch` forces any token and generates from there. Places: step, layer (at first the last), run
    ("first" or "branch"), by.
    """

    def __init__(self, lens: Lens, prompt: Prompt, length: int = 20):
        last = lens.cfg.n_layers - 1
        style = {"button_width": "auto"}
        places = {
            "step": W.IntSlider(0, 0, 0, description="step"),
            "layer": W.IntSlider(last, 0, last, description="layer"),
            "run": W.ToggleButtons(options=[("original", "first"), ("branch", "branch")], style=style),
            "by": W.ToggleButtons(
                options=[("most probable token", "top"), ("chosen token", "chosen")],
                style=style,
            ),
        }
        self.lens_chart, self.tokens_chart = Chart(self.on_lens_click), Chart(self.on_token_click)
        self.runs: Mapping[str, tuple[Timeline, LayerPredictions]] = {}
        self.token_box = W.Combobox(
            placeholder="text of one token",
            description="replace token",
            continuous_update=False,
            style={"description_width": "initial"},
        )
        self.branch_button = W.Button(
            description="Branch here", tooltip="force this token at the selected step and continue"
        )
        self.undo_button = W.Button(description="Undo", tooltip="remove the branch")
        row = W.Box([self.token_box, self.branch_button, self.undo_button], layout=ROW_LAYOUT)
        views = [self.lens_chart, self.tokens_chart, row]
        super().__init__(lens, prompt, length, change_name="branch", places=places, views=views)
        self.branch_button.on_click(lambda _: self.start(self.request_typed_branch))
        self.undo_button.on_click(lambda _: self.start(self.request_no_change))
        self.run_first()

    # ---- select and run ----

    def branch(self, token: Token, step: int | None = None) -> None:
        """Force a token (text or id) at a step of the original run, by default the selected one, and continue.

        Raises ValueError for a text that is not one token, or an id outside the vocabulary.
        """
        step = self._state["step"] if step is None else read_integer(step, "step")
        self.run(branch=(step, self.to_token_id(token)))

    def to_token_id(self, token: Token) -> int:
        """Return the id of a token; raise ValueError if it is not one of this model."""
        token_id = self.lens.to_single_token(token) if isinstance(token, str) else read_integer(token, "token")
        if not 0 <= token_id < self.lens.cfg.d_vocab:
            raise ValueError(f"token {token_id}; this model has 0 to {self.lens.cfg.d_vocab - 1}")
        return token_id

    def request_typed_branch(self) -> None:
        """Put a branch with the typed token at the selected step into the next run."""
        self.request_branch(self._state["step"], self.token_of_label(self.token_box.value))

    def request_branch(self, step: int, token: int) -> None:
        """Put a branch into the next run; raise ValueError while a branch is shown, whose steps differ."""
        if self._state["run"] != "first":
            raise ValueError('branch from the original run: select run="first" first')
        self.pending_inputs["branch"] = step, token

    def token_of_label(self, text: str) -> int:
        """Return the id of a token by its label, if it is one of those offered, or else by its text."""
        _, readings = self.selected_run()
        # Different tokens can have one label, and a label is not always the text: look among those shown first.
        ids = readings.ids[self._state["layer"], self._state["step"]].tolist()
        labels = [page_label(self.lens, i) for i in ids]
        return ids[labels.index(text)] if text in labels else self.to_token_id(text)

    # ---- compute ----

    def compute(self, inputs: Mapping[str, Any]) -> BranchResult:
        """Run the original generation, unless its inputs are unchanged, and the branch."""
        line = self.run_original(inputs)
        branch = inputs["branch"]
        known = self.runs.get("first")
        runs = {"first": known if known is not None and known[0] is line else (line, self.predict_by_layer(line))}
        if branch is not None:
            step, token = branch
            # Rerun this step and one more, within the length; extend_timeline runs the others in slices.
            end = min(step + 2, max(inputs["length"], step + 1))
            start = line.rerun(step, token=token, max_new_tokens=end)
            other = self.extend_timeline(start, inputs["length"])
            runs["branch"] = other, self.predict_by_layer(other)
        return BranchResult(runs)

    def predict_by_layer(self, line: Timeline) -> LayerPredictions:
        """Compute the logit lens of every step, layer by layer so that it can be stopped."""
        model = self.lens.model
        layers = []
        chosen = torch.tensor(line.tokens, device=self.lens.device)[:, None]
        for layer in range(self.lens.cfg.n_layers):
            self.report_progress(layer, self.lens.cfg.n_layers, "layers")
            resid = torch.stack([step.resid[layer] for step in line.steps])
            with torch.no_grad():
                p = upcast(model.unembed(model.ln_final(resid[None]))[0]).softmax(-1)
            top = p.topk(min(TOP_TOKENS, p.shape[-1]))
            layers.append([x.cpu().numpy() for x in (top.indices, top.values, p.gather(1, chosen)[:, 0])])
        ids, probabilities, chosen_probability = (np.stack(x) for x in zip(*layers, strict=True))
        return LayerPredictions(ids, probabilities, chosen_probability)

    # ---- draw ----

    def show(self, result: BranchResult | None = None) -> None:
        """Draw the logit lens, the top tokens, the numbers of the step, and the text of both runs."""
        s = self._state
        if result is not None:
            self.runs = result.runs
            other = result.runs.get("branch")
            self.store_timelines(
                (s["prompt"], s["length"]), result.runs["first"][0], None if other is None else other[0]
            )
            if s["run"] not in result.runs:  # the branch is gone
                s["run"] = "first"
        if not self.runs:
            return
        line, _ = self.selected_run()
        self.update_ranges(s)
        s["step"] = min(s["step"], len(line.steps) - 1)
        each = block_size(len(line.steps))
        self.lens_chart.draw(self.figure(), (s["layer"], s["step"] // each))
        self.tokens_chart.draw(self.tokens_figure())
        self.text_lines.show_lines(self.describe_step())
        self.show_texts("original", "branch")

    def update_ranges(self, places: Mapping[str, Any]) -> None:
        """Set the range of steps to those of the run."""
        if places["run"] in self.runs:
            self.places["step"].max = len(self.runs[places["run"]][0].steps) - 1

    def selected_run(self) -> tuple[Timeline, LayerPredictions]:
        """Return the selected run and its logit lens; raise ValueError for a branch that is not there."""
        run = self._state["run"]
        if run not in self.runs:
            raise ValueError("there is no branch: make one with branch(token)")
        return self.runs[run]

    def figure(self) -> go.Figure:
        """Return the logit lens of every step of the selected run as a figure."""
        self.require_open()
        s = self._state
        line, readings = self.selected_run()
        steps = [f"{i} {page_label(self.lens, token)}" for i, token in enumerate(line.tokens)]
        names = np.vectorize(lambda i: page_label(self.lens, int(i)), otypes=[object])(readings.ids)
        values = readings.probabilities[..., 0] if s["by"] == "top" else readings.chosen_probability
        data = Labelled(values.astype(np.float32), ("layer", "step"), {"layer": layer_labels(self.lens), "step": steps})
        words: Any = False  # nothing in the cells
        if len(steps) <= MAX_LABELLED_STEPS:
            words = np.array(
                [[escape_text(name, max(5, 120 // len(steps))) for name in row] for row in names[..., 0]], dtype=object
            )
        more = ("%{customdata}", hover_candidates(names, readings.probabilities)) if len(steps) <= MAX_CELLS else None
        run = {"first": "original", "branch": "branch"}[s["run"]]
        what = {"top": "most probable", "chosen": "chosen"}[s["by"]]
        name = f"Logit lens by step ({run}): {what} token"
        look: Look = {"subtitle": ""}
        return draw_heatmap(data, "probability", False, limits=(0, 1), text=words, hover=more, name=name, look=look)

    def tokens_figure(self) -> go.Figure:
        """Return the most probable tokens of the selected layer and step as a figure."""
        s = self._state
        line, readings = self.selected_run()
        place = s["layer"], s["step"]
        ids = readings.ids[place].tolist()
        self.token_box.options = [page_label(self.lens, i) for i in ids]
        chosen = line.tokens[s["step"]]
        names = [f"{'▸ ' if i == chosen else ''}{page_label(self.lens, i)}" for i in ids]
        hint = " (click one to branch)" if s["run"] == "first" else ""
        title = f"Top tokens at layer {s['layer']}, step {s['step']}{hint}"
        return bars(readings.probabilities[place], {"part": names}, what="probability", title=title, subtitle="")

    def describe_step(self) -> str:
        """Return the selected step and its numbers as text."""
        s = self._state
        line, readings = self.selected_run()
        step, token = s["step"], line.tokens[s["step"]]
        entropy = float(line.entropy().values[step])
        probability = float(readings.chosen_probability[-1, step])
        # The first layer from which on every layer has this token on top.
        other = np.flatnonzero(readings.ids[:, step, 0] != token)
        since = int(other[-1]) + 1 if len(other) else 0
        settled = f"top token from layer {since} on" if since < self.lens.cfg.n_layers else "not the most probable"
        return f"step {step}: {page_label(self.lens, token)}, {probability:.2%}, entropy {entropy:.3f} nats; {settled}"

    def describe_change(self, change: tuple[int, int]) -> str:
        """Return a branch, its step and token, as text."""
        return f"{page_label(self.lens, change[1])} at step {change[0]}"

    def on_lens_click(self, row: int, column: int) -> None:
        self.select_safely(layer=row, step=column * block_size(self.places["step"].max + 1))

    def on_token_click(self, i: int) -> None:
        with self.show_errors():
            _, readings = self.selected_run()
            step = self._state["step"]
            token = int(readings.ids[self._state["layer"], step, i])
            self.start(lambda: self.request_branch(step, token))
