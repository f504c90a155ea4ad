"""A generation step by step: what every layer would say, and what becomes of it when a step says something else."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
import torch

from glmlens.analysis.rows import Token, exact, layers_of
from glmlens.analysis.rows import label as spelt
from glmlens.integers import read_integer
from glmlens.lens import Lens
from glmlens.patch.timeline import Timeline
from glmlens.plot.bars import bars
from glmlens.plot.heatmaps import best, drawn
from glmlens.plot.style import Look, shown, visible
from glmlens.prompt import Prompt
from glmlens.results import Labelled
from glmlens.widgets.base import ROW
from glmlens.widgets.chart import MOST, Chart, block
from glmlens.widgets.runs import Generations

TOP = 8  # tokens of a layer and step
ROOM = 20  # steps whose words are written in their cells


def label(lens: Lens, token: int) -> str:
    """A token as it can be sent to a page."""
    return visible(spelt(lens, token))


@dataclass(frozen=True, eq=False)
class Readings:
    """What every layer's stream says at every step, read as if it were the last.

    `ids` and `chances` [layer, step, rank] are the most probable tokens, `chosen` [layer, step] the probability of the
    token that the step chose.
    """

    ids: np.ndarray
    chances: np.ndarray
    chosen: np.ndarray


@dataclass(frozen=True, eq=False)
class Found:
    """A generation and the one that branches off it, each with its readings."""

    runs: Mapping[str, tuple[Timeline, Readings]]


class GenerationExplorer(Generations):
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
        self.lens_chart, self.tokens_chart = Chart(self.hit), Chart(self.hit_token)
        self.read: Mapping[str, tuple[Timeline, Readings]] = {}
        self.instead = W.Combobox(placeholder="text of one token", description="say instead", continuous_update=False)
        self.go_on, self.undo = W.Button(description="Branch here"), W.Button(description="Undo")
        self.go_on.tooltip, self.undo.tooltip = "say this at the chosen step and generate on", "without the branch"
        row = W.Box([self.instead, self.go_on, self.undo], layout=ROW)
        super().__init__(lens, prompt, length, "branch", places, [self.lens_chart, self.tokens_chart, row])
        self.go_on.on_click(lambda _: self.start(self.say_instead))
        self.undo.on_click(lambda _: self.start(self.without))
        self.first()

    # ---- asking ----

    def branch(self, token: Token, step: int | None = None) -> None:
        """Say this token (its text or id) at a step, by default the chosen one, and generate on from there.

        The branch is off the generation as it went. ValueError for what is not one token of this model.
        """
        at = self._state["step"] if step is None else read_integer(step, "step")
        self.run(branch=(at, self.id_of(token)))

    def id_of(self, token: Token) -> int:
        found = self.lens.to_single_token(token) if isinstance(token, str) else read_integer(token, "token")
        if not 0 <= found < self.lens.cfg.d_vocab:
            raise ValueError(f"token {found}; this model has 0 to {self.lens.cfg.d_vocab - 1}")
        return found

    def say_instead(self) -> None:
        self.branch_off(self._state["step"], self.named(self.instead.value))

    def branch_off(self, step: int, token: int) -> None:
        """Want a branch at this step; ValueError where a branch is looked at, which has none."""
        if self._state["run"] != "first":
            raise ValueError("a branch goes off the generation as it went: look at that, and at the step")
        self.wanted["branch"] = step, token

    def named(self, said: str) -> int:
        """The token that a label or a text names: a label of those shown is itself."""
        _, readings = self.chosen_run()
        ids = readings.ids[self._state["layer"], self._state["step"]].tolist()
        labels = [label(self.lens, i) for i in ids]
        return ids[labels.index(said)] if said in labels else self.id_of(said)

    # ---- working ----

    def compute(self, inputs: Mapping[str, Any]) -> Found:
        line, branch = self.original(inputs), inputs["branch"]
        known = self.read.get("first")
        runs = {"first": known if known is not None and known[0] is line else (line, self.readings(line))}
        if branch is not None:
            step, token = branch
            start = line.rerun(step, token=token, max_new_tokens=min(step + 2, max(inputs["length"], step + 1)))
            other = self.grown(start, inputs["length"])
            runs["branch"] = other, self.readings(other)
        return Found(runs)

    def readings(self, line: Timeline) -> Readings:
        """What every layer says, a layer at a time."""
        model, found = self.lens.model, []
        chosen = torch.tensor(line.tokens, device=self.lens.device)[:, None]
        for layer in range(self.lens.cfg.n_layers):
            self.tick(layer, self.lens.cfg.n_layers, "layers read")
            resid = torch.stack([moment.resid[layer] for moment in line.moments])
            with torch.no_grad():
                p = exact(model.unembed(model.ln_final(resid[None]))[0]).softmax(-1)
            top = p.topk(min(TOP, p.shape[-1]))
            found.append([x.cpu().numpy() for x in (top.indices, top.values, p.gather(1, chosen)[:, 0])])
        return Readings(*(np.stack(x) for x in zip(*found, strict=True)))

    # ---- showing ----

    def show(self, found: Found | None = None) -> None:
        s = self._state
        if found is not None:
            self.read = found.runs
            other = found.runs.get("branch")
            self.note_runs((s["prompt"], s["length"]), found.runs["first"][0], None if other is None else other[0])
            s["run"] = s["run"] if s["run"] in found.runs else "first"
        if not self.read:
            return
        line, _ = self.chosen_run()
        self.make_room(s)
        s["step"] = min(s["step"], len(line.moments) - 1)
        each = block(len(line.moments))
        self.lens_chart.draw(self.figure(), (s["layer"], s["step"] // each))
        self.tokens_chart.draw(self.tokens_figure())
        self.words.say(self.about_step())
        self.tell("as it went", "branch")

    def make_room(self, places: Mapping[str, Any]) -> None:
        if places["run"] in self.read:
            self.places["step"].max = len(self.read[places["run"]][0].moments) - 1

    def chosen_run(self) -> tuple[Timeline, Readings]:
        run = self._state["run"]
        if run not in self.read:
            raise ValueError("there is no branch: say another token at a step with branch(token)")
        return self.read[run]

    def figure(self) -> go.Figure:
        """The logit lens of every step of the chosen run."""
        self.alive()
        s, (line, readings) = self._state, self.chosen_run()
        steps = [f"{i} {label(self.lens, token)}" for i, token in enumerate(line.tokens)]
        names = np.vectorize(lambda i: label(self.lens, int(i)), otypes=[object])(readings.ids)
        values = readings.chances[..., 0] if s["by"] == "top" else readings.chosen
        data = Labelled(values.astype(np.float32), ("layer", "step"), {"layer": layers_of(self.lens), "step": steps})
        words: Any = False
        if len(steps) <= ROOM:
            words = np.array(
                [[shown(name, max(5, 120 // len(steps))) for name in row] for row in names[..., 0]], dtype=object
            )
        more = ("%{customdata}", best(names, readings.chances)) if len(steps) <= MOST else None
        whose = {"first": "as it went", "branch": "of the branch"}[s["run"]]
        what = {"top": "most probable", "chosen": "chosen"}[s["by"]]
        name = f"Logit lens of every step {whose}: the {what} token"
        look: Look = {"subtitle": ""}
        return drawn(data, "probability", False, limits=(0, 1), text=words, more=more, name=name, look=look)

    def tokens_figure(self) -> go.Figure:
        """The most probable tokens of the chosen layer and step."""
        s, (line, readings) = self._state, self.chosen_run()
        place = s["layer"], s["step"]
        ids = readings.ids[place].tolist()
        self.instead.options = [label(self.lens, i) for i in ids]
        chosen = line.tokens[s["step"]]
        names = [f"{'▸ ' if i == chosen else ''}{label(self.lens, i)}" for i in ids]
        more = "; a click goes on with it" if s["run"] == "first" else ""
        title = f"What layer {s['layer']} says at step {s['step']}{more}"
        return bars(readings.chances[place], {"part": names}, what="probability", title=title, subtitle="")

    def about_step(self) -> str:
        """The chosen step in numbers."""
        s, (line, readings) = self._state, self.chosen_run()
        step, token = s["step"], line.tokens[s["step"]]
        entropy, chance = float(line.entropy().values[step]), float(readings.chosen[-1, step])
        first = np.flatnonzero(readings.ids[:, step, 0] != token)
        since = int(first[-1]) + 1 if len(first) else 0
        settled = f"said by every layer from {since} on" if since < self.lens.cfg.n_layers else "not the most probable"
        return f"step {step} says {label(self.lens, token)}: {chance:.2%}, entropy {entropy:.3f} nats; {settled}"

    def in_words(self, change: tuple[int, int]) -> str:
        return f"{label(self.lens, change[1])} at step {change[0]}"

    def hit(self, row: int, column: int) -> None:
        self.asked(layer=row, step=column * block(self.places["step"].max + 1))

    def hit_token(self, i: int) -> None:
        with self.caught():
            (_, readings), step = self.chosen_run(), self._state["step"]
            token = int(readings.ids[self._state["layer"], step, i])
            self.start(lambda: self.branch_off(step, token))
