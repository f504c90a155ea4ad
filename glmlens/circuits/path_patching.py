"""Path patching: the effect of a sender through given receivers alone, with all other heads at their clean values.

Wang et al. 2022 (arXiv 2211.00593), appendix B; Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from glmlens.hook_points import Point
from glmlens.hooks import Edit
from glmlens.lens import Lens
from glmlens.patch.interventions import broadcast_indices
from glmlens.patch.packing import layer_of_point
from glmlens.patch.pairs import PromptPairs, TokenPairs
from glmlens.patch.sites import PatchError, ResolvedSite, Site, SiteResolver, move_position_first
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
    """Return the change of the metric when each head, [layer, head], sends its corrupt value to the receivers alone.

    Receivers are heads' inputs, Site("attn.q", layer=9, head=(6, 9)), keys and values by group, Site("attn.k", layer=3,
    kv=0), or Site("logits"). All other heads write what they write in the clean run; MLPs between are "recomputed" or
    "frozen" (then the path is the edge itself). Norms are always recomputed. Heads that write after all receivers have
    read are nan. Raise PatchError for another receiver.
    """
    if mlps not in ("recomputed", "frozen"):
        raise PatchError(f"mlps is {mlps!r}; choose 'recomputed' or 'frozen'")
    listed: list[Any] = [receivers] if isinstance(receivers, Site | str) else list(receivers)
    sites = [Site(one) if isinstance(one, str) else one for one in listed]
    resolver = SiteResolver(lens)
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
    pairs = PromptPairs.build(lens, clean, corrupt, metric).require_one_length()
    length = pairs.clean.shape[1]
    chosen = [resolver.resolve(site, length, {"end": length - 1}) for site in sites]
    if any(site.point == "logits" for site in sites) and len(sites) > 1:
        raise PatchError("Site('logits') receives alone: what goes there through others is counted already")
    paths = PathPatcher(
        lens,
        pairs,
        freeze_mlps=mlps == "frozen",
        receivers=[(name, resolved) for resolved in chosen for name in resolved.names],
    )
    base = paths.measure_receivers({}).mean()
    values = np.full((lens.cfg.n_layers, lens.cfg.n_heads), np.nan)
    # The corrupt run is recorded once; each sender takes its own head's value from it.
    _, corrupt_acts = lens.run_with_cache(
        pairs.corrupt, "attn.z", logits=False, attention_mask=torch.ones_like(pairs.corrupt)
    )
    for layer in tqdm(range(lens.cfg.n_layers), disable=not progress, desc="senders", unit="layer"):
        if layer >= paths.last_receiver_layer:
            continue  # these heads write after every receiver has read: nan
        for head in range(lens.cfg.n_heads):
            received = paths.run_sender(layer, head, corrupt_acts["attn.z", layer])
            values[layer, head] = float(paths.measure_receivers(received).mean() - base)
    about = {
        "metric": pairs.metric.name,
        "value": "change of the metric, mean over pairs",
        "receivers": "; ".join(map(str, sites)),
        "direction": "noise: clean run, the sender's corrupt value",
        "frozen": "all other heads" + (" and all MLPs" if paths.freeze_mlps else "; MLPs recomputed"),
        "heads": "senders are query heads; keys and values are received by group",
        "pairs": str(len(pairs)),
        "model": lens.model_hash,
    }
    return Labelled(values, ("layer", "head"), about=about)


class PathPatcher:
    """The clean run, and the two passes of every path: the sender's, which records what receivers compute, and theirs.

    `receivers` are points with the places that receive; "logits" counts as behind the last layer.
    """

    def __init__(
        self, lens: Lens, pairs: TokenPairs, *, freeze_mlps: bool, receivers: Sequence[tuple[str, ResolvedSite]]
    ):
        self.lens = lens
        self.tokens = pairs.clean
        self.metric = pairs.metric
        self.freeze_mlps = freeze_mlps
        self.receivers = receivers
        self.attention_mask = torch.ones_like(self.tokens)  # prompts of one length, without padding
        recorded = ["resid_pre", "attn.z", "mlp_out"]
        self.clean: Activations = lens.run_with_cache(
            self.tokens, recorded, logits=False, attention_mask=self.attention_mask
        )[1]
        layers = [layer_of_point(name, lens.cfg.n_layers) for name, _ in receivers]
        self.last_receiver_layer = max(layers)
        self.first_receiver_layer = min(layers)

    def run_sender(self, layer: int, head: int, value: Float[Tensor, "example pos head d"]) -> dict[str, Tensor]:
        """Return what the receivers compute when the sender writes `value` and other heads their clean values."""

        def hold_clean_heads(x: Tensor, point: Point) -> Tensor:
            x = self.clean[point.name].clone()
            if point.name == f"blocks.{layer}.attn.z":
                x[:, :, head] = value[:, :, head]
            return x

        hooks: list[tuple[str, Edit]] = [
            (f"blocks.{i}.attn.z", hold_clean_heads) for i in range(layer, self.lens.cfg.n_layers)
        ]
        if self.freeze_mlps:
            hooks += [(f"blocks.{i}.mlp_out", self.hold_clean_value) for i in range(layer, self.lens.cfg.n_layers)]
        names = [name for name, _ in self.receivers if layer_of_point(name, self.lens.cfg.n_layers) > layer]
        # Layers before the sender are those of the clean run: start with the residual stream that enters its layer.
        entering = self.clean["resid_pre", layer]
        _, acts = self.lens.run_with_cache(
            entering, names, hooks, start_layer=layer, attention_mask=self.attention_mask
        )
        return dict(acts)

    def hold_clean_value(self, x: Tensor, point: Point) -> Tensor:
        return self.clean[point.name]

    def measure_receivers(self, received: dict[str, Tensor]) -> Float[Tensor, "example"]:
        """Return the metric of the clean run with what receivers computed in a sender's pass put in."""
        hooks = [
            (name, self.receiver_edit(received[name], resolved))
            for name, resolved in self.receivers
            if name in received
        ]
        start = min(self.first_receiver_layer, self.lens.cfg.n_layers - 1)
        entering = self.clean["resid_pre", start]
        logits = self.lens.run_with_hooks(entering, hooks, start_layer=start, attention_mask=self.attention_mask)
        return self.metric.measure(logits, torch.arange(len(self.tokens), device=self.tokens.device))

    def receiver_edit(self, value: Tensor, resolved: ResolvedSite) -> Edit:
        """Return an edit that puts `value` in at the receiver's positions, heads and channels alone."""

        def replace_received(x: Tensor, point: Point) -> Tensor:
            view, new = move_position_first(point.name, x), move_position_first(point.name, value)
            at = torch.tensor(resolved.positions, device=x.device)
            places = (slice(None), *broadcast_indices(at, resolved.rest_indices, x.shape[2:]))
            view[places] = new[places]
            return x

        return replace_received
