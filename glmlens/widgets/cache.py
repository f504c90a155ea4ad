"""The KV cache of a generation: its entries at every step, which heads read them, and generations with one edited."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
from torch import Tensor

from glmlens import cache
from glmlens.analysis.cache_reads import CacheReads, cache_reads, label_keys
from glmlens.analysis.leave_one_out import leave_one_out
from glmlens.analysis.prompt_batch import layer_labels, token_label
from glmlens.lens import Lens
from glmlens.plot import cache_norms, heatmap
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.timeline.timeline import Timeline
from glmlens.widgets.base import ROW_LAYOUT
from glmlens.widgets.chart import Chart, block_size
from glmlens.widgets.generation_runs import GenerationsExplorer

READ_UNITS = {"attention": "attention", "weighted": "weighted value norm", "direct": "logits"}
LOSS_UNITS = {"kl": "nats", "logit": "logits"}
COLOR_OPTIONS = {
    "key norm": "keys", "value norm": "values", "attention": "attention", "weighted value norm": "weighted",
    "direct logit contribution": "direct", "leave-one-out: KL": "kl", "leave-one-out: logit": "logit",
}  # fmt: skip
CHANGE_OPTIONS = {
    "evict here": "drop", "zero value": "zero", "scale value": "scale value", "scale key": "scale key",
    "evict in all layers": "drop everywhere",
}  # fmt: skip
StepLosses = Mapping[str, Labelled]
EntryChange = tuple[str, int, int, int, int, float]
"""A value of CHANGE_OPTIONS, the first step, layer, KV head and position of the entry, and the factor of scaling."""


@dataclass(frozen=True, eq=False)
class CacheResult:
    """A generation, its rerun with a change or None, and the leave-one-out effects of the steps that have them."""

    original: Timeline
    changed: Timeline | None
    losses: Mapping[int, StepLosses]


class CacheInspector(GenerationsExplorer):
    """Inspect the KV cache of a generation, and generate with an entry edited.

    The first chart shows the cache before a step [layer, position], for one KV head. `by` chooses the numbers: the norm
    of "keys" or "values", how the step reads each entry ("attention", "weighted", "direct"), or the effect of leaving
    it out ("kl", "logit": computed at the first request). The second chart shows which query heads read the selected
    position. `alter` edits the selected entry and generates from the selected step. Places: step, layer, kv, position,
    by.
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
        self.change_box = W.Dropdown(
            options=list(CHANGE_OPTIONS.items()), description="edit entry", layout={"width": "260px"}
        )
        self.factor_box = W.FloatText(0.5, description="factor", layout={"width": "160px"})
        self.generate_button = W.Button(
            description="Apply and generate",
            tooltip="edit the selected entry and generate from this step",
            layout={"width": "auto"},
        )
        self.undo_button = W.Button(description="Undo", tooltip="remove the edit")
        self.losses: dict[int, StepLosses] = {}
        self.reads: tuple[int, CacheReads] | None = None  # the step and its reads
        row = W.Box([self.change_box, self.factor_box, self.generate_button, self.undo_button], layout=ROW_LAYOUT)
        views = [row, self.entries_chart, self.heads_chart]
        super().__init__(lens, prompt, length, change_name="change", places=places, views=views)
        self.generate_button.on_click(lambda _: self.start(self.request_change))
        self.undo_button.on_click(lambda _: self.start(self.request_no_change))
        self.run_first()

    # ---- select and run ----

    def alter(self, what: str, factor: float = 0.0) -> None:
        """Edit the selected entry, and generate from the selected step.

        "drop" evicts the entry from its layer and KV head, "drop everywhere" its position from all layers and heads.
        "zero" and "scale value" edit its value, "scale key" its key. Raises ValueError for another name.
        """
        self.run(change=self.selected_change(what, factor))

    def selected_change(self, what: Any, factor: float) -> EntryChange:
        """Return the change of this kind at the selected entry and step."""
        s = self._state
        return what, s["step"], s["layer"], s["kv"], s["position"], float(factor)

    def request_change(self) -> None:
        """Put the change of the controls into the next run."""
        self.pending_inputs["change"] = self.selected_change(self.change_box.value, self.factor_box.value)

    def select(self, **places: Any) -> None:
        """Select a step, an entry (layer, kv, position) or the numbers to show (by).

        "kl" and "logit" are computed at the first request for a step. Raises ValueError for a value out of range.
        """
        super().select(**places)
        if self.needs_losses():
            self.run()

    def select_safely(self, **places: Any) -> None:
        """`select` for callbacks: errors appear under the charts, and leave-one-out effects run in a thread."""
        with self.show_errors():
            super().select(**places)
        if not self.closed and self.needs_losses():
            self.start()  # in a thread, so that the Stop button works

    def needs_losses(self) -> bool:
        """Whether the effects to show have not been computed yet."""
        return self._state["by"] in LOSS_UNITS and self._state["step"] not in self.losses

    # ---- compute ----

    def compute(self, inputs: Mapping[str, Any]) -> CacheResult:
        """Run the generation, its rerun with the change, and the leave-one-out effects if they are shown."""
        line = self.run_original(inputs)
        change = inputs["change"]
        # Effects of the same generation are kept: only those of this step may be missing.
        lost = dict(self.losses) if line is self.original_timeline else {}
        other = None if change is None else self.run_change(line, change, inputs["length"])
        step = min(self._state["step"], len(line.steps) - 1)
        if self._state["by"] in LOSS_UNITS and step not in lost:
            lost[step] = self.measure_losses(line, step)
        return CacheResult(line, other, lost)

    def run_change(self, line: Timeline, change: EntryChange, length: int) -> Timeline:
        """Rerun the generation with the change of an entry, from its step on."""
        what, step, layer, kv, position, factor = change
        upto = min(step + 1, length)  # this step alone: extend_timeline runs the others in slices
        if what == "drop":  # eviction from one layer and KV head is a mask on attention, at every later step
            hooks = cache.evict(position=position, layer=layer, kv=kv).hooks(self.lens, steps=range(step, length))
            return self.extend_timeline(line.rerun(step, hooks=hooks, at={}, max_new_tokens=upto), length)
        op = make_operation(what, layer, kv, position, factor)
        return self.extend_timeline(line.rerun(step, at={step: op}, max_new_tokens=upto), length)

    def measure_losses(self, line: Timeline, step: int) -> StepLosses:
        """Measure the leave-one-out effect of every entry on a step, position by position so that it can be stopped."""
        state = line.restore_state(step)
        at = state.kv.positions[0, : state.kv.length].tolist()
        sheets: list[Mapping[str, Labelled]] = []
        for i, position in enumerate(at):
            self.report_progress(i, len(at), "positions left out")
            sheets.append(leave_one_out(self.lens, state, line.steps[step].token, positions=[position]).sheets())
        first = sheets[0]
        joined = {name: np.stack([s[name].values[..., i] for i, s in enumerate(sheets)], -1) for name in LOSS_UNITS}
        return {
            name: Labelled(x, first[name].axes, first[name].labels, first[name].about) for name, x in joined.items()
        }

    # ---- draw ----

    def show(self, result: CacheResult | None = None) -> None:
        """Draw the cache, the reads of the selected position, its numbers, and the text of both runs."""
        if result is not None:
            self.losses = dict(result.losses)
            self.reads = None
            wanted = self.pending_inputs["prompt"], self.pending_inputs["length"]
            self.store_timelines(wanted, result.original, result.changed)
        if self.original_timeline is None:
            return
        s = self._state
        s["step"] = min(s["step"], len(self.original_timeline.steps) - 1)
        self.places["step"].max = len(self.original_timeline.steps) - 1
        self.update_ranges(s)
        s["position"] = min(s["position"], self.places["position"].max)
        if self.reads is None or self.reads[0] != s["step"]:
            token = self.original_timeline.steps[s["step"]].token
            self.reads = s["step"], cache_reads(self.lens, self.original_timeline.restore_state(s["step"]), token)
        self.entries_chart.draw(self.figure(), (s["layer"], s["position"] // self.positions_per_cell()))
        group = self.lens.cfg.n_groups  # query heads per KV head
        self.heads_chart.draw(self.heads_figure(), (s["layer"], (s["kv"] * group, (s["kv"] + 1) * group - 1)))
        self.text_lines.show_lines(*self.describe_entry())
        self.show_texts("original", "with edit")

    def update_ranges(self, places: Mapping[str, Any]) -> None:
        """Set the range of positions to the entries that the cache of the step holds."""
        if self.original_timeline is not None and places["step"] in range(len(self.original_timeline.steps)):
            self.places["position"].max = self.original_timeline.steps[places["step"]].past_entries - 1

    def positions_per_cell(self) -> int:
        """Return how many positions are drawn as one cell."""
        return block_size(self.places["position"].max + 1)

    def figure(self) -> go.Figure:
        """Return the cache before the selected step, of one KV head, as a figure."""
        self.require_open()
        s = self._state
        line = self.require_timeline()
        by, kv, step = s["by"], s["kv"], s["step"]
        title = f"KV head {kv}, cache before step {step} (next token {self.chosen_token_label(step)})"
        if by in ("keys", "values"):
            state = line.restore_state(step)
            one = slice(kv, kv + 1)
            part = replace(state.kv, keys=state.kv.keys[:, :, :, one], values=state.kv.values[:, :, :, one])
            labels = {"pos": label_keys(self.lens, state)}
            return cache_norms(part, labels, of=by, title=f"{title}: norm of {by}", subtitle="")
        sheet = self.selected_sheet(by)
        if sheet is None:  # leave-one-out effects whose run was stopped
            empty = np.full((self.lens.cfg.n_layers, self.places["position"].max + 1), np.nan, np.float32)
            return heatmap(empty, axes=("layer", "key"), what="not run", title=title, subtitle="not run yet")
        data = sheet.at(kv=kv)
        # The last key is the step's own token, which the cache does not hold yet.
        cached = Labelled(data.values[:, : self.places["position"].max + 1], data.axes,
                          {**data.labels, "key": data.labels["key"][: self.places["position"].max + 1]})  # fmt: skip
        name = next(label for label, value in COLOR_OPTIONS.items() if value == by)
        signed = by in ("direct", "logit")
        unit = (READ_UNITS | LOSS_UNITS)[by]
        axes = ("layer", "key")
        return heatmap(cached, axes=axes, what=unit, signed=signed, title=f"{title}: {name}", subtitle="")

    def selected_sheet(self, by: str) -> Labelled | None:
        """Return the numbers of every entry [layer, kv, key], or None if they have not been computed."""
        if by in LOSS_UNITS:
            lost = self.losses.get(self._state["step"])
            return None if lost is None else lost[by]
        assert self.reads is not None
        return self.reads[1].sum_by_kv_head(by, self.lens.cfg.n_kv_heads)

    def chosen_token_label(self, step: int) -> str:
        """Return the label of the token that a step chose."""
        return token_label(self.lens, self.require_timeline().steps[step].token)

    def heads_figure(self) -> go.Figure:
        """Return how every query head reads the selected position, as a figure; labels name each head's KV head."""
        s = self._state
        cfg = self.lens.cfg
        by = s["by"] if s["by"] in READ_UNITS else "attention"
        assert self.reads is not None
        data = self.reads[1].sheets()[by]
        heads = [f"{head} (kv {head // cfg.n_groups})" for head in range(cfg.n_heads)]
        labels = {"layer": layer_labels(self.lens), "head": heads}
        position = data.labels["key"][s["position"]]
        title = f"Reads of position {position} by query head: {READ_UNITS[by]}"
        values = data.values[:, :, s["position"]]
        signed = by == "direct"
        axes = ("layer", "head")
        return heatmap(values, labels, axes=axes, what=READ_UNITS[by], signed=signed, title=title, subtitle="")

    def describe_entry(self) -> list[str]:
        """Return the selected entry and its numbers as lines of text."""
        s = self._state
        state = self.require_timeline().restore_state(s["step"])
        place = s["layer"], 0, s["position"], s["kv"]
        norms = [float(x[place].float().norm()) for x in (state.kv.keys, state.kv.values)]
        call = int(state.kv.calls[0, s["position"]])  # 0: the call that ran the prompt
        name = label_keys(self.lens, state)[s["position"]]
        written = f"written at step {call}" if call else "of the prompt"
        first = f"entry {name} of layer {s['layer']}, kv {s['kv']}, {written}"
        return [
            f"{first}: key norm {norms[0]:.3g}, value norm {norms[1]:.3g}",
            self.describe_reads(),
            self.describe_losses(),
        ]

    def describe_reads(self) -> str:
        """Return how the heads of the selected KV head read the entry, as text."""
        s = self._state
        group = self.lens.cfg.n_groups
        assert self.reads is not None
        readers = []
        for head in range(s["kv"] * group, (s["kv"] + 1) * group):
            place = s["layer"], head, s["position"]
            a, w, d = (float(self.reads[1].sheets()[name].values[place]) for name in READ_UNITS)
            readers.append(f"head {head}: attention {a:.4f}, weighted value norm {w:.3g}, logit contribution {d:+.3f}")
        return f"read by {'; '.join(readers)}"

    def describe_losses(self) -> str:
        """Return the effect of leaving the entry out, or how to compute it, as text."""
        lost = self.losses.get(self._state["step"])
        if lost is None:
            return "colour by leave-one-out to measure the effect of each entry"
        place = self._state["layer"], self._state["kv"], self._state["position"]
        kl, logit = (float(lost[name].values[place]) for name in LOSS_UNITS)
        token = self.chosen_token_label(self._state["step"])
        return f"without it: KL {kl:.3g} nats, logit of {token} lower by {logit:.3g}"

    def describe_change(self, change: EntryChange) -> str:
        """Return a change as text."""
        what, step, layer, kv, position, factor = change
        where = f"position {position}" + ("" if what == "drop everywhere" else f" of layer {layer}, kv {kv}")
        by = f" by {factor:g}" if what.startswith("scale") else ""
        name = next((label for label, value in CHANGE_OPTIONS.items() if value == what), what)
        return f"{name}: {where}{by}, from step {step} on"

    def on_entry_click(self, row: int, column: int) -> None:
        self.select_safely(layer=row, position=column * self.positions_per_cell())

    def on_head_click(self, row: int, column: int) -> None:
        self.select_safely(layer=row, kv=column // self.lens.cfg.n_groups)


def make_operation(what: str, layer: int, kv: int, position: int, factor: float) -> Callable[..., Any]:
    """Return the cache operation of this name; raise ValueError for an unknown one."""

    def scale(x: Tensor, at: Tensor, layer: int) -> Tensor:
        return x * factor

    operations = {
        "zero": lambda: cache.ablate(layer=layer, kv=kv, position=position),
        "scale value": lambda: cache.edit(values=scale, layer=layer, kv=kv, position=position),
        "scale key": lambda: cache.edit(keys=scale, layer=layer, kv=kv, position=position),
        "drop everywhere": lambda: cache.evict(position=position),
    }
    if what not in operations:
        raise ValueError(f"no change {what!r}; choose from {', '.join(map(repr, CHANGE_OPTIONS.values()))}")
    return operations[what]()
