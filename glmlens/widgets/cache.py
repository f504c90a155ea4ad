"""The KV cache: what a generation remembers at every step, who reads an entry, and what is said without it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from glmlens import cache
from glmlens.analysis.entries import Reads, key_labels, who_reads
from glmlens.analysis.leave_out import leave_one_out
from glmlens.analysis.rows import label, layers_of
from glmlens.lens import Lens
from glmlens.patch.timeline import Timeline
from glmlens.plot import cache_norms, heatmap
from glmlens.prompt import Prompt
from glmlens.results import Labelled
from glmlens.widgets.base import ROW
from glmlens.widgets.chart import Chart, block
from glmlens.widgets.runs import Generations

READ = {"attention": "share of attention", "weighted": "length written", "direct": "logits"}
LOST = {"kl": "nats", "logit": "logits"}
SHOWN = {
    "keys: length": "keys", "values: length": "values", "attention": "attention", "length written": "weighted",
    "adds to the logit": "direct", "left out: KL": "kl", "left out: logit": "logit",
}  # fmt: skip
CHANGES = ("drop", "zero", "scale value", "scale key", "drop everywhere")
Lost = Mapping[str, Labelled]
Change = tuple[str, int, int, int, int, float]
"""What is done, from which step on, to the entry at which layer, kv head and position, and the factor of scaling."""


@dataclass(frozen=True, eq=False)
class Found:
    """A generation, the same with a change, and what each step asked about loses without each entry, by step."""

    line: Timeline
    other: Timeline | None
    lost: Mapping[int, Lost]


class CacheInspector(Generations):
    """What a generation remembers: entries by layer and position, who reads one of them, and what is said without it.

    The first picture shows the cache that a step begins with, for one key-value head, `by` the length of its "keys" or
    "values", by how the step reads it ("attention", "weighted", "direct") or by what the step loses without each entry
    ("kl", "logit", run when it is asked for). The second shows which query heads read the chosen position. `alter`
    changes the chosen entry and generates on from the step. Places: step, layer, kv, position, by.
    """

    def __init__(self, lens: Lens, prompt: Prompt, length: int = 20):
        cfg = lens.cfg
        places = {
            "step": W.IntSlider(0, 0, 0, description="step"),
            "layer": W.IntSlider(0, 0, cfg.n_layers - 1, description="layer"),
            "kv": W.IntSlider(0, 0, cfg.n_kv_heads - 1, description="kv head"),
            "position": W.IntSlider(0, 0, 0, description="position"),
            "by": W.Dropdown(options=list(SHOWN.items()), value="weighted", description="colour by"),
        }
        self.entries, self.readers = Chart(self.hit), Chart(self.hit_head)
        self.what = W.Dropdown(options=CHANGES, description="this entry", layout={"width": "220px"})
        self.factor = W.FloatText(0.5, description="factor", layout={"width": "160px"})
        self.go_on, self.undo = W.Button(description="Generate on"), W.Button(description="Undo")
        self.go_on.tooltip, self.undo.tooltip = "change the chosen entry from this step on", "as it was"
        self.lost: dict[int, Lost] = {}
        self.reads: tuple[int, Reads] | None = None
        row = W.Box([self.what, self.factor, self.go_on, self.undo], layout=ROW)
        super().__init__(lens, prompt, length, "change", places, [row, self.entries, self.readers])
        self.go_on.on_click(lambda _: self.start(self.change_this))
        self.undo.on_click(lambda _: self.start(self.without))
        self.first()

    # ---- asking ----

    def alter(self, what: str, factor: float = 0.0) -> None:
        """Change the chosen entry from the chosen step on, and generate on from there.

        "drop" hides it from the heads that read it, "zero" and "scale value" change its value, "scale key" its key, and
        "drop everywhere" takes its position out of all layers and heads.
        """
        self.run(change=self.chosen(what, factor))

    def chosen(self, what: Any, factor: float) -> Change:
        s = self._state
        return what, s["step"], s["layer"], s["kv"], s["position"], float(factor)

    def change_this(self) -> None:
        self.wanted["change"] = self.chosen(self.what.value, self.factor.value)

    def select(self, **places: Any) -> None:
        """Look at another step (step), another entry (layer, kv, position) or by other numbers (by).

        What every entry is worth to a step, by "kl" or "logit", is run when it is first asked for. ValueError for a
        place that is not there.
        """
        super().select(**places)
        if self.missing():
            self.run()

    def asked(self, **places: Any) -> None:
        with self.caught():
            super().select(**places)
        if not self.closed and self.missing():
            self.start()  # of its own, so that it can be stopped

    def missing(self) -> bool:
        """Whether what is to be shown has not been run."""
        return self._state["by"] in LOST and self._state["step"] not in self.lost

    # ---- working ----

    def compute(self, inputs: Mapping[str, Any]) -> Found:
        line, change = self.original(inputs), inputs["change"]
        lost = dict(self.lost) if line is self.line else {}
        other = None if change is None else self.altered(line, change, inputs["length"])
        step = min(self._state["step"], len(line.moments) - 1)
        if self._state["by"] in LOST and step not in lost:
            lost[step] = self.left_out(line, step)
        return Found(line, other, lost)

    def altered(self, line: Timeline, change: Change, length: int) -> Timeline:
        """The generation with an entry changed from a step on."""
        what, step, layer, kv, position, factor = change
        upto = min(step + 1, length)
        if what == "drop":
            hooks = cache.evict(position=position, layer=layer, kv=kv).hooks(self.lens, steps=range(step, length))
            return self.grown(line.rerun(step, hooks=hooks, at={}, max_new_tokens=upto), length)
        op = operation(what, layer, kv, position, factor)
        return self.grown(line.rerun(step, at={step: op}, max_new_tokens=upto), length)

    def left_out(self, line: Timeline, step: int) -> Lost:
        """What a step loses without each entry, a position at a time."""
        memory = line.memory(step)
        at = memory.kv.positions[0, : memory.kv.length].tolist()
        sheets: list[Mapping[str, Labelled]] = []
        for i, position in enumerate(at):
            self.tick(i, len(at), "positions left out")
            sheets.append(leave_one_out(self.lens, memory, line.moments[step].token, positions=[position]).sheets())
        first = sheets[0]
        joined = {name: np.stack([s[name].values[..., i] for i, s in enumerate(sheets)], -1) for name in LOST}
        return {
            name: Labelled(x, first[name].axes, first[name].labels, first[name].about) for name, x in joined.items()
        }

    # ---- showing ----

    def show(self, found: Found | None = None) -> None:
        if found is not None:
            self.lost, self.reads = dict(found.lost), None
            self.note_runs((self.wanted["prompt"], self.wanted["length"]), found.line, found.other)
        if self.line is None:
            return
        s = self._state
        s["step"] = min(s["step"], len(self.line.moments) - 1)
        self.places["step"].max = len(self.line.moments) - 1
        self.make_room(s)
        s["position"] = min(s["position"], self.places["position"].max)
        if self.reads is None or self.reads[0] != s["step"]:
            said = self.line.moments[s["step"]].token
            self.reads = s["step"], who_reads(self.lens, self.line.memory(s["step"]), said)
        self.entries.draw(self.figure(), (s["layer"], s["position"] // self.block()))
        group = self.lens.cfg.n_groups
        self.readers.draw(self.readers_figure(), (s["layer"], (s["kv"] * group, (s["kv"] + 1) * group - 1)))
        self.words.say(*self.about_entry())
        self.tell("as it was", "changed")

    def make_room(self, places: Mapping[str, Any]) -> None:
        if self.line is not None and places["step"] in range(len(self.line.moments)):
            self.places["position"].max = self.line.moments[places["step"]].before - 1

    def block(self) -> int:
        """How many positions are drawn as one cell."""
        return block(self.places["position"].max + 1)

    def figure(self) -> go.Figure:
        """The cache that the step begins with, of one key-value head."""
        self.alive()
        s, line = self._state, self.recorded()
        by, kv, step = s["by"], s["kv"], s["step"]
        title = f"Kv head {kv} before step {step} says {self.said_by(step)}"
        if by in ("keys", "values"):
            memory = line.memory(step)
            own = slice(kv, kv + 1)
            part = replace(memory.kv, keys=memory.kv.keys[:, :, :, own], values=memory.kv.values[:, :, :, own])
            labels = {"pos": key_labels(self.lens, memory)}
            return cache_norms(part, labels, of=by, title=f"{title}: length of {by}", subtitle="")
        known = self.sheet(by)
        if known is None:
            empty = np.full((self.lens.cfg.n_layers, self.places["position"].max + 1), np.nan, np.float32)
            return heatmap(empty, axes=("layer", "key"), what="not run", title=title, subtitle="not run yet")
        data = known.at(kv=kv)
        some = Labelled(data.values[:, : self.places["position"].max + 1], data.axes,
                        {**data.labels, "key": data.labels["key"][: self.places["position"].max + 1]})  # fmt: skip
        name = next(words for words, sheet in SHOWN.items() if sheet == by)
        signed = by in ("direct", "logit")
        return heatmap(some, axes=("layer", "key"), what=(READ | LOST)[by], signed=signed, title=f"{title}: {name}",
                       subtitle="")  # fmt: skip

    def sheet(self, by: str) -> Labelled | None:
        """The numbers of every entry [layer, kv, key], or None where they have not been run."""
        if by in LOST:
            lost = self.lost.get(self._state["step"])
            return None if lost is None else lost[by]
        assert self.reads is not None
        return self.reads[1].by_entry(by, self.lens.cfg.n_kv_heads)

    def said_by(self, step: int) -> str:
        return label(self.lens, self.recorded().moments[step].token)

    def readers_figure(self) -> go.Figure:
        """How every query head reads the chosen position, the head's key-value head in its label."""
        s, cfg = self._state, self.lens.cfg
        by = s["by"] if s["by"] in READ else "attention"
        assert self.reads is not None
        data = self.reads[1].sheets()[by]
        heads = [f"{head} (kv {head // cfg.n_groups})" for head in range(cfg.n_heads)]
        labels = {"layer": layers_of(self.lens), "head": heads}
        position = data.labels["key"][s["position"]]
        title, of = f"What every head reads at position {position}: {READ[by]}", data.values[:, :, s["position"]]
        signed = by == "direct"
        return heatmap(of, labels, axes=("layer", "head"), what=READ[by], signed=signed, title=title, subtitle="")

    def about_entry(self) -> list[str]:
        """The chosen entry and its numbers, exactly."""
        s, memory = self._state, self.recorded().memory(self._state["step"])
        place = s["layer"], 0, s["position"], s["kv"]
        lengths = [float(x[place].float().norm()) for x in (memory.kv.keys, memory.kv.values)]
        call = int(memory.kv.calls[0, s["position"]])
        name = key_labels(self.lens, memory)[s["position"]]
        written = f"written at step {call}" if call else "of the prompt"
        first = f"entry {name} of layer {s['layer']}, kv {s['kv']}, {written}"
        return [
            f"{first}: length of key {lengths[0]:.3g}, of value {lengths[1]:.3g}",
            self.read_by(),
            self.lost_without(),
        ]

    def read_by(self) -> str:
        s, group = self._state, self.lens.cfg.n_groups
        assert self.reads is not None
        found = []
        for head in range(s["kv"] * group, (s["kv"] + 1) * group):
            place = s["layer"], head, s["position"]
            a, w, d = (float(self.reads[1].sheets()[name].values[place]) for name in READ)
            found.append(f"head {head} attention {a:.4f}, writes {w:.3g}, logit {d:+.3f}")
        return f"read by {'; '.join(found)}"

    def lost_without(self) -> str:
        lost = self.lost.get(self._state["step"])
        if lost is None:
            return "colour by “left out” to see what the step loses without each entry"
        place = self._state["layer"], self._state["kv"], self._state["position"]
        kl, logit = (float(lost[name].values[place]) for name in LOST)
        return f"without it: KL {kl:.3g} nats, logit of {self.said_by(self._state['step'])} lower by {logit:.3g}"

    def in_words(self, change: Change) -> str:
        what, step, layer, kv, position, factor = change
        where = f"position {position}" + ("" if what == "drop everywhere" else f" of layer {layer}, kv {kv}")
        by = f" by {factor:g}" if what.startswith("scale") else ""
        return f"{what} {where}{by}, from step {step} on"

    def hit(self, row: int, column: int) -> None:
        self.asked(layer=row, position=column * self.block())

    def hit_head(self, row: int, column: int) -> None:
        self.asked(layer=row, kv=column // self.lens.cfg.n_groups)


def operation(what: str, layer: int, kv: int, position: int, factor: float) -> Callable[..., Any]:
    """The operation on a cache of this name; ValueError for another name."""

    def scaled(x: Tensor, at: Tensor, layer: int) -> Tensor:
        return x * factor

    known = {
        "zero": lambda: cache.ablate(layer=layer, kv=kv, position=position),
        "scale value": lambda: cache.edit(values=scaled, layer=layer, kv=kv, position=position),
        "scale key": lambda: cache.edit(keys=scaled, layer=layer, kv=kv, position=position),
        "drop everywhere": lambda: cache.evict(position=position),
    }
    if what not in known:
        raise ValueError(f"no change {what!r}; choose from {', '.join(map(repr, CHANGES))}")
    return known[what]()
