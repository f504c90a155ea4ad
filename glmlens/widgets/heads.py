"""The attention of a layer as bytes for the canvas in heads.js: small pictures of all heads, and one head whole."""

from collections.abc import Callable
from typing import Any

import torch
import traitlets as T
from jaxtyping import Float, UInt8
from plotly.colors import sample_colorscale, unlabel_rgb
from torch import Tensor
from torch.nn.functional import max_pool2d

from glmlens.plot.style import MAGNITUDE
from glmlens.widgets.anywidget_base import PageWidget, read_javascript

THUMBNAIL_BLOCKS, HEAD_BLOCKS, LINKS_PER_TOKEN = (
    128,
    512,
    24,
)  # blocks along a small picture and along the large one; links of a token beyond that


class HeadsWidget(PageWidget):
    """The heads of one layer on the page.

    Weights are bytes, 255 standing for `most`: lower triangles, row by row. `thumbs` is [head, triangle of thumb_side],
    `cells` the triangle of `cells_of`, a block of tokens each. Where blocks are of several tokens, `top_at` (uint32)
    and `top_weights` are the strongest links [what it reads, what reads it; token; top_k]. What somebody wishes for on
    the page comes as a message, {"select": {...}}.
    """

    _esm = read_javascript("heads.js")
    labels = T.List(T.Unicode()).tag(sync=True)
    n_heads, n_kv_heads = T.Int(0).tag(sync=True), T.Int(1).tag(sync=True)
    thumbnails, thumbnail_side, thumbnail_block = (
        T.Bytes().tag(sync=True),
        T.Int(0).tag(sync=True),
        T.Int(1).tag(sync=True),
    )
    cells, side, block = T.Bytes().tag(sync=True), T.Int(0).tag(sync=True), T.Int(1).tag(sync=True)
    cells_head = T.Int(0).tag(sync=True)
    top_at, top_weights, top_k = T.Bytes().tag(sync=True), T.Bytes().tag(sync=True), T.Int(0).tag(sync=True)
    max_weight = T.Float(1.0).tag(sync=True)
    head, locked = T.Int(0).tag(sync=True), T.Bool(False).tag(sync=True)
    query, key = T.Int(-1).tag(sync=True), T.Int(-1).tag(sync=True)
    shown_links = T.Unicode("both").tag(sync=True)
    description = T.Unicode().tag(sync=True)
    palette = T.Bytes().tag(sync=True)
    drawing_number = T.Int(0).tag(sync=True)

    def __init__(self, on_select: Callable[..., Any], **traits: Any):
        super().__init__(palette=magnitude_palette(), **traits)
        self.on_msg(lambda _, said, buffers: on_select(**said["select"]))

    def draw(self, **traits: Any) -> None:
        """Change all these at once; the page sets data-drawn to the number of the drawing when they are seen."""
        with self.hold_sync():
            self.set_trait("drawing_number", self.drawing_number + 1)
            for name, value in traits.items():
                if getattr(self, name) != value:
                    self.set_trait(name, value)


def magnitude_palette() -> bytes:
    """256 colours of a magnitude, red green blue."""
    found = sample_colorscale(MAGNITUDE, [i / 255 for i in range(256)])
    return bytes(round(part) for color in found for part in unlabel_rgb(color))


def pack_thumbnails(weights: Float[Tensor, "head query key"], most: float) -> dict[str, Any]:
    """The small pictures of all heads, each block with its largest weight."""
    small, block = max_pool_heads(weights, THUMBNAIL_BLOCKS)
    return {
        "thumbnails": pack_triangles(small, most),
        "thumbnail_side": small.shape[-1],
        "thumbnail_block": block,
    }


def pack_head(weights: Float[Tensor, "query key"], head: int, most: float) -> dict[str, Any]:
    """One head whole; where that is too much, in blocks, and the strongest links of every token."""
    large, block = max_pool_heads(weights[None], HEAD_BLOCKS)
    found = {"cells": pack_triangles(large, most), "side": large.shape[-1], "block": block, "cells_head": head}
    return found | (pack_links(weights, most) if block > 1 else {"top_at": b"", "top_weights": b"", "top_k": 0})


def max_pool_heads(
    weights: Float[Tensor, "head query key"], side: int
) -> tuple[Float[Tensor, "head rows columns"], int]:
    """At most `side` blocks along each axis, and how many tokens a block has."""
    block = -(-weights.shape[-1] // side)
    return (weights if block == 1 else max_pool2d(weights[None], block, ceil_mode=True)[0]), block


def pack_triangles(weights: Float[Tensor, "head query key"], most: float) -> bytes:
    """The keys up to each query, row after row, head after head."""
    rows, columns = torch.tril_indices(*weights.shape[-2:], device=weights.device)
    return quantise_weights(weights[:, rows, columns], most).cpu().numpy().tobytes()


def quantise_weights(weights: Tensor, max_weight: float) -> UInt8[Tensor, "..."]:
    return (weights * (255 / max_weight)).round().clamp(0, 255).to(torch.uint8)


def pack_links(weights: Float[Tensor, "query key"], most: float) -> dict[str, Any]:
    k = min(LINKS_PER_TOKEN, weights.shape[-1])
    best = [weights.topk(k, 1), weights.T.topk(k, 1)]
    at = torch.stack([found.indices for found in best]).to(torch.int32)
    strong = torch.stack([found.values for found in best])
    return {
        "top_at": at.cpu().numpy().tobytes(),
        "top_weights": quantise_weights(strong, most).cpu().numpy().tobytes(),
        "top_k": k,
    }
