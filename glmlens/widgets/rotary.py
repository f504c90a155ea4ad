"""Rotary positions: a head with some of its frequency pairs alone, and its score as a sum of waves over distance."""

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import numpy as np
import plotly.graph_objects as go
import torch
import traitlets as T

from glmlens.analysis.batch import to_numpy, token_label
from glmlens.analysis.distance import DistanceProfile, distance_profile
from glmlens.analysis.rotary import ScoreParts, format_wavelength, pair_frequencies_of, score_parts, wavelengths
from glmlens.integers import read_integer, read_integers
from glmlens.lens import Lens
from glmlens.patch.values import to_token_ids
from glmlens.plot import attention_pattern, lines
from glmlens.plot.style import GREY
from glmlens.results import Labelled
from glmlens.text.prompts import Prompt
from glmlens.widgets.base import ROW_LAYOUT, Explorer, prompt_box
from glmlens.widgets.chart import Chart, block_size
from glmlens.widgets.generations import TextLines

MAX_WAVES = 8  # waves, the largest
MIN_MAX_DISTANCE = 64  # tokens that the distances reach at least
FAINT_OPACITY = 0.2


class ToggleGroup(W.Box):
    """A button for each of several things; `value` are the numbers of those that are on."""

    value = T.Tuple()

    def __init__(self, names: Sequence[str], tips: Sequence[str]):
        every = tuple(range(len(names)))
        self.buttons = [
            W.ToggleButton(True, description=name, tooltip=tip, layout={"width": "auto"})
            for name, tip in zip(names, tips, strict=True)
        ]
        self.following = False
        both = [W.Button(description=name, layout={"width": "auto"}) for name in ("all", "none")]
        super().__init__([*self.buttons, *both], layout=ROW_LAYOUT)
        self.value = every
        self.observe(lambda _: self.update_buttons(), "value")
        for button in self.buttons:
            button.observe(lambda _: self.on_button_change(), "value")
        both[0].on_click(lambda _: self.set_trait("value", every))
        both[1].on_click(lambda _: self.set_trait("value", ()))

    def on_button_change(self) -> None:
        if not self.following:
            self.value = tuple(i for i, button in enumerate(self.buttons) if button.value)

    def update_buttons(self) -> None:
        self.following = True
        for i, button in enumerate(self.buttons):
            button.value = i in self.value
        self.following = False


@dataclass(frozen=True, eq=False)
class PromptProfile:
    """A prompt: its tokens' labels, and what every head would attend to by distance alone."""

    prompt: Prompt
    labels: list[str]
    profile: DistanceProfile


@dataclass(frozen=True, eq=False)
class ScoreWaves:
    """What makes a score at every distance: a wave [pair, distance] for each pair, and a content that knows none."""

    pair_waves: np.ndarray
    content: float

    def sum(self, chosen: Sequence[int], content: bool) -> np.ndarray:
        return self.pair_waves[list(chosen)].sum(0) + (self.content if content else 0.0)


class RotaryExplorer(Explorer):
    """How a head finds tokens by position: its pattern with some frequency pairs alone, and its score as waves.

    The first picture is the pattern that the pairs which are on (and the content, the channels that do not turn) would
    make. The second is the score at every distance of the chosen query and key, or of the head's mean ones: the
    largest waves, those that are off faint, and the sum of what is on. Places: layer, head, query, key, distance (at
    first that of query and key), pairs (numbers of those that are on), content, of ("these" or "mean").
    """

    def __init__(self, lens: Lens, prompt: Prompt):
        lengths = wavelengths(lens).tolist()
        names = [f"{i} ({format_wavelength(length)})" for i, length in enumerate(lengths)]
        tips = [f"pair {i} turns once in {format_wavelength(length)} tokens" for i, length in enumerate(lengths)]
        content = lens.cfg.d_rotary < lens.cfg.d_head
        places = {
            "layer": W.IntSlider(0, 0, lens.cfg.n_layers - 1, description="layer"),
            "head": W.IntSlider(0, 0, lens.cfg.n_heads - 1, description="head"),
            "query": W.IntSlider(0, 0, 0, description="query"),
            "key": W.IntSlider(0, 0, 0, description="key"),
            "distance": W.IntSlider(0, 0, MIN_MAX_DISTANCE, description="distance"),
            "of": W.ToggleButtons(options=[("this query and key", "these"), ("mean query and key", "mean")],
                                  style={"button_width": "auto"}),
            "content": W.Checkbox(content, description="content", disabled=not content, indent=False,
                                  layout={"width": "auto"}),
            "pairs": ToggleGroup(names, tips),
        }  # fmt: skip
        self.pattern_chart, self.waves_chart = Chart(self.on_pattern_click), Chart(self.on_distance_click)
        self.text_lines = TextLines()
        self.profile: PromptProfile | None = None
        self.score_parts: tuple[tuple[int, int], ScoreParts] | None = None
        inputs, views = {"prompt": prompt_box(prompt)}, [self.pattern_chart, self.waves_chart, self.text_lines]
        super().__init__(lens, inputs, places, views, {"prompt": prompt})
        self.run_first()

    def compute(self, inputs: Mapping[str, Any]) -> PromptProfile:
        rows = to_token_ids(self.lens, inputs["prompt"])
        if len(rows) != 1:
            raise ValueError(f"one prompt at a time, not {len(rows)}")
        self.report_progress(0, 1, "passes")
        labels = [token_label(self.lens, token) for token in rows[0]]
        tokens = torch.tensor(rows)
        prompt: Prompt = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        return PromptProfile(
            prompt, labels, distance_profile(self.lens, prompt, distances=max(len(labels), MIN_MAX_DISTANCE) + 1)
        )

    def select(self, **places: Any) -> None:
        """Look at another head, pair of tokens (query, key), distance, or choice of parts (pairs, content).

        With another query or key the distance is theirs, unless it is given. ValueError for a place that is not there.
        """
        places |= {name: read_integer(places[name], name) for name in ("query", "key") if name in places}
        if not (isinstance(places.get("pairs", ()), Sized) and not len(places.get("pairs", ()))):
            places["pairs"] = read_integers(places["pairs"], "pairs", size=len(self.pair_frequencies()))
        s = {**self._state, **places}
        if "key" not in places and places.keys() & {"query"}:
            places["key"] = s["key"] = min(s["key"], s["query"])
        if places.keys() & {"query", "key"} and "distance" not in places:
            if s["key"] > s["query"]:
                with self.pause_callbacks():
                    self.update_controls()
                raise ValueError(f"key {s['key']} comes after query {s['query']}, which cannot see it")
            places["distance"] = s["query"] - s["key"]
        super().select(**places)

    def show(self, result: PromptProfile | None = None) -> None:
        s = self._state
        if result is not None:
            self.profile, self.score_parts = result, None
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
        """The scores of the chosen head, kept until another is chosen."""
        if self.profile is None:
            raise ValueError("nothing has been read yet: run()")
        head = self._state["layer"], self._state["head"]
        if self.score_parts is None or self.score_parts[0] != head:
            self.score_parts = head, score_parts(self.lens, self.profile.prompt, *head)
        return self.score_parts[1]

    def pair_frequencies(self) -> np.ndarray:
        return to_numpy(pair_frequencies_of(self.lens))

    def selected_parts(self) -> list[int]:
        """The parts of the score that are on."""
        has = self.lens.cfg.d_rotary < self.lens.cfg.d_head
        return [*self._state["pairs"], *([len(self.pair_frequencies())] if self._state["content"] and has else [])]

    def selected_pattern(self) -> np.ndarray:
        """The attention [query, key] that the chosen parts alone would make; nan at keys that a query cannot see."""
        parts = self.compute_score_parts().part.values
        seen = ~np.isnan(parts[..., 0])
        scores = np.where(seen, np.nan_to_num(parts[..., self.selected_parts()]).sum(-1), -np.inf)
        exps = np.exp(scores - scores.max(1, keepdims=True))
        return np.where(seen, exps / exps.sum(1, keepdims=True), np.nan)

    def figure(self) -> go.Figure:
        """The pattern of the head with the chosen parts alone."""
        self.require_open()
        s, data = self._state, self.compute_score_parts().pattern
        whole = len(self.pair_frequencies())
        with_it = " and content" if s["content"] else ", without content"
        title = f"Head {s['layer']}.{s['head']} with {len(s['pairs'])} of {whole} pairs{with_it}"
        named = Labelled(self.selected_pattern(), data.axes, data.labels)
        return attention_pattern(named, title=title, subtitle="")

    def compute_waves(self) -> ScoreWaves:
        """The waves of the chosen query and key, or of the head's mean ones."""
        s = self._state
        head = {"layer": s["layer"], "head": s["head"]}
        if s["of"] == "mean":
            assert self.profile is not None
            found = [self.profile.profile.sheets()[name].at(**head) for name in ("amplitude", "phase", "content")]
            amplitude, phase, content = found[0].values, found[1].values, float(found[2])
        else:
            parts, at = self.compute_score_parts(), (s["query"], s["key"])
            amplitude, phase = parts.amplitude.values[at], parts.phase.values[at]
            content = float(parts.part.values[at][-1]) if len(parts.part.values[at]) > len(phase) else 0.0
        far = np.arange(self.places["distance"].max + 1)
        return ScoreWaves(amplitude[:, None] * np.cos(phase[:, None] + self.pair_frequencies()[:, None] * far), content)

    def waves_figure(self) -> go.Figure:
        """The score at every distance as a sum of waves."""
        s, waves = self._state, self.compute_waves()
        total = waves.sum(s["pairs"], s["content"])
        largest = sorted(np.argsort(-np.abs(waves.pair_waves).max(1), kind="stable")[:MAX_WAVES].tolist())
        tips = [button.description for button in self.places["pairs"].buttons]
        named = ["sum of what is on", "content", *(f"pair {tips[i]}" for i in largest)]
        rows = np.stack([total, np.full_like(total, waves.content), *waves.pair_waves[largest]])
        far = [str(d) for d in range(len(total))]
        data = Labelled(rows.astype(np.float32), ("part", "distance"), {"part": named, "distance": far})
        whose = "the mean query and key" if s["of"] == "mean" else f"query {s['query']} and key {s['key']}"
        more = f", the {MAX_WAVES} largest waves" if len(waves.pair_waves) > MAX_WAVES else ""
        title = f"Score of {whose} by distance{more}"
        figure = lines(data, axes=("part", "distance"), what="score", title=title, subtitle="", height=330)
        on = [True, s["content"], *(i in s["pairs"] for i in largest)]
        traces: Any = figure.data
        for trace, lit, thick in zip(traces, on, [4, *[1.5] * (len(on) - 1)], strict=False):
            trace.update(mode="lines", opacity=1 if lit else FAINT_OPACITY, line_width=thick)
        ring = {"size": 15, "symbol": "circle-open", "color": GREY, "line": {"width": 3}}
        here = {"x": [s["distance"]], "y": [total[s["distance"]]]}
        return figure.add_scatter(**here, mode="markers", marker=ring, name="here", hoverinfo="skip", showlegend=False)

    def describe_selection(self) -> list[str]:
        """The chosen pair of tokens and the chosen distance, in numbers."""
        s, parts = self._state, self.compute_score_parts()
        at = s["query"], s["key"]
        first = f"query {parts.part.labels['query'][at[0]]} → key {parts.part.labels['key'][at[1]]}"
        numbers = (
            f"score {parts.score.values[at]:.3f}, of which what is on {self.sum_selected(parts.part.values[at]):.3f}"
        )
        chances = f"attention {parts.pattern.values[at]:.4f}, with what is on alone {self.selected_pattern()[at]:.4f}"
        waves = self.compute_waves()
        every = waves.sum(range(len(waves.pair_waves)), True)[s["distance"]]
        some = waves.sum(s["pairs"], s["content"])[s["distance"]]
        second = f"at distance {s['distance']} the score would be {every:.3f}, of which what is on {some:.3f}"
        return [f"{first}: {numbers}; {chances}", second]

    def sum_selected(self, parts: np.ndarray) -> float:
        return float(parts[self.selected_parts()].sum())

    def on_pattern_click(self, row: int, column: int) -> None:
        each = block_size(self.places["query"].max + 1)
        self.select_safely(query=row * each, key=min(column, row) * each)

    def on_distance_click(self, distance: int) -> None:
        self.select_safely(distance=distance)
