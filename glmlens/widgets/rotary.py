"""Rotary positions: a head's pattern from selected frequency pairs, and its score as a sum of waves over distance."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
import torch
import traitlets as T

from glmlens.analysis.attention_distance import DistanceProfile, distance_profile
from glmlens.analysis.prompt_batch import to_numpy, token_label
from glmlens.analysis.rotary import ScoreParts, format_wavelength, pair_frequencies_of, score_parts, wavelengths
from glmlens.integers import read_integer, read_integers
from glmlens.lens import Lens
from glmlens.patch.replacement_values import to_token_ids
from glmlens.plot import attention_pattern, lines
from glmlens.plot.style import GREY
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.widgets.base import ROW_LAYOUT, Explorer, prompt_box
from glmlens.widgets.chart import Chart, block_size
from glmlens.widgets.generation_runs import TextLines

MAX_WAVES = 8  # waves drawn, the largest
MIN_MAX_DISTANCE = 64  # tokens: distances are drawn at least up to this
FAINT_OPACITY = 0.2  # of waves whose pair is off


class ToggleGroup(W.Box):
    """A toggle button per item, and buttons for all and none. `value` holds the indices of the items that are on."""

    value = T.Tuple()

    def __init__(self, names: Sequence[str], tips: Sequence[str]):
        every = tuple(range(len(names)))
        self.buttons = [
            W.ToggleButton(True, description=name, tooltip=tip, layout={"width": "auto"})
            for name, tip in zip(names, tips, strict=True)
        ]
        self.following = False  # whether buttons are set from the value, and not the value from a button
        both = [W.Button(description=name, layout={"width": "auto"}) for name in ("all", "none")]
        super().__init__([*self.buttons, *both], layout=ROW_LAYOUT)
        self.value = every
        self.observe(lambda _: self.update_buttons(), "value")
        for button in self.buttons:
            button.observe(lambda _: self.on_button_change(), "value")
        both[0].on_click(lambda _: self.set_trait("value", every))
        both[1].on_click(lambda _: self.set_trait("value", ()))

    def on_button_change(self) -> None:
        """Set the value from the buttons."""
        if not self.following:
            self.value = tuple(i for i, button in enumerate(self.buttons) if button.value)

    def update_buttons(self) -> None:
        """Set the buttons from the value."""
        self.following = True
        for i, button in enumerate(self.buttons):
            button.value = i in self.value
        self.following = False


@dataclass(frozen=True, eq=False)
class PromptProfile:
    """A prompt, the labels of its tokens, and the distance profile of every head."""

    prompt: Prompt
    labels: list[str]
    profile: DistanceProfile


@dataclass(frozen=True, eq=False)
class ScoreWaves:
    """A score by distance: a wave [pair, distance] per rotary pair, and the constant part of the unrotated channels."""

    pair_waves: np.ndarray
    content: float

    def sum(self, pairs: Sequence[int], content: bool) -> np.ndarray:
        """Return the score [distance] from these pairs, with the unrotated channels or without."""
        return self.pair_waves[list(pairs)].sum(0) + (self.content if content else 0.0)


class RotaryExplorer(Explorer):
    """Explore how a head attends by position: its pattern from selected rotary pairs, and its score by distance.

    The first chart is the pattern from the selected pairs and, with `content`, the unrotated channels alone. The second
    is the score at every distance of the selected query and key, or of the head's mean query and key: the largest
    waves, those of other pairs faint, and the sum of the selected ones. Places: layer, head, query, key, distance (at
    first that of query and key), pairs (indices of the selected ones), content, of ("these" or "mean").
    """

    def __init__(self, lens: Lens, prompt: Prompt):
        lengths = wavelengths(lens).tolist()
        names = [f"{i} ({format_wavelength(length)})" for i, length in enumerate(lengths)]
        tips = [f"pair {i}: wavelength {format_wavelength(length)} tokens" for i, length in enumerate(lengths)]
        content = lens.cfg.d_rotary < lens.cfg.d_head
        places = {
            "layer": W.IntSlider(0, 0, lens.cfg.n_layers - 1, description="layer"),
            "head": W.IntSlider(0, 0, lens.cfg.n_heads - 1, description="head"),
            "query": W.IntSlider(0, 0, 0, description="query"),
            "key": W.IntSlider(0, 0, 0, description="key"),
            "distance": W.IntSlider(0, 0, MIN_MAX_DISTANCE, description="distance"),
            "of": W.ToggleButtons(options=[("this query and key", "these"), ("mean query and key", "mean")],
                                  style={"button_width": "auto"}),
            "content": W.Checkbox(content, description="unrotated channels", disabled=not content, indent=False,
                                  layout={"width": "auto"}),
            "pairs": ToggleGroup(names, tips),
        }  # fmt: skip
        self.pattern_chart, self.waves_chart = Chart(self.on_pattern_click), Chart(self.on_distance_click)
        self.text_lines = TextLines()
        self.profile: PromptProfile | None = None
        self.score_parts: tuple[tuple[int, int], ScoreParts] | None = None
        inputs = {"prompt": prompt_box(prompt)}
        views = [self.pattern_chart, self.waves_chart, self.text_lines]
        super().__init__(lens, inputs, places, views=views, initial_state={"prompt": prompt})
        self.run_first()

    def compute(self, inputs: Mapping[str, Any]) -> PromptProfile:
        """Measure the distance profile of the prompt; parts of scores are computed per head, when it is selected."""
        rows = to_token_ids(self.lens, inputs["prompt"])
        if len(rows) != 1:
            raise ValueError(f"one prompt at a time, not {len(rows)}")
        self.report_progress(0, 1, "passes")
        labels = [token_label(self.lens, token) for token in rows[0]]
        tokens = torch.tensor(rows)
        # A mask of ones: no token is padding, whatever its id.
        prompt: Prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        distances = max(len(labels), MIN_MAX_DISTANCE) + 1
        return PromptProfile(prompt, labels, distance_profile(self.lens, prompt, distances=distances))

    def select(self, **places: Any) -> None:
        """Select a head, two tokens (query, key), a distance, or parts of the score (pairs, content).

        Another query or key sets the distance to theirs, unless one is given. Raises ValueError for a value out of
        range, or a key after its query.
        """
        places |= {name: read_integer(places[name], name) for name in ("query", "key") if name in places}
        no_pairs = isinstance(places.get("pairs", ()), Sized) and not len(places.get("pairs", ()))
        if not no_pairs:  # read_integers takes no empty sequence
            places["pairs"] = read_integers(places["pairs"], "pairs", size=len(self.pair_frequencies()))
        s = {**self._state, **places}
        if "query" in places and "key" not in places:  # an earlier query takes its key along
            places["key"] = s["key"] = min(s["key"], s["query"])
        if places.keys() & {"query", "key"} and "distance" not in places:
            if s["key"] > s["query"]:
                with self.pause_callbacks():
                    self.update_controls()
                raise ValueError(f"key {s['key']} comes after query {s['query']}, which cannot see it")
            places["distance"] = s["query"] - s["key"]
        super().select(**places)

    def show(self, result: PromptProfile | None = None) -> None:
        """Draw the pattern, the waves, and the numbers of the selection; after a run, select the last query."""
        s = self._state
        if result is not None:
            self.profile = result
            self.score_parts = None
            last = len(result.labels) - 1
            for name in ("query", "key"):
                self.places[name].max = last
            self.places["distance"].max = max(last + 1, MIN_MAX_DISTANCE)
            s["query"] = last
            s["key"] = min(s["key"], last)
            s["distance"] = last - s["key"]
        if self.profile is None:
            return
        strange = [i for i in s["pairs"] if i not in range(len(self.pair_frequencies()))]
        if strange:
            raise ValueError(f"pairs {strange} asked for; there is 0 to {len(self.pair_frequencies()) - 1}")
        each = block_size(len(self.profile.labels))
        self.pattern_chart.draw(self.figure(), (s["query"] // each, s["key"] // each))
        self.waves_chart.draw(self.waves_figure())
        self.text_lines.show_lines(*self.describe_selection())

    def compute_score_parts(self) -> ScoreParts:
        """Return the parts of the selected head's scores, computed once per selected head."""
        if self.profile is None:
            raise ValueError("nothing has been run yet: run()")
        head = self._state["layer"], self._state["head"]
        if self.score_parts is None or self.score_parts[0] != head:
            self.score_parts = head, score_parts(self.lens, self.profile.prompt, *head)
        return self.score_parts[1]

    def pair_frequencies(self) -> np.ndarray:
        """Return the rotation of every pair in radians per token."""
        return to_numpy(pair_frequencies_of(self.lens))

    def selected_parts(self) -> list[int]:
        """Return the indices of the selected parts of the score; the unrotated channels come after the pairs."""
        has_content = self.lens.cfg.d_rotary < self.lens.cfg.d_head
        content = [len(self.pair_frequencies())] if self._state["content"] and has_content else []
        return [*self._state["pairs"], *content]

    def selected_pattern(self) -> np.ndarray:
        """Return the attention [query, key] from the selected parts alone; nan at keys after the query."""
        parts = self.compute_score_parts().part.values
        visible = ~np.isnan(parts[..., 0])
        scores = np.where(visible, np.nan_to_num(parts[..., self.selected_parts()]).sum(-1), -np.inf)
        # Softmax over the keys that are visible; the maximum is subtracted against overflow.
        exps = np.exp(scores - scores.max(1, keepdims=True))
        return np.where(visible, exps / exps.sum(1, keepdims=True), np.nan)

    def figure(self) -> go.Figure:
        """Return the pattern from the selected parts alone as a figure."""
        self.require_open()
        s = self._state
        data = self.compute_score_parts().pattern
        n_pairs = len(self.pair_frequencies())
        content = " and unrotated channels" if s["content"] else ", rotated channels only"
        title = f"Head {s['layer']}.{s['head']} with {len(s['pairs'])} of {n_pairs} pairs{content}"
        named = Labelled(self.selected_pattern(), data.axes, data.labels)
        return attention_pattern(named, title=title, subtitle="")

    def compute_waves(self) -> ScoreWaves:
        """Return the waves of the selected query and key, or of the head's mean query and key."""
        s = self._state
        head = {"layer": s["layer"], "head": s["head"]}
        if s["of"] == "mean":
            assert self.profile is not None
            sheets = self.profile.profile.sheets()
            amplitude = sheets["amplitude"].at(**head).values
            phase = sheets["phase"].at(**head).values
            content = float(sheets["content"].at(**head))
        else:
            parts = self.compute_score_parts()
            at = s["query"], s["key"]
            amplitude = parts.amplitude.values[at]
            phase = parts.phase.values[at]
            # A model that rotates all channels has no part after those of the pairs.
            content = float(parts.part.values[at][-1]) if len(parts.part.values[at]) > len(phase) else 0.0
        distances = np.arange(self.places["distance"].max + 1)
        angles = phase[:, None] + self.pair_frequencies()[:, None] * distances
        return ScoreWaves(amplitude[:, None] * np.cos(angles), content)

    def waves_figure(self) -> go.Figure:
        """Return the score at every distance, and its largest waves, as a figure."""
        s = self._state
        waves = self.compute_waves()
        total = waves.sum(s["pairs"], s["content"])
        # The largest waves, in the order of their pairs.
        largest = sorted(np.argsort(-np.abs(waves.pair_waves).max(1), kind="stable")[:MAX_WAVES].tolist())
        tips = [button.description for button in self.places["pairs"].buttons]
        named = ["sum of selected", "unrotated channels", *(f"pair {tips[i]}" for i in largest)]
        rows = np.stack([total, np.full_like(total, waves.content), *waves.pair_waves[largest]])
        distances = [str(d) for d in range(len(total))]
        data = Labelled(rows.astype(np.float32), ("part", "distance"), {"part": named, "distance": distances})
        whose = "the mean query and key" if s["of"] == "mean" else f"query {s['query']} and key {s['key']}"
        more = f", {MAX_WAVES} largest pairs" if len(waves.pair_waves) > MAX_WAVES else ""
        title = f"Score of {whose} by distance{more}"
        figure = lines(data, axes=("part", "distance"), what="score", title=title, subtitle="", height=330)
        on = [True, s["content"], *(i in s["pairs"] for i in largest)]
        traces: Any = figure.data
        # The sum is drawn thick, and parts that are off are drawn faint.
        for trace, lit, thick in zip(traces, on, [4, *[1.5] * (len(on) - 1)], strict=False):
            trace.update(mode="lines", opacity=1 if lit else FAINT_OPACITY, line_width=thick)
        ring = {"size": 15, "symbol": "circle-open", "color": GREY, "line": {"width": 3}}
        return figure.add_scatter(
            x=[s["distance"]],
            y=[total[s["distance"]]],
            mode="markers",
            marker=ring,
            name="selected distance",
            hoverinfo="skip",
            showlegend=False,
        )

    def describe_selection(self) -> list[str]:
        """Return the numbers of the selected query and key, and of the selected distance, as lines of text."""
        s = self._state
        parts = self.compute_score_parts()
        at = s["query"], s["key"]
        first = f"query {parts.part.labels['query'][at[0]]} → key {parts.part.labels['key'][at[1]]}"
        contribution = self.sum_selected(parts.part.values[at])
        numbers = f"score {parts.score.values[at]:.3f}, selected pairs contribute {contribution:.3f}"
        attention = (
            f"attention {parts.pattern.values[at]:.4f}, from selected pairs alone {self.selected_pattern()[at]:.4f}"
        )
        waves = self.compute_waves()
        total = waves.sum(range(len(waves.pair_waves)), True)[s["distance"]]
        selected = waves.sum(s["pairs"], s["content"])[s["distance"]]
        second = f"at distance {s['distance']} the score would be {total:.3f}, selected pairs contribute {selected:.3f}"
        return [f"{first}: {numbers}; {attention}", second]

    def sum_selected(self, parts: np.ndarray) -> float:
        """Return the sum of the selected parts of one score."""
        return float(parts[self.selected_parts()].sum())

    def on_pattern_click(self, row: int, column: int) -> None:
        each = block_size(self.places["query"].max + 1)
        self.select_safely(query=row * each, key=min(column, row) * each)

    def on_distance_click(self, distance: int) -> None:
        self.select_safely(distance=distance)
