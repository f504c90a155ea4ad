"""The attention of a layer as bytes for the canvas of heads.js: thumbnails of all heads, and one head in full."""

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

THUMBNAIL_BLOCKS = 128  # blocks along an axis of a thumbnail
HEAD_BLOCKS = 512  # blocks along an axis of the large picture
LINKS_PER_TOKEN = 24  # strongest links sent per token where the large picture is pooled into blocks


class HeadsWidget(PageWidget):
    """The heads of one layer on the page; traits are read by heads.js under these names.

    Weights are bytes, 255 for `max_weight`: lower triangles, row by row. `thumbnails` is [head, triangle of
    thumbnail_side], `cells` the triangle of head `cells_head`; a cell is a block of `block` tokens by as many. Where
    `block` is over 1, `top_at` (uint32) and `top_weights` are the strongest links [attended to or attending, token,
    top_k]. A selection on the page arrives as the message {"select": {...}}.
    """

    _esm = read_javascript("heads.js")
    labels = T.List(T.Unicode()).tag(sync=True)
    n_heads = T.Int(0).tag(sync=True)
    n_kv_heads = T.Int(1).tag(sync=True)
    thumbnails = T.Bytes().tag(sync=True)
    thumbnail_side = T.Int(0).tag(sync=True)
    thumbnail_block = T.Int(1).tag(sync=True)
    cells = T.Bytes().tag(sync=True)
    side = T.Int(0).tag(sync=True)
    block = T.Int(1).tag(sync=True)
    cells_head = T.Int(0).tag(sync=True)
    top_at = T.Bytes().tag(sync=True)
    top_weights = T.Bytes().tag(sync=True)
    top_k = T.Int(0).tag(sync=True)
    max_weight = T.Float(1.0).tag(sync=True)
    head = T.Int(0).tag(sync=True)
    locked = T.Bool(False).tag(sync=True)
    query = T.Int(-1).tag(sync=True)
    key = T.Int(-1).tag(sync=True)
    shown_links = T.Unicode("both").tag(sync=True)
    description = T.Unicode().tag(sync=True)
    palette = T.Bytes().tag(sync=True)
    drawing_number = T.Int(0).tag(sync=True)

    def __init__(self, on_select: Callable[..., Any], **traits: Any):
        super().__init__(palette=magnitude_palette(), **traits)
        self.on_msg(lambda _, message, buffers: on_select(**message["select"]))

    def draw(self, **traits: Any) -> None:
        """Set these traits in one message. The page sets data-drawn to `drawing_number` when they are drawn."""
        with self.hold_sync():
            self.set_trait("drawing_number", self.drawing_number + 1)
            for name, value in traits.items():
                if getattr(self, name) != value:
                    self.set_trait(name, value)


def magnitude_palette() -> bytes:
    """Return the 256 colours of the magnitude scale, three bytes (red, green, blue) each."""
    colors = sample_colorscale(MAGNITUDE, [i / 255 for i in range(256)])
    return bytes(round(part) for color in colors for part in unlabel_rgb(color))


def pack_thumbnails(weights: Float[Tensor, "head query key"], max_weight: float) -> dict[str, Any]:
    """Return the traits of the thumbnails of all heads, each block with its largest weight."""
    small, block = max_pool_heads(weights, THUMBNAIL_BLOCKS)
    return {
        "thumbnails": pack_triangles(small, max_weight),
        "thumbnail_side": small.shape[-1],
        "thumbnail_block": block,
    }


def pack_head(weights: Float[Tensor, "query key"], head: int, max_weight: float) -> dict[str, Any]:
    """Return the traits of one head in full; a long one in blocks, with the strongest links of every token."""
    large, block = max_pool_heads(weights[None], HEAD_BLOCKS)
    traits = {"cells": pack_triangles(large, max_weight), "side": large.shape[-1], "block": block, "cells_head": head}
    return traits | (pack_links(weights, max_weight) if block > 1 else {"top_at": b"", "top_weights": b"", "top_k": 0})


def max_pool_heads(
    weights: Float[Tensor, "head query key"], side: int
) -> tuple[Float[Tensor, "head rows columns"], int]:
    """Pool to at most `side` blocks along each axis by the largest weight; also return the tokens per block."""
    block = -(-weights.shape[-1] // side)
    return (weights if block == 1 else max_pool2d(weights[None], block, ceil_mode=True)[0]), block


def pack_triangles(weights: Float[Tensor, "head query key"], max_weight: float) -> bytes:
    """Return the lower triangles as bytes: the keys up to each query, row by row, head by head."""
    rows, columns = torch.tril_indices(*weights.shape[-2:], device=weights.device)
    return quantise_weights(weights[:, rows, columns], max_weight).cpu().numpy().tobytes()


def quantise_weights(weights: Tensor, max_weight: float) -> UInt8[Tensor, "..."]:
    """Return weights as bytes, `max_weight` as 255."""
    return (weights * (255 / max_weight)).round().clamp(0, 255).to(torch.uint8)


def pack_links(weights: Float[Tensor, "query key"], max_weight: float) -> dict[str, Any]:
    """Return the traits of every token's strongest links: keys it attends to, and queries that attend to it."""
    k = min(LINKS_PER_TOKEN, weights.shape[-1])
    strongest = [weights.topk(k, 1), weights.T.topk(k, 1)]
    at = torch.stack([links.indices for links in strongest]).to(torch.int32)
    strong = torch.stack([links.values for links in strongest])
    return {
        "top_at": at.cpu().numpy().tobytes(),
        "top_weights": quantise_weights(strong, max_weight).cpu().numpy().tobytes(),
        "top_k": k,
    }
