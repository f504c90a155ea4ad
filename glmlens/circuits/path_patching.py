"""Path patching: what a sender does through given receivers alone, with all other heads held as they were.

Wang et al. 2022 (arXiv 2211.00593), appendix B; Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from glmlens.hook_points import Point
from glmlens.hooks import Edit
from glmlens.lens import Lens
from glmlens.patch.interventions import broadcast_indices
from glmlens.patch.metrics import Metric
from glmlens.patch.pairs import prepare_pairs
from glmlens.patch.sites import PatchError, Site, SiteResolver, move_position_first
from glmlens.recording.activations import Activations
from glmlens.results import Labelled
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

RECEIVER_POINTS = ("attn.q", "attn.k", "attn.v", "logits")


def path_patch(
    lens: Lens,
    clean: Prompt | Examples,
    corrupt: Prompt | str | None,
    receivers: Sequence[Site | str] | Site | str | Any,
    *,
    metric: Any = None,
    mlps: str = "recomputed",
    progress: bool = True,
) -> Labelled:
    """The change of the metric when each head, [layer, head], sends its corrupt value to the receivers alone.

    Receivers are heads' inputs, Site("attn.q", layer=9, head=(6, 9)), keys and values by group, Site("attn.k", layer=3,
    kv=0), or Site("logits"). All other heads write what they write in the clean run; MLPs between are "recomputed" or
    "frozen" (then the path is the edge itself). Norms are always recomputed. Heads that write after all receivers have
    read are nan. Raises PatchError for another receiver.
    """
    if mlps not in ("recomputed", "frozen"):
        raise PatchError(f"mlps is {mlps!r}; choose 'recomputed' or 'frozen'")
    listed: list[Any] = [receivers] if isinstance(receivers, Site | str) else list(receivers)
    sites, atlas = [Site(one) if isinstance(one, str) else one for one in listed], SiteResolver(lens)
    if not sites:
        raise PatchError(f"no receivers: give sites at {', '.join(RECEIVER_POINTS)}")
    for site in sites:
        if not isinstance(site, Site):
            raise PatchError(
                f"{site!r:.60} is no site: a receiver is Site('attn.q', layer=9, head=6) or Site('logits')"
            )
        if site.point not in RECEIVER_POINTS or (site.point != "logits" and site.layer is None):
            raise PatchError(
                f"{site}: a receiver is one of {', '.join(RECEIVER_POINTS)}, of a layer where there are layers"
            )
    one, other, read = prepare_pairs(lens, clean, corrupt, metric)
    chosen = [atlas.resolve(site, one.shape[1], {"end": one.shape[1] - 1}) for site in sites]
    if any(site.point == "logits" for site in sites) and len(sites) > 1:
        raise PatchError("Site('logits') receives alone: what goes there through others is counted already")
    paths = PathPatcher(lens, one, read, mlps == "frozen", [(name, c) for c in chosen for name in c.names])
    base = paths.measure_receivers(one, None).mean()
    values = np.full((lens.cfg.n_layers, lens.cfg.n_heads), np.nan)
    _, theirs = lens.run_with_cache(other, "attn.z", logits=False, attention_mask=torch.ones_like(other))
    for layer in tqdm(range(lens.cfg.n_layers), disable=not progress, desc="senders", unit="layer"):
        if layer < paths.last_receiver_layer:
            for head in range(lens.cfg.n_heads):
                received = paths.run_sender(layer, head, theirs["attn.z", layer])
                values[layer, head] = float(paths.measure_receivers(one, received).mean() - base)
    about = {
        "metric": read.name,
        "value": "change of the metric, mean over pairs",
        "receivers": "; ".join(map(str, sites)),
        "direction": "noise: clean run, the sender's corrupt value",
        "frozen": "all other heads" + (" and all MLPs" if paths.frozen else "; MLPs recomputed"),
        "heads": "senders are query heads; keys and values are received by group",
        "pairs": str(len(one)),
        "model": lens.model_hash,
    }
    return Labelled(values, ("layer", "head"), about=about)


class PathPatcher:
    """The clean run, and the two passes of every path through it."""

    def __init__(
        self, lens: Lens, tokens: Int[Tensor, "example pos"], metric: Metric, frozen: bool,
        receivers: Sequence[tuple[str, Any]],
    ):  # fmt: skip
        self.lens, self.tokens, self.metric, self.frozen, self.receivers = lens, tokens, metric, frozen, receivers
        self.every = torch.ones_like(tokens)  # prompts of one length, without padding
        needed = ["resid_pre", "attn.z", "mlp_out"]
        self.clean: Activations = lens.run_with_cache(tokens, needed, logits=False, attention_mask=self.every)[1]
        layers = [int(name.split(".")[1]) if name != "logits" else lens.cfg.n_layers for name, _ in receivers]
        self.last_receiver_layer, self.first_receiver_layer = max(layers), min(layers)

    def run_sender(self, layer: int, head: int, value: Float[Tensor, "example pos head d"]) -> dict[str, Tensor]:
        """What the receivers compute when the sender writes `value` and other heads what they wrote."""

        def hold_clean_heads(x: Tensor, point: Point) -> Tensor:
            x = self.clean[point.name].clone()
            if point.name == f"blocks.{layer}.attn.z":
                x[:, :, head] = value[:, :, head]
            return x

        hooks: list[tuple[str, Edit]] = [
            (f"blocks.{i}.attn.z", hold_clean_heads) for i in range(layer, self.lens.cfg.n_layers)
        ]
        if self.frozen:
            hooks += [(f"blocks.{i}.mlp_out", self.hold_clean_value) for i in range(layer, self.lens.cfg.n_layers)]
        names = [name for name, _ in self.receivers if name == "logits" or int(name.split(".")[1]) > layer]
        entering = self.clean["resid_pre", layer]
        _, acts = self.lens.run_with_cache(entering, names, hooks, start_layer=layer, attention_mask=self.every)
        return dict(acts)

    def hold_clean_value(self, x: Tensor, point: Point) -> Tensor:
        return self.clean[point.name]

    def measure_receivers(self, tokens: Int[Tensor, "example pos"], received: dict[str, Tensor] | None) -> Tensor:
        """The metric of the clean run with receivers as they were received."""
        hooks: list[tuple[str, Edit]] = []
        for name, chosen in self.receivers:
            if received is not None and name in received:
                hooks.append((name, self.receiver_edit(received[name], chosen)))
        start = min(self.first_receiver_layer, self.lens.cfg.n_layers - 1)
        entering = self.clean["resid_pre", start]
        logits = self.lens.run_with_hooks(entering, hooks, start_layer=start, attention_mask=self.every)
        read = logits if self.metric.everywhere else logits[:, -1:]
        read = read if self.metric.columns is None else read[..., self.metric.columns]
        return self.metric(read, torch.arange(len(tokens), device=tokens.device))

    def receiver_edit(self, value: Tensor, chosen: Any) -> Edit:
        def replace_received(x: Tensor, point: Point) -> Tensor:
            view, new = move_position_first(point.name, x), move_position_first(point.name, value)
            at = torch.tensor(chosen.positions, device=x.device)
            places = (slice(None), *broadcast_indices(at, chosen.rest, x.shape[2:]))
            view[places] = new[places]
            return x

        return replace_received
