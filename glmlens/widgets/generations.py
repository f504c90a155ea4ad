"""Generations in an explorer: run in slices that can be stopped, and what two of them say side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as W

from glmlens.analysis.batch import token_label
from glmlens.lens import Lens
from glmlens.plot.style import show_control_characters
from glmlens.text.prompt_kinds import plain_data
from glmlens.text.prompts import Prompt
from glmlens.timeline.timeline import Timeline, find_divergence, record_timeline
from glmlens.widgets.base import Explorer, prompt_box
from glmlens.widgets.chart import Chart

STEPS_PER_SLICE = 8  # steps between two chances to stop
PROBABILITY_RGB, PROBABILITY_OPACITY = (
    "67,147,195",
    0.6,
)  # as in coloured tokens: black and white text can be read on it
COLUMNS_STYLE = "display:flex;flex-wrap:wrap;gap:8px 32px;line-height:1.8;margin:4px 0"


class TextLines(W.HTML):
    """Lines of text that are shown as they are."""

    def show_lines(self, *lines: str) -> None:
        said = "".join(f"<div>{escape_html(line)}</div>" for line in lines if line)
        self.value = f'<div class="tex2jax_ignore" style="line-height:1.5;overflow-wrap:anywhere">{said}</div>'


class GenerationsExplorer(Explorer):
    """An explorer of a recorded generation and of what becomes of it with one change.

    The inputs are a prompt, how many tokens are said, and the change, None for none: a subclass says by `changed` what
    it is. `line` is the generation and `other` that with the change, or None.
    """

    def __init__(
        self,
        lens: Lens,
        prompt: Prompt,
        length: int,
        change: str,
        places: Mapping[str, Any],
        views: Sequence[W.Widget | Chart],
    ):
        inputs = {
            "prompt": prompt_box(prompt),
            "length": W.BoundedIntText(length, 1, 4096, description="tokens", layout={"width": "150px"}),
            change: W.Label(),
        }
        self.change_name = change
        self.original_timeline: Timeline | None = None
        self.changed_timeline: Timeline | None = None
        self.original_inputs: tuple[Any, ...] = ()
        self.columns_html, self.text_lines = W.HTML(layout={"width": "auto"}), TextLines()
        rest = [self.text_lines, self.columns_html]
        super().__init__(lens, inputs, places, [*views, *rest], {"prompt": prompt, "length": length, change: None})

    def on_input_change(self, name: str, value: Any) -> None:
        super().on_input_change(name, value)
        if name == "prompt":
            self.pending_inputs[self.change_name] = None

    def run(self, **inputs: Any) -> None:
        """Ask the model again, with other inputs if some are given; another prompt is without a change."""
        super().run(**({self.change_name: None} | inputs if "prompt" in inputs else inputs))

    def request_no_change(self) -> None:
        """Want the generation as it was, without a change."""
        self.pending_inputs[self.change_name] = None

    def compute_and_show(self, inputs: Mapping[str, Any]) -> None:
        try:
            super().compute_and_show(inputs)
        except BaseException:  # a change that cannot be is not asked for again
            if not self.closed:
                self.pending_inputs[self.change_name] = self._state[self.change_name]
            raise

    def run_original(self, inputs: Mapping[str, Any]) -> Timeline:
        """The generation without a change; it is run only if it is another than last time."""
        made = (inputs["prompt"], inputs["length"])
        if self.original_timeline is None or not same_inputs(made, self.original_inputs):
            first = record_timeline(self.lens, inputs["prompt"], min(STEPS_PER_SLICE, inputs["length"]))
            return self.extend_timeline(first, inputs["length"])
        return self.original_timeline

    def extend_timeline(self, line: Timeline, length: int) -> Timeline:
        """The same run up to so many steps, a slice at a time."""
        while len(line.steps) == line.max_new_tokens < length:
            self.report_progress(len(line.steps), length, "tokens")
            line = line.rerun(len(line.steps) - 1, max_new_tokens=min(line.max_new_tokens + STEPS_PER_SLICE, length))
        self.report_progress(length, length, "tokens")
        return line

    def require_timeline(self) -> Timeline:
        if self.original_timeline is None:
            raise ValueError("nothing has been run yet: run()")
        return self.original_timeline

    def store_timelines(self, inputs: tuple[Any, Any], line: Timeline, other: Timeline | None) -> None:
        """Take over what was run; the slider of steps ends with it."""
        self.original_inputs, self.original_timeline, self.changed_timeline = inputs, line, other
        longest = max(len(run.steps) for run in (line, other) if run is not None)
        self.places["step"].max = longest - 1
        self._state["step"] = min(self._state["step"], longest - 1)

    def update_controls(self) -> None:
        super().update_controls()
        self.inputs["length"].value = self._state["length"]
        change = self._state[self.change_name]
        self.inputs[self.change_name].value = (
            "" if change is None else f"{self.change_name}: {self.describe_change(change)}"
        )

    def describe_change(self, change: Any) -> str:
        """What a change does."""
        raise NotImplementedError

    def show_texts(self, first: str, second: str) -> None:
        """Write what both runs say, and where they part."""
        line, step = self.require_timeline(), self._state["step"]
        columns = [timeline_column(first, line, self.changed_timeline, step)]
        apart = ""
        if self.changed_timeline is not None:
            columns.append(timeline_column(second, self.changed_timeline, line, step))
            apart = str(
                find_divergence(line, self.changed_timeline) or "one says what the other begins with, or both the same"
            )
        below = f'<div style="line-height:1.5">{escape_html(apart)}</div>'
        self.columns_html.value = (
            f'<div class="tex2jax_ignore"><div style="{COLUMNS_STYLE}">{"".join(columns)}</div>{below}</div>'
        )


def same_inputs(new: tuple[Any, Any], old: tuple[Any, ...]) -> bool:
    """Whether two prompts and lengths are the same, whatever prompts are made of."""
    if not old or new[1] != old[1] or type(new[0]) is not type(old[0]):
        return False
    return plain_data(new[0]) == plain_data(old[0])


def timeline_column(title: str, line: Timeline, other: Timeline | None, step: int) -> str:
    """A run as HTML: the deeper a token's blue the more probable, a frame at the step, a line where the two part."""
    chances = line.probability().values.tolist()
    theirs = [] if other is None else other.tokens
    parts = next((i for i, (a, b) in enumerate(zip(line.tokens, theirs, strict=False)) if a != b), None)
    said = enumerate(zip(line.tokens, chances, strict=True))
    spans = [token_html(i, token_label(line.lens, token), chance, i == step, i == parts) for i, (token, chance) in said]
    head = f'<div style="font-weight:600">{escape_html(title)}</div>'
    return f'<div style="flex:1 1 300px;overflow-wrap:anywhere">{head}{"".join(spans)}</div>'


def token_html(i: int, name: str, chance: float, here: bool, parts: bool) -> str:
    style = f"background:rgba({PROBABILITY_RGB},{PROBABILITY_OPACITY * chance:.3f});padding:1px 3px;border-radius:3px;margin-right:1px;"
    style += "outline:2px solid currentColor;" if here else ""
    style += "border-bottom:3px solid rgb(214,96,77);" if parts else ""
    said = escape_html(f"step {i}: {name} {chance:.1%}")
    end = "<br>" if name.endswith(("\n", "↵")) else "<wbr>"
    return f'<span style="{style}" title="{said}">{escape_html(name)}</span>{end}'


def escape_html(text: str) -> str:
    """Text as HTML that says just that, in an attribute too."""
    return escape(show_control_characters(text), quote=True)
