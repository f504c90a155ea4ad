"""The attention patterns of all heads of a layer in one figure."""

from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
from typing_extensions import Unpack

from glmlens.integers import Integer, read_integer
from glmlens.plot.arrays import Labels, Numbers, as_labelled, label_blocks, largest_by_block
from glmlens.plot.style import GREY, MAGNITUDE, SERIES, Look, apply_style, color_bar, infinite_note, set_ticks

CELLS_ACROSS = 400  # cells along the width of the figure


def attention_heads(
    patterns: Numbers, labels: Labels = None, *, n_kv_heads: Integer | None = None, **look: Unpack[Look]
) -> go.Figure:
    """Draw the attention [head, query, key] of all heads of a layer side by side, the first query on top.

    Heads that share a KV head stand together, labelled "kv 0", "kv 1", ... Long prompts are pooled into blocks, each
    drawn as its largest number.
    """
    data = as_labelled(patterns, ("head", "query", "key"), labels)
    n, length = data.shape[:2]
    groups = 1 if n_kv_heads is None else read_integer(n_kv_heads, "n_kv_heads", least=1)
    if n % groups:
        raise ValueError(f"{n} heads do not fall into {groups} groups")
    # Tiles per row: few for few heads, and a whole number of rows per group.
    wide = 8 if n > 16 else 4
    columns = min(n // groups, wide) if groups > 1 else min(n, wide)
    per_group = -(-(n // groups) // columns)
    if groups > 1 and per_group == 1:
        columns *= max(1, min(groups, wide // columns))  # several small groups per row
    # Pool k x k cells into one, so that all tiles of a row have about CELLS_ACROSS cells along the width.
    k = -(-max(data.shape[1:]) // max(16, min(128, CELLS_ACROSS // columns)))
    tiles = np.stack([largest_by_block(head, k, k) for head in data.values])
    places = [tile_place(head, n // groups, per_group, columns) for head in range(n)]
    rows = 1 + max(row for row, _ in places)
    gaps = (-(-tiles.shape[1] // 6), -(-tiles.shape[2] // 16))
    board = TileBoard(tiles.shape[1:], gaps, (rows, columns))
    figure = go.Figure(board.draw_tiles(tiles, places))
    query, key = (label_blocks(data.labels[axis], k) for axis in data.axes[1:])
    set_ticks(figure, "x", [label for _ in range(columns) for label in (*key, *[""] * gaps[1])], "")
    set_ticks(figure, "y", [label for _ in range(rows) for label in (*[""] * gaps[0], *query)], "", first_on_top=True)
    figure.update_xaxes(showticklabels=False).update_yaxes(showticklabels=False)
    figure.update_layout(xaxis_title="key", yaxis_title="query")
    for head, place in enumerate(places):
        group = f" · kv {head // (n // groups)}" if groups > 1 else ""
        y, x = board.corner(*place)
        # The label stands in the gap above the tile.
        at = {"x": x - 0.5, "y": y - 0.5, "xanchor": "left", "yanchor": "bottom", "yshift": -2}
        figure.add_annotation(
            text=f"head {head}{group}",
            showarrow=False,
            font={"size": 11, "color": SERIES[head // (n // groups) % len(SERIES)] if groups > 1 else GREY},
            **at,
        )
    counted = infinite_note(data.values)
    note = f"each cell shows the largest number of {k} x {k}: there are {length:,} queries" if k > 1 else ""
    # Tiles are square: the figure is about 860 pixels wide, and a row has room for its label.
    tall = {"height": int(40 + rows * 1.17 * (860 / columns - 10))}
    return apply_style(figure, "Attention of all heads", data.about, (note, counted), **(tall | look))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TileBoard:
    """Tiles of one size in rows, with a gap above and to the right of each."""

    tile: tuple[int, ...]
    gaps: tuple[int, int]
    shape: tuple[int, int]

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return the place of a tile's first cell."""
        return row * (self.tile[0] + self.gaps[0]) + self.gaps[0], column * (self.tile[1] + self.gaps[1])

    def draw_tiles(self, tiles: np.ndarray, places: list[tuple[int, int]]) -> go.Heatmap:
        """Return all tiles as one heatmap, the gaps empty."""
        size = [n * (t + gap) for n, t, gap in zip(self.shape, self.tile, self.gaps, strict=True)]
        z = np.full(size, np.nan, np.float32)
        heads = np.zeros(size, np.uint8 if len(tiles) < 256 else np.uint16)  # the head of every cell, for the hover
        for head, (picture, place) in enumerate(zip(tiles, places, strict=True)):
            y, x = self.corner(*place)
            here = np.s_[y : y + self.tile[0], x : x + self.tile[1]]
            z[here] = picture
            heads[here] = head
        hover = "head %{customdata}<br>query %{y}, key %{x}<br>attention %{z:.4g}<extra></extra>"
        heat = go.Heatmap(z=z, x=np.arange(size[1]), y=np.arange(size[0]), customdata=heads, colorscale=MAGNITUDE)
        return heat.update(zmin=0, zmax=1, hoverongaps=False, hovertemplate=hover, colorbar=color_bar("attention"))


def tile_place(head: int, size: int, per_group: int, columns: int) -> tuple[int, int]:
    """Return the row and column of a head's tile; a group begins a new row unless it fits into one."""
    if per_group == 1:
        return divmod(head, columns)
    group, inside = divmod(head, size)
    row, column = divmod(inside, columns)
    return group * per_group + row, column
