"""Changed runs as cells, packed end to end into rows, and rows into batches that pass the layers together.

Three cells of a prompt of 8 tokens, in rows 6 slots wide. Each cell runs from its first changed position to the end:

                shared past (base run, read only)      slots of the row
    row 0       p0 p1 p2 p3 p4                       | c0: p2 p3 p4 p5 p6 p7
    row 1       p0 p1 p2 p3 p4                       | c1: p5 p6 p7 | c2: p5 p6 p7
    mask        a slot of a cell that starts at p attends to past entries before p and to its own cell up to itself
    layers      row 0 starts at layer 0, row 1 joins at layer 3: rows are sorted by the layer at which they start
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glmlens.hook_points import local_name
from glmlens.model import GLM
from glmlens.patch.interventions import Write

MAX_OUTPUT_CELLS = 4096
"""How many cells that start behind the last layer are run in one batch."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Cell:
    """One changed run: a variant of an example, its writes, and the layer and position at which it starts.

    `example` counts all prompts and `row` those of the base runs that the cell is recorded in. Without writes the run
    is the base run.
    """

    variant: int
    example: int
    row: int
    writes: tuple[Write, ...]
    start_layer: int
    first_position: int

    @staticmethod
    def from_writes(
        variant: int, example: int, row: int, writes: Sequence[Write], n_layers: int, length: int
    ) -> "Cell":
        """Return the cell of these writes, which starts at the earliest layer and position of any."""
        # An edit of a layer's output runs before one of the next layer's input, as in a forward pass.
        moved = tuple(
            sorted((move_to_next_input(write, n_layers) for write in writes), key=lambda write: not write.origin)
        )
        positions = [int(write.positions[0]) for write in moved if write.positions is not None]
        return Cell(
            variant=variant,
            example=example,
            row=row,
            writes=moved,
            start_layer=min((layer_of_point(write.name, n_layers) for write in moved), default=n_layers),
            first_position=min(positions, default=length),
        )


def layer_of_point(name: str, n_layers: int) -> int:
    """Return the layer of a point; for points behind the last layer, `n_layers`."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else n_layers


def move_to_next_input(write: Write, n_layers: int) -> Write:
    """Return the same write at the next layer's input where it is at a layer's output: one layer less is run."""
    name = write.name
    if name == "embed":
        name = "blocks.0.resid_pre"
    elif local_name(name) == "resid_post":
        name = f"blocks.{layer_of_point(name, n_layers) + 1}.resid_pre"
    return write if name == write.name else replace(write, name=name, origin=write.name)


@dataclass(frozen=True, kw_only=True)
class CellSlots:
    """Where a cell is packed: its row, the slot of its first position, and how many past entries precede slots."""

    row: int
    first_slot: int
    first_position: int
    past_length: int

    def slots_of(self, positions: Tensor) -> Tensor:
        """Return the slots of absolute positions."""
        return positions - self.first_position + self.first_slot

    def key_columns_of(self, positions: Tensor) -> Tensor:
        """Return the columns of keys: before the first position in the shared past, from there on in the row."""
        return torch.where(positions < self.first_position, positions, self.past_length + self.slots_of(positions))


@dataclass(frozen=True, eq=False, kw_only=True)
class PackedBatch:
    """Rows of packed cells that pass the layers together, sorted by the layer at which they start.

    Cells that start behind the last layer are in no row; a batch of them has `row_start_layers` empty.
    """

    cells: list[Cell]
    cell_slots: list[CellSlots]
    row_start_layers: list[int]
    width: int
    past_length: int


def pack_outputs(cells: Sequence[Cell]) -> PackedBatch:
    """Return a batch of cells that pass no layer: only what is behind the last layer runs."""
    slots = [CellSlots(row=-1, first_slot=0, first_position=cell.first_position, past_length=0) for cell in cells]
    return PackedBatch(cells=list(cells), cell_slots=slots, row_start_layers=[], width=0, past_length=0)


def pack_segments(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Pack segments into rows of a width, the longest first, each where it leaves the least room; return indices."""
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = {}  # rows by how many slots they have left
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = next((n for n in range(lengths[i], width) if rows_by_room.get(n)), None)
        if room is None:  # it fits into no row that has been opened
            row, room = len(rows), width
            rows.append([])
        else:
            row = rows_by_room[room].pop()
        rows[row].append(i)
        rows_by_room.setdefault(room - lengths[i], []).append(row)
    return rows


def pack_batches(
    cells: Sequence[Cell], length: int, n_layers: int, most_bytes: int, row_bytes: Callable[[int, int], int]
) -> Iterator[PackedBatch]:
    """Yield batches whose rows take at most `most_bytes`, of `row_bytes(width, past length)` each.

    Rows hold cells of one example that start at one layer: they read the same past and join the batch together.
    """
    at_end = [cell for cell in cells if cell.start_layer == n_layers]
    for start in range(0, len(at_end), MAX_OUTPUT_CELLS):
        yield pack_outputs(at_end[start : start + MAX_OUTPUT_CELLS])
    inside = [cell for cell in cells if cell.start_layer < n_layers]
    if not inside:
        return
    groups: dict[tuple[int, int], list[Cell]] = {}
    for cell in sorted(inside, key=lambda cell: (cell.start_layer, cell.row)):
        groups.setdefault((cell.start_layer, cell.row), []).append(cell)
    longest = length - min(cell.first_position for cell in inside)
    layouts = []
    # Cells at every position have lengths 1 to n. With one slot more, n and 1, n - 1 and 2, ... fill rows of n + 1.
    for width in (longest, longest + 1):
        rows = [
            [group[i] for i in row]
            for group in groups.values()
            for row in pack_segments([length - cell.first_position for cell in group], width)
        ]
        layouts.append((len(rows) * width, width, rows))
    _, width, rows = min(layouts, key=lambda layout: layout[:2])  # fewest slots
    past_length = max(cell.first_position for cell in inside)
    rows_per_batch = max(1, most_bytes // row_bytes(width, past_length))
    for i in range(0, len(rows), rows_per_batch):
        yield place_rows(rows[i : i + rows_per_batch], length, width)


def place_rows(rows: list[list[Cell]], length: int, width: int) -> PackedBatch:
    """Return the batch of these rows, each cell from the slot at which the one before it ends."""
    past_length = max(cell.first_position for row in rows for cell in row)
    cells: list[Cell] = []
    cell_slots: list[CellSlots] = []
    for i, row in enumerate(rows):
        slot = 0
        for cell in row:
            cells.append(cell)
            cell_slots.append(
                CellSlots(row=i, first_slot=slot, first_position=cell.first_position, past_length=past_length)
            )
            slot += length - cell.first_position
    return PackedBatch(
        cells=cells,
        cell_slots=cell_slots,
        row_start_layers=[row[0].start_layer for row in rows],
        width=width,
        past_length=past_length,
    )


def estimate_row_bytes(model: GLM, width: int, past_length: int, dtype: torch.dtype) -> int:
    """Return what one row takes at most while it passes a layer, in bytes."""
    cfg = model.cfg
    keys = width + past_length
    # per slot: the residual stream and its norms, the MLP's inner activations, and queries, keys and values
    slot = 8 * cfg.d_model + 6 * cfg.d_mlp + 6 * cfg.n_heads * cfg.d_head
    # scores, pattern and mask, and keys and values repeated for every query head
    attention = cfg.n_heads * (4 * width * keys + 4 * keys * cfg.d_head)
    return (width * slot + attention) * dtype.itemsize
