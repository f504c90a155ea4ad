"""Attention: all heads of a layer, one head in full, and the keys and queries linked to every token."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from glmlens.analysis.attention import layer_pattern, pattern_points
from glmlens.lens import Lens
from glmlens.patch.replacement_values import to_token_ids
from glmlens.plot import attention_pattern
from glmlens.plot.style import show_control_characters
from glmlens.text.prompts import Prompt
from glmlens.widgets.base import Explorer, prompt_box
from glmlens.widgets.heads import HeadsWidget, pack_head, pack_thumbnails

LINK_OPTIONS = [("highlight both", "both"), ("keys it attends to", "query"), ("queries attending to it", "key")]


@dataclass(frozen=True, eq=False)
class PromptRecording:
    """A recorded prompt: the labels of its tokens, and the residual stream before each layer."""

    labels: list[str]
    residuals: list[Float[Tensor, "batch pos model"]]


@dataclass(frozen=True, eq=False)
class LayerAttention:
    """The attention patterns of one layer, and the norm of the value of each head and key."""

    index: int
    pattern: Float[Tensor, "head query key"]
    value_norms: Float[Tensor, "head key"]

    def weights(self, by_value: bool) -> Float[Tensor, "head query key"]:
        """Return the patterns, with `by_value` multiplied by the norm of the value at each key."""
        return self.pattern * self.value_norms[:, None] if by_value else self.pattern


NO_LAYER = LayerAttention(index=-1, pattern=torch.zeros(0, 0, 0), value_norms=torch.zeros(0, 0))


class AttentionExplorer(Explorer):
    """Explore attention: the heads of a layer side by side, one of them in full, and the tokens of the prompt.

    With the mouse over a token, the keys it attends to are blue and the queries attending to it are underlined in red;
    `by` shows both ("both"), the keys ("query") or the queries ("key"). A click selects the token. With the mouse over
    a thumbnail, its head is drawn large; a click locks it. `by_value` multiplies every weight by the norm of the value
    at its key (Kobayashi et al. 2020, arXiv 2004.10102). Places: layer, head, locked, query, key (-1 selects none), by,
    by_value.
    """

    def __init__(self, lens: Lens, prompt: Prompt):
        self.heads = HeadsWidget(self.select_safely)
        places = {
            "layer": W.IntSlider(0, 0, lens.cfg.n_layers - 1, description="layer", continuous_update=False),
            "head": W.IntSlider(0, 0, lens.cfg.n_heads - 1, description="head"),
            "locked": W.Checkbox(False, description="lock head", indent=False, layout={"width": "auto"}),
            "query": W.IntSlider(-1, -1, 0, description="query"),
            "key": W.IntSlider(-1, -1, 0, description="key"),
            "by": W.ToggleButtons(
                options=LINK_OPTIONS,
                value="both",
                style={"button_width": "auto"},
            ),
            "by_value": W.Checkbox(False, description="weight by value norm", indent=False, layout={"width": "auto"}),
        }
        self.recording = PromptRecording([], [])
        self.layer = NO_LAYER
        self.drawn_key: tuple[Any, ...] = ()  # layer, by_value and head of the pictures on the page
        inputs = {"prompt": prompt_box(prompt)}
        super().__init__(lens, inputs, places, views=[self.heads], initial_state={"prompt": prompt})
        self.run_first()

    def compute(self, inputs: Mapping[str, Any]) -> PromptRecording:
        """Record the residual stream of the prompt; patterns are computed from it for one layer at a time."""
        rows = to_token_ids(self.lens, inputs["prompt"])
        if len(rows) != 1:
            raise ValueError(f"one prompt at a time, not {len(rows)}")
        tokens = torch.tensor(rows, device=self.lens.device)
        n = self.lens.cfg.n_layers

        def report_layer(x: Tensor, point: Any) -> Tensor:
            self.report_progress(point.layer + 1, n, "layers")
            return x

        hooks = {"blocks.*.resid_pre": report_layer}
        mask = torch.ones_like(tokens)  # no token is padding, whatever its id
        _, acts = self.lens.run_with_cache(tokens, "resid_pre", hooks, logits=False, attention_mask=mask)
        labels = [show_control_characters(label) for label in self.lens.to_labels(tokens)]
        return PromptRecording(labels, [acts["resid_pre", i] for i in range(n)])

    def show(self, result: PromptRecording | None = None) -> None:
        """Send what changed to the page: the selection always, pictures only if they differ from those there."""
        if result is not None:
            self.recording = result
            self.layer = NO_LAYER
            self.drawn_key = ()
            last = len(result.labels) - 1
            self.places["query"].max = self.places["key"].max = last
            # Keep query and key where the new prompt has them.
            self._state |= {name: min(self._state[name], last) for name in ("query", "key")}
        if self.layer.index != self._state["layer"]:
            self.layer = self.compute_layer(self._state["layer"])
        s = self._state
        layer = self.layer
        changes = {name: s[name] for name in ("head", "locked", "query", "key")} | {
            "shown_links": s["by"],
            "description": self.describe_selection(),
        }
        weights = layer.weights(s["by_value"])
        pictures = layer.index, s["by_value"]
        max_weight = float(weights.max()) if s["by_value"] else 1.0
        # Send thumbnails only if the layer or the weighting changed, the large picture also if the head did.
        if self.drawn_key[:2] != pictures:
            cfg = self.lens.cfg
            changes |= {
                "labels": self.recording.labels,
                "n_heads": cfg.n_heads,
                "n_kv_heads": cfg.n_kv_heads,
                "max_weight": max_weight,
            }
            changes |= pack_thumbnails(weights, max_weight)
        if self.drawn_key != (*pictures, s["head"]):
            changes |= pack_head(weights[s["head"]], s["head"], max_weight)
        self.drawn_key = (*pictures, s["head"])
        self.heads.draw(**changes)

    def compute_layer(self, index: int) -> LayerAttention:
        """Compute the patterns of a layer by running that layer alone on the residual stream before it."""
        lens = self.lens
        residual = self.recording.residuals[index]
        names = [f"blocks.{index}.{name}" for name in dict.fromkeys([*pattern_points(lens), "kv.v"])]
        _, acts = lens.run_with_cache(residual, names, start_layer=index, logits=False)
        at = torch.arange(residual.shape[1], device=lens.device)[None]
        pattern = layer_pattern(acts, index, at, at)[0].float()
        norms = acts[f"blocks.{index}.kv.v"][0].float().norm(dim=-1).T
        # A KV head's values are read by each query head of its group.
        return LayerAttention(index, pattern, norms.repeat_interleave(lens.cfg.n_heads // lens.cfg.n_kv_heads, 0))

    def describe_selection(self) -> str:
        """Return the selected query and key and their numbers as text."""
        s = self._state
        labels = self.recording.labels
        where = f"layer {s['layer']}, head {s['head']}"
        q = s["query"]
        k = s["key"]
        if q < 0:
            return where
        label = f"{where}: query {q} {labels[q]}"
        if k < 0:
            return label
        weight, norm = float(self.layer.pattern[s["head"], q, k]), float(self.layer.value_norms[s["head"], k])
        numbers = f"attention {weight:.4g}, value norm {norm:.3g}, product {weight * norm:.4g}"
        return f"{label} → key {k} {labels[k]}: {numbers}"

    def figure(self) -> go.Figure:
        """Return the pattern of the selected head as a figure."""
        self.require_open()
        s = self._state
        head = self._state["head"]
        labels = [f"{i} {label}" for i, label in enumerate(self.recording.labels)]
        norms = self.layer.value_norms[head] if s["by_value"] else None
        title = f"Attention of head {s['layer']}.{head}" + (", weighted by value norm" if s["by_value"] else "")
        named = {"query": labels, "key": labels}
        prompt = s["prompt"] if isinstance(s["prompt"], str) else f"{len(labels)} tokens"
        return attention_pattern(self.layer.pattern[head], named, value_norms=norms, title=title, subtitle=prompt)
