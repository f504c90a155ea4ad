"""Generations in an explorer: run in slices that can be stopped, and what two of them say side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets as W

from glmlens.analysis.rows import label
from glmlens.lens import Lens
from glmlens.patch.timeline import Timeline, parting, timeline
from glmlens.plot.style import visible
from glmlens.prompt import Prompt
from glmlens.prompt_kinds import plain_data
from glmlens.widgets.base import Explorer, prompt_box
from glmlens.widgets.chart import Chart

SLICE = 8  # steps between two chances to stop
BLUE, DEEPEST = "67,147,195", 0.6  # as in coloured tokens: black and white text can be read on it
COLUMNS = "display:flex;flex-wrap:wrap;gap:8px 32px;line-height:1.8;margin:4px 0"


class Lines(W.HTML):
    """Lines of text that are shown as they are."""

    def say(self, *lines: str) -> None:
        said = "".join(f"<div>{text(line)}</div>" for line in lines if line)
        self.value = f'<div class="tex2jax_ignore" style="line-height:1.5;overflow-wrap:anywhere">{said}</div>'


class Generations(Explorer):
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
        self.change = change
        self.line: Timeline | None = None
        self.other: Timeline | None = None
        self.made: tuple[Any, ...] = ()
        self.texts, self.words = W.HTML(layout={"width": "auto"}), Lines()
        rest = [self.words, self.texts]
        super().__init__(lens, inputs, places, [*views, *rest], {"prompt": prompt, "length": length, change: None})

    def typed(self, name: str, value: Any) -> None:
        super().typed(name, value)
        if name == "prompt":
            self.wanted[self.change] = None

    def run(self, **inputs: Any) -> None:
        """Ask the model again, with other inputs if some are given; another prompt is without a change."""
        super().run(**({self.change: None} | inputs if "prompt" in inputs else inputs))

    def without(self) -> None:
        """Want the generation as it was, without a change."""
        self.wanted[self.change] = None

    def answer(self, wanted: Mapping[str, Any]) -> None:
        try:
            super().answer(wanted)
        except BaseException:  # a change that cannot be is not asked for again
            if not self.closed:
                self.wanted[self.change] = self._state[self.change]
            raise

    def original(self, inputs: Mapping[str, Any]) -> Timeline:
        """The generation without a change; it is run only if it is another than last time."""
        made = (inputs["prompt"], inputs["length"])
        if self.line is None or not same(made, self.made):
            first = timeline(self.lens, inputs["prompt"], min(SLICE, inputs["length"]))
            return self.grown(first, inputs["length"])
        return self.line

    def grown(self, line: Timeline, length: int) -> Timeline:
        """The same run up to so many steps, a slice at a time."""
        while len(line.moments) == line.last < length:
            self.tick(len(line.moments), length, "tokens")
            line = line.rerun(len(line.moments) - 1, max_new_tokens=min(line.last + SLICE, length))
        self.tick(length, length, "tokens")
        return line

    def recorded(self) -> Timeline:
        if self.line is None:
            raise ValueError("nothing has been run yet: run()")
        return self.line

    def note_runs(self, inputs: tuple[Any, Any], line: Timeline, other: Timeline | None) -> None:
        """Take over what was run; the slider of steps ends with it."""
        self.made, self.line, self.other = inputs, line, other
        longest = max(len(run.moments) for run in (line, other) if run is not None)
        self.places["step"].max = longest - 1
        self._state["step"] = min(self._state["step"], longest - 1)

    def synchronise(self) -> None:
        super().synchronise()
        self.inputs["length"].value = self._state["length"]
        change = self._state[self.change]
        self.inputs[self.change].value = "" if change is None else f"{self.change}: {self.in_words(change)}"

    def in_words(self, change: Any) -> str:
        """What a change does."""
        raise NotImplementedError

    def tell(self, first: str, second: str) -> None:
        """Write what both runs say, and where they part."""
        line, step = self.recorded(), self._state["step"]
        columns = [column(first, line, self.other, step)]
        apart = ""
        if self.other is not None:
            columns.append(column(second, self.other, line, step))
            apart = str(parting(line, self.other) or "one says what the other begins with, or both the same")
        below = f'<div style="line-height:1.5">{text(apart)}</div>'
        self.texts.value = f'<div class="tex2jax_ignore"><div style="{COLUMNS}">{"".join(columns)}</div>{below}</div>'


def same(new: tuple[Any, Any], old: tuple[Any, ...]) -> bool:
    """Whether two prompts and lengths are the same, whatever prompts are made of."""
    if not old or new[1] != old[1] or type(new[0]) is not type(old[0]):
        return False
    return plain_data(new[0]) == plain_data(old[0])


def column(title: str, line: Timeline, other: Timeline | None, step: int) -> str:
    """A run as HTML: the deeper a token's blue the more probable, a frame at the step, a line where the two part."""
    chances = line.probability().values.tolist()
    theirs = [] if other is None else other.tokens
    parts = next((i for i, (a, b) in enumerate(zip(line.tokens, theirs, strict=False)) if a != b), None)
    said = enumerate(zip(line.tokens, chances, strict=True))
    spans = [span(i, label(line.lens, token), chance, i == step, i == parts) for i, (token, chance) in said]
    head = f'<div style="font-weight:600">{text(title)}</div>'
    return f'<div style="flex:1 1 300px;overflow-wrap:anywhere">{head}{"".join(spans)}</div>'


def span(i: int, name: str, chance: float, here: bool, parts: bool) -> str:
    style = f"background:rgba({BLUE},{DEEPEST * chance:.3f});padding:1px 3px;border-radius:3px;margin-right:1px;"
    style += "outline:2px solid currentColor;" if here else ""
    style += "border-bottom:3px solid rgb(214,96,77);" if parts else ""
    said = text(f"step {i}: {name} {chance:.1%}")
    end = "<br>" if name.endswith(("\n", "↵")) else "<wbr>"
    return f'<span style="{style}" title="{said}">{text(name)}</span>{end}'


def text(said: str) -> str:
    """Text as HTML that says just that, in an attribute too."""
    return escape(visible(said), quote=True)
