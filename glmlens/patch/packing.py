"""Changed runs as cells, packed end to end into rows, and rows into waves that pass the layers together."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from glmlens.hook_points import local_name
from glmlens.model import GLM
from glmlens.patch.interventions import Write


@dataclass(frozen=True, eq=False)
class Cell:
    """One changed run: of which example, by which writes, from which layer and position on."""

    example: int
    writes: tuple[Write, ...]
    start_layer: int
    first_position: int

    @staticmethod
    def from_writes(example: int, writes: Sequence[Write], n_layers: int) -> "Cell":
        # an edit of a layer's output comes before one of the next layer's input, as it does in a forward
        moved = tuple(
            sorted((move_to_next_input(write, n_layers) for write in writes), key=lambda write: not write.origin)
        )
        first = min(int(w.positions[0]) for w in moved if w.positions is not None)
        return Cell(example, moved, min(layer_of_point(w.name, n_layers) for w in moved), first)


def layer_of_point(name: str, n_layers: int) -> int:
    return int(name.split(".")[1]) if name.startswith("blocks.") else n_layers


def move_to_next_input(write: Write, n_layers: int) -> Write:
    """The same write where the least is left to run: a layer's output is the next one's input."""
    name = write.name
    if name == "embed":
        name = "blocks.0.resid_pre"
    elif local_name(name) == "resid_post":
        name = f"blocks.{layer_of_point(name, n_layers) + 1}.resid_pre"
    return write if name == write.name else replace(write, name=name, origin=write.name)


@dataclass(frozen=True)
class CellSlots:
    """Where a cell sits: its row, the slot of its first position, and how many entries of the past precede slots."""

    row: int
    first_slot: int
    first_position: int
    past_length: int

    def slots_of(self, positions: Tensor) -> Tensor:
        return positions - self.first_position + self.first_slot

    def key_columns_of(self, positions: Tensor) -> Tensor:
        """Where keys stand: before the first position in the shared past, from there on in the row itself."""
        return torch.where(positions < self.first_position, positions, self.past_length + self.slots_of(positions))


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows of packed cells that go through the layers together, ordered by where they start."""

    cells: list[Cell]
    cell_slots: list[CellSlots]
    row_start_layers: list[int]  # of every row
    width: int
    past_length: int


def pack_segments(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Indices of segments packed into rows of a width, the longest first, each where it leaves the least room."""
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # by how much is left, the rows
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        left = next((n for n in range(lengths[i], width) if room.get(n)), None)
        row = len(rows) if left is None else room[left].pop()
        if left is None:
            rows.append([])
        rows[row].append(i)
        room.setdefault((width if left is None else left) - lengths[i], []).append(row)
    return rows


def pack_batches(
    cells: Sequence[Cell], length: int, n_layers: int, most_bytes: int, row_bytes: Callable
) -> Iterator[PackedBatch]:
    """Pack cells into waves whose rows weigh at most so many bytes, `row_bytes(width, past)` each."""
    inside = [cell for cell in cells if cell.start_layer < n_layers]
    for start in range(0, len(at_end := [cell for cell in cells if cell.start_layer == n_layers]), 4096):
        some = at_end[start : start + 4096]
        yield PackedBatch(some, [CellSlots(-1, 0, cell.first_position, 0) for cell in some], [], 0, 0)
    groups: dict[tuple[int, int], list[Cell]] = {}
    for cell in sorted(inside, key=lambda cell: (cell.start_layer, cell.example)):
        groups.setdefault((cell.start_layer, cell.example), []).append(cell)
    if not inside:
        return
    longest = length - min(cell.first_position for cell in inside)
    layouts = []
    for width in (longest, longest + 1):  # with one slot more, two segments of a triangle fill a row
        rows = [
            [group[i] for i in row]
            for group in groups.values()
            for row in pack_segments([length - cell.first_position for cell in group], width)
        ]
        layouts.append((len(rows) * width, width, rows))
    _, width, rows = min(layouts, key=lambda layout: layout[:2])
    past = max(cell.first_position for cell in inside)
    many = max(1, most_bytes // row_bytes(width, past))
    for i in range(0, len(rows), many):
        yield place_rows(rows[i : i + many], length, width)


def place_rows(rows: list[list[Cell]], length: int, width: int) -> PackedBatch:
    past = max(cell.first_position for row in rows for cell in row)
    cells, seats = [], []
    for i, row in enumerate(rows):
        slot = 0
        for cell in row:
            cells.append(cell)
            seats.append(CellSlots(i, slot, cell.first_position, past))
            slot += length - cell.first_position
    return PackedBatch(cells, seats, [row[0].start_layer for row in rows], width, past)


def estimate_row_bytes(model: GLM, width: int, past_length: int, dtype: torch.dtype) -> int:
    """What one row weighs at most while it passes a layer: the residual stream, its norms, an MLP and a pattern."""
    cfg = model.cfg
    keys = width + past_length
    slot = 8 * cfg.d_model + 6 * cfg.d_mlp + 6 * cfg.n_heads * cfg.d_head
    attention = cfg.n_heads * (4 * width * keys + 4 * keys * cfg.d_head)
    return (width * slot + attention) * dtype.itemsize
