"""Base of the explorers of generations: run in slices that can be stopped, and show two of them side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as W

from glmlens.analysis.prompt_batch import token_label
from glmlens.lens import Lens
from glmlens.plot.style import show_control_characters
from glmlens.text.prompt_kinds import plain_data
from glmlens.text.prompts import Prompt
from glmlens.timeline.timeline import Timeline, find_divergence, record_timeline
from glmlens.widgets.base import Explorer, prompt_box
from glmlens.widgets.chart import Chart

STEPS_PER_SLICE = 8  # a run can be stopped after so many steps
# As in plot.tokens: black and white text stay readable on the strongest colour.
PROBABILITY_RGB = "67,147,195"
PROBABILITY_OPACITY = 0.6
COLUMNS_STYLE = "display:flex;flex-wrap:wrap;gap:8px 32px;line-height:1.8;margin:4px 0"


class TextLines(W.HTML):
    """Lines of plain text; markup in them is shown as text."""

    def show_lines(self, *lines: str) -> None:
        """Show these lines, the empty ones left out."""
        rows = "".join(f"<div>{escape_html(line)}</div>" for line in lines if line)
        self.value = f'<div class="tex2jax_ignore" style="line-height:1.5;overflow-wrap:anywhere">{rows}</div>'


class GenerationsExplorer(Explorer):
    """An explorer of a recorded generation, and of a rerun of it with one change.

    Inputs: prompt, length (number of generated tokens), and the change, None without one; its name is `change_name` and
    its values are a subclass's. `original_timeline` is the generation, `changed_timeline` the rerun or None.
    """

    def __init__(
        self,
        lens: Lens,
        prompt: Prompt,
        length: int,
        change_name: str,
        places: Mapping[str, Any],
        views: Sequence[W.Widget | Chart],
    ):
        inputs = {
            "prompt": prompt_box(prompt),
            "length": W.BoundedIntText(length, 1, 4096, description="tokens", layout={"width": "150px"}),
            change_name: W.Label(),
        }
        self.change_name = change_name
        self.original_timeline: Timeline | None = None
        self.changed_timeline: Timeline | None = None
        self.original_inputs: tuple[Any, ...] = ()
        self.columns_html = W.HTML(layout={"width": "auto"})
        self.text_lines = TextLines()
        rest = [self.text_lines, self.columns_html]
        initial_state = {"prompt": prompt, "length": length, change_name: None}
        super().__init__(lens, inputs, places, views=[*views, *rest], initial_state=initial_state)

    def on_input_change(self, name: str, value: Any) -> None:
        """Keep an input's value for the next run; a new prompt removes the change."""
        super().on_input_change(name, value)
        if name == "prompt":
            self.pending_inputs[self.change_name] = None

    def run(self, **inputs: Any) -> None:
        """Run the model, with these inputs changed. A new prompt removes the change, unless one is given."""
        super().run(**({self.change_name: None} | inputs if "prompt" in inputs else inputs))

    def request_no_change(self) -> None:
        """Remove the change from the next run."""
        self.pending_inputs[self.change_name] = None

    def compute_and_show(self, inputs: Mapping[str, Any]) -> None:
        """Run, and go back to the last change if this one fails, so that the next run does not repeat it."""
        try:
            super().compute_and_show(inputs)
        except BaseException:
            if not self.closed:
                self.pending_inputs[self.change_name] = self._state[self.change_name]
            raise

    def run_original(self, inputs: Mapping[str, Any]) -> Timeline:
        """Return the generation without a change; it is run again only if prompt or length changed."""
        wanted = (inputs["prompt"], inputs["length"])
        if self.original_timeline is None or not same_inputs(wanted, self.original_inputs):
            first = record_timeline(self.lens, inputs["prompt"], min(STEPS_PER_SLICE, inputs["length"]))
            return self.extend_timeline(first, inputs["length"])
        return self.original_timeline

    def extend_timeline(self, line: Timeline, length: int) -> Timeline:
        """Continue a run to `length` tokens, a slice at a time; it ends earlier at an end token."""
        while len(line.steps) == line.max_new_tokens < length:  # fewer steps than allowed: it has ended
            self.report_progress(len(line.steps), length, "tokens")
            line = line.rerun(len(line.steps) - 1, max_new_tokens=min(line.max_new_tokens + STEPS_PER_SLICE, length))
        self.report_progress(length, length, "tokens")
        return line

    def require_timeline(self) -> Timeline:
        """Return the generation; raise ValueError before the first run."""
        if self.original_timeline is None:
            raise ValueError("nothing has been run yet: run()")
        return self.original_timeline

    def store_timelines(self, inputs: tuple[Any, Any], line: Timeline, other: Timeline | None) -> None:
        """Keep both runs, and set the range of the step slider to the longer one."""
        self.original_inputs = inputs
        self.original_timeline = line
        self.changed_timeline = other
        longest = max(len(run.steps) for run in (line, other) if run is not None)
        self.places["step"].max = longest - 1
        self._state["step"] = min(self._state["step"], longest - 1)

    def update_controls(self) -> None:
        """Set every control to its value in the state, and describe the change in its label."""
        super().update_controls()
        self.inputs["length"].value = self._state["length"]
        change = self._state[self.change_name]
        self.inputs[self.change_name].value = (
            "" if change is None else f"{self.change_name}: {self.describe_change(change)}"
        )

    def describe_change(self, change: Any) -> str:
        """Return a change as text."""
        raise NotImplementedError

    def show_texts(self, first: str, second: str) -> None:
        """Show the tokens of both runs under these titles, and their first divergence."""
        line = self.require_timeline()
        step = self._state["step"]
        columns = [timeline_column(first, line, self.changed_timeline, step)]
        divergence = ""
        if self.changed_timeline is not None:
            columns.append(timeline_column(second, self.changed_timeline, line, step))
            divergence = str(
                find_divergence(line, self.changed_timeline) or "no divergence: one is a prefix of the other"
            )
        below = f'<div style="line-height:1.5">{escape_html(divergence)}</div>'
        self.columns_html.value = (
            f'<div class="tex2jax_ignore"><div style="{COLUMNS_STYLE}">{"".join(columns)}</div>{below}</div>'
        )


def same_inputs(new: tuple[Any, Any], old: tuple[Any, ...]) -> bool:
    """Whether two pairs of prompt and length are equal; prompts may be text, ids, tensors or messages."""
    if not old or new[1] != old[1] or type(new[0]) is not type(old[0]):
        return False
    return plain_data(new[0]) == plain_data(old[0])


def timeline_column(title: str, line: Timeline, other: Timeline | None, step: int) -> str:
    """Return a run as HTML: blue by probability, a frame around the selected step, a red line at the divergence."""
    probabilities = line.probability().values.tolist()
    other_tokens = [] if other is None else other.tokens
    pairs = zip(line.tokens, other_tokens, strict=False)
    divergence = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    spans = [
        token_html(i, token_label(line.lens, token), p, selected=i == step, diverges=i == divergence)
        for i, (token, p) in enumerate(zip(line.tokens, probabilities, strict=True))
    ]
    head = f'<div style="font-weight:600">{escape_html(title)}</div>'
    return f'<div style="flex:1 1 300px;overflow-wrap:anywhere">{head}{"".join(spans)}</div>'


def token_html(i: int, name: str, probability: float, *, selected: bool, diverges: bool) -> str:
    """Return one generated token as HTML, its step and probability on hover."""
    style = f"background:rgba({PROBABILITY_RGB},{PROBABILITY_OPACITY * probability:.3f});"
    style += "padding:1px 3px;border-radius:3px;margin-right:1px;"
    style += "outline:2px solid currentColor;" if selected else ""
    style += "border-bottom:3px solid rgb(214,96,77);" if diverges else ""
    hover = escape_html(f"step {i}: {name} {probability:.1%}")
    end = "<br>" if name.endswith(("\n", "↵")) else "<wbr>"
    return f'<span style="{style}" title="{hover}">{escape_html(name)}</span>{end}'


def escape_html(text: str) -> str:
    """Return text escaped for HTML, in attributes too."""
    return escape(show_control_characters(text), quote=True)
