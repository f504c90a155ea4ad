"""The KV cache: what a generation remembers at every step, who reads an entry, and what is said without it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from glmlens import cache
from glmlens.analysis.batch import layer_labels, token_label
from glmlens.analysis.cache_reads import CacheReads, cache_reads, label_keys
from glmlens.analysis.leave_one_out import leave_one_out
from glmlens.lens import Lens
from glmlens.plot import cache_norms, heatmap
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.timeline.timeline import Timeline
from glmlens.widgets.base import ROW_LAYOUT
from glmlens.widgets.chart import Chart, block_size
from glmlens.widgets.generations import GenerationsExplorer

READ_UNITS = {"attention": "share of attention", "weighted": "length written", "direct": "logits"}
LOSS_UNITS = {"kl": "nats", "logit": "logits"}
COLOR_OPTIONS = {
    "keys: length": "keys", "values: length": "values", "attention": "attention", "length written": "weighted",
    "adds to the logit": "direct", "left out: KL": "kl", "left out: logit": "logit",
}  # fmt: skip
CHANGE_OPTIONS = ("drop", "zero", "scale value", "scale key", "drop everywhere")
StepLosses = Mapping[str, Labelled]
EntryChange = tuple[str, int, int, int, int, float]
"""What is done, from which step on, to the entry at which layer, kv head and position, and the factor of scaling."""


@dataclass(frozen=True, eq=False)
class CacheResult:
    """A generation, the same with a change, and what each step asked about loses without each entry, by step."""

    original: Timeline
    changed: Timeline | None
    losses: Mapping[int, StepLosses]


class CacheInspector(GenerationsExplorer):
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
            "by": W.Dropdown(options=list(COLOR_OPTIONS.items()), value="weighted", description="colour by"),
        }
        self.entries_chart, self.heads_chart = Chart(self.on_entry_click), Chart(self.on_head_click)
        self.change_box = W.Dropdown(options=CHANGE_OPTIONS, description="this entry", layout={"width": "220px"})
        self.factor_box = W.FloatText(0.5, description="factor", layout={"width": "160px"})
        self.generate_button, self.undo_button = W.Button(description="Generate on"), W.Button(description="Undo")
        self.generate_button.tooltip, self.undo_button.tooltip = (
            "change the chosen entry from this step on",
            "as it was",
        )
        self.losses: dict[int, StepLosses] = {}
        self.reads: tuple[int, CacheReads] | None = None
        row = W.Box([self.change_box, self.factor_box, self.generate_button, self.undo_button], layout=ROW_LAYOUT)
        super().__init__(lens, prompt, length, "change", places, [row, self.entries_chart, self.heads_chart])
        self.generate_button.on_click(lambda _: self.start(self.request_change))
        self.undo_button.on_click(lambda _: self.start(self.request_no_change))
        self.run_first()

    # ---- asking ----

    def alter(self, what: str, factor: float = 0.0) -> None:
        """Change the chosen entry from the chosen step on, and generate on from there.

        "drop" hides it from the heads that read it, "zero" and "scale value" change its value, "scale key" its key, and
        "drop everywhere" takes its position out of all layers and heads.
        """
        self.run(change=self.selected_change(what, factor))

    def selected_change(self, what: Any, factor: float) -> EntryChange:
        s = self._state
        return what, s["step"], s["layer"], s["kv"], s["position"], float(factor)

    def request_change(self) -> None:
        self.pending_inputs["change"] = self.selected_change(self.change_box.value, self.factor_box.value)

    def select(self, **places: Any) -> None:
        """Look at another step (step), another entry (layer, kv, position) or by other numbers (by).

        What every entry is worth to a step, by "kl" or "logit", is run when it is first asked for. ValueError for a
        place that is not there.
        """
        super().select(**places)
        if self.needs_losses():
            self.run()

    def select_safely(self, **places: Any) -> None:
        with self.show_errors():
            super().select(**places)
        if not self.closed and self.needs_losses():
            self.start()  # of its own, so that it can be stopped

    def needs_losses(self) -> bool:
        """Whether what is to be shown has not been run."""
        return self._state["by"] in LOSS_UNITS and self._state["step"] not in self.losses

    # ---- working ----

    def compute(self, inputs: Mapping[str, Any]) -> CacheResult:
        line, change = self.run_original(inputs), inputs["change"]
        lost = dict(self.losses) if line is self.original_timeline else {}
        other = None if change is None else self.run_change(line, change, inputs["length"])
        step = min(self._state["step"], len(line.steps) - 1)
        if self._state["by"] in LOSS_UNITS and step not in lost:
            lost[step] = self.measure_losses(line, step)
        return CacheResult(line, other, lost)

    def run_change(self, line: Timeline, change: EntryChange, length: int) -> Timeline:
        """The generation with an entry changed from a step on."""
        what, step, layer, kv, position, factor = change
        upto = min(step + 1, length)
        if what == "drop":
            hooks = cache.evict(position=position, layer=layer, kv=kv).hooks(self.lens, steps=range(step, length))
            return self.extend_timeline(line.rerun(step, hooks=hooks, at={}, max_new_tokens=upto), length)
        op = make_operation(what, layer, kv, position, factor)
        return self.extend_timeline(line.rerun(step, at={step: op}, max_new_tokens=upto), length)

    def measure_losses(self, line: Timeline, step: int) -> StepLosses:
        """What a step loses without each entry, a position at a time."""
        memory = line.restore_state(step)
        at = memory.kv.positions[0, : memory.kv.length].tolist()
        sheets: list[Mapping[str, Labelled]] = []
        for i, position in enumerate(at):
            self.report_progress(i, len(at), "positions left out")
            sheets.append(leave_one_out(self.lens, memory, line.steps[step].token, positions=[position]).sheets())
        first = sheets[0]
        joined = {name: np.stack([s[name].values[..., i] for i, s in enumerate(sheets)], -1) for name in LOSS_UNITS}
        return {
            name: Labelled(x, first[name].axes, first[name].labels, first[name].about) for name, x in joined.items()
        }

    # ---- showing ----

    def show(self, result: CacheResult | None = None) -> None:
        if result is not None:
            self.losses, self.reads = dict(result.losses), None
            self.store_timelines(
                (self.pending_inputs["prompt"], self.pending_inputs["length"]), result.original, result.changed
            )
        if self.original_timeline is None:
            return
        s = self._state
        s["step"] = min(s["step"], len(self.original_timeline.steps) - 1)
        self.places["step"].max = len(self.original_timeline.steps) - 1
        self.update_ranges(s)
        s["position"] = min(s["position"], self.places["position"].max)
        if self.reads is None or self.reads[0] != s["step"]:
            said = self.original_timeline.steps[s["step"]].token
            self.reads = s["step"], cache_reads(self.lens, self.original_timeline.restore_state(s["step"]), said)
        self.entries_chart.draw(self.figure(), (s["layer"], s["position"] // self.positions_per_cell()))
        group = self.lens.cfg.n_groups
        self.heads_chart.draw(self.heads_figure(), (s["layer"], (s["kv"] * group, (s["kv"] + 1) * group - 1)))
        self.text_lines.show_lines(*self.describe_entry())
        self.show_texts("as it was", "changed")

    def update_ranges(self, places: Mapping[str, Any]) -> None:
        if self.original_timeline is not None and places["step"] in range(len(self.original_timeline.steps)):
            self.places["position"].max = self.original_timeline.steps[places["step"]].past_entries - 1

    def positions_per_cell(self) -> int:
        """How many positions are drawn as one cell."""
        return block_size(self.places["position"].max + 1)

    def figure(self) -> go.Figure:
        """The cache that the step begins with, of one key-value head."""
        self.require_open()
        s, line = self._state, self.require_timeline()
        by, kv, step = s["by"], s["kv"], s["step"]
        title = f"Kv head {kv} before step {step} says {self.chosen_token_label(step)}"
        if by in ("keys", "values"):
            memory = line.restore_state(step)
            own = slice(kv, kv + 1)
            part = replace(memory.kv, keys=memory.kv.keys[:, :, :, own], values=memory.kv.values[:, :, :, own])
            labels = {"pos": label_keys(self.lens, memory)}
            return cache_norms(part, labels, of=by, title=f"{title}: length of {by}", subtitle="")
        known = self.selected_sheet(by)
        if known is None:
            empty = np.full((self.lens.cfg.n_layers, self.places["position"].max + 1), np.nan, np.float32)
            return heatmap(empty, axes=("layer", "key"), what="not run", title=title, subtitle="not run yet")
        data = known.at(kv=kv)
        some = Labelled(data.values[:, : self.places["position"].max + 1], data.axes,
                        {**data.labels, "key": data.labels["key"][: self.places["position"].max + 1]})  # fmt: skip
        name = next(words for words, sheet in COLOR_OPTIONS.items() if sheet == by)
        signed = by in ("direct", "logit")
        return heatmap(some, axes=("layer", "key"), what=(READ_UNITS | LOSS_UNITS)[by], signed=signed, title=f"{title}: {name}",
                       subtitle="")  # fmt: skip

    def selected_sheet(self, by: str) -> Labelled | None:
        """The numbers of every entry [layer, kv, key], or None where they have not been run."""
        if by in LOSS_UNITS:
            lost = self.losses.get(self._state["step"])
            return None if lost is None else lost[by]
        assert self.reads is not None
        return self.reads[1].sum_by_kv_head(by, self.lens.cfg.n_kv_heads)

    def chosen_token_label(self, step: int) -> str:
        return token_label(self.lens, self.require_timeline().steps[step].token)

    def heads_figure(self) -> go.Figure:
        """How every query head reads the chosen position, the head's key-value head in its label."""
        s, cfg = self._state, self.lens.cfg
        by = s["by"] if s["by"] in READ_UNITS else "attention"
        assert self.reads is not None
        data = self.reads[1].sheets()[by]
        heads = [f"{head} (kv {head // cfg.n_groups})" for head in range(cfg.n_heads)]
        labels = {"layer": layer_labels(self.lens), "head": heads}
        position = data.labels["key"][s["position"]]
        title, of = f"What every head reads at position {position}: {READ_UNITS[by]}", data.values[:, :, s["position"]]
        signed = by == "direct"
        return heatmap(of, labels, axes=("layer", "head"), what=READ_UNITS[by], signed=signed, title=title, subtitle="")

    def describe_entry(self) -> list[str]:
        """The chosen entry and its numbers, exactly."""
        s, memory = self._state, self.require_timeline().restore_state(self._state["step"])
        place = s["layer"], 0, s["position"], s["kv"]
        lengths = [float(x[place].float().norm()) for x in (memory.kv.keys, memory.kv.values)]
        call = int(memory.kv.calls[0, s["position"]])
        name = label_keys(self.lens, memory)[s["position"]]
        written = f"written at step {call}" if call else "of the prompt"
        first = f"entry {name} of layer {s['layer']}, kv {s['kv']}, {written}"
        return [
            f"{first}: length of key {lengths[0]:.3g}, of value {lengths[1]:.3g}",
            self.describe_reads(),
            self.describe_losses(),
        ]

    def describe_reads(self) -> str:
        s, group = self._state, self.lens.cfg.n_groups
        assert self.reads is not None
        found = []
        for head in range(s["kv"] * group, (s["kv"] + 1) * group):
            place = s["layer"], head, s["position"]
            a, w, d = (float(self.reads[1].sheets()[name].values[place]) for name in READ_UNITS)
            found.append(f"head {head} attention {a:.4f}, writes {w:.3g}, logit {d:+.3f}")
        return f"read by {'; '.join(found)}"

    def describe_losses(self) -> str:
        lost = self.losses.get(self._state["step"])
        if lost is None:
            return "colour by “left out” to see what the step loses without each entry"
        place = self._state["layer"], self._state["kv"], self._state["position"]
        kl, logit = (float(lost[name].values[place]) for name in LOSS_UNITS)
        return f"without it: KL {kl:.3g} nats, logit of {self.chosen_token_label(self._state['step'])} lower by {logit:.3g}"

    def describe_change(self, change: EntryChange) -> str:
        what, step, layer, kv, position, factor = change
        where = f"position {position}" + ("" if what == "drop everywhere" else f" of layer {layer}, kv {kv}")
        by = f" by {factor:g}" if what.startswith("scale") else ""
        return f"{what} {where}{by}, from step {step} on"

    def on_entry_click(self, row: int, column: int) -> None:
        self.select_safely(layer=row, position=column * self.positions_per_cell())

    def on_head_click(self, row: int, column: int) -> None:
        self.select_safely(layer=row, kv=column // self.lens.cfg.n_groups)


def make_operation(what: str, layer: int, kv: int, position: int, factor: float) -> Callable[..., Any]:
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
        raise ValueError(f"no change {what!r}; choose from {', '.join(map(repr, CHANGE_OPTIONS))}")
    return known[what]()
