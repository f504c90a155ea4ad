"""Many changed runs in a fraction of the work: what an edit cannot have changed is not run again.

A cell is one changed run. It starts at the layer of its first edit, from the residual stream of the base run, and at
the position of its first edit, since earlier positions cannot see it: their keys and values are those of the base run.
Its positions are a segment; segments are packed end to end into rows of one width, and a mask lets each see its own
past. All layers are passed once by a wave of rows, which rows join where they start. At the end only what the metric
reads is unembedded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glmlens.hooks import scope_hook
from glmlens.kv_cache import KVCache, LayerKV
from glmlens.lens import Lens
from glmlens.model import GLM, rotary_angles
from glmlens.patch.interventions import Write
from glmlens.patch.metrics import Metric
from glmlens.patch.packing import Cell, CellSlots, PackedBatch, layer_of_point
from glmlens.patch.sites import move_position_first, repeat_kv


@dataclass(frozen=True, eq=False)
class BaseRuns:
    """The unchanged runs of examples of one length: the residual stream that enters every layer, and the cache.

    The last entry of `resid` leaves the last layer; `numbers` are what the metric calls these examples.
    """

    tokens: Int[Tensor, "example pos"]
    example_indices: Int[Tensor, "example"]
    resid: list[Float[Tensor, "example pos model"]]
    kv: KVCache
    values: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def record(
        lens: Lens,
        tokens: Int[Tensor, "example pos"],
        example_indices: Int[Tensor, "example"],
        names: Sequence[str] = (),
    ) -> "BaseRuns":
        """Run the examples once; `values` [example, position, rest] are at the points named."""
        last = f"blocks.{lens.cfg.n_layers - 1}.resid_post"
        kv = lens.new_kv(*tokens.shape)
        wanted = ["resid_pre", last, *names]
        keep_none = torch.zeros(0, dtype=torch.long, device=lens.device)
        all_logits = any(name == "logits" for name in names)
        keep = None if all_logits else keep_none
        _, acts = lens.run_with_cache(
            tokens, wanted, kv=kv, logits_to_keep=keep, attention_mask=torch.ones_like(tokens)
        )
        resid = [acts["resid_pre", i] for i in range(lens.cfg.n_layers)] + [acts[last]]
        return BaseRuns(
            tokens, example_indices, resid, kv, {name: move_position_first(name, acts[name]) for name in names}
        )


@dataclass(frozen=True)
class SharedPastKV(LayerKV):
    """One layer's keys and values of the base run, recalled before those of each row."""

    examples: Int[Tensor, "row"] | None  # None: all rows are of the only example
    rows: int
    past_length: int
    group_size: int  # above 1: every query head reads its own

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for all_past, new in ((self.cache.keys, k), (self.cache.values, v)):
            past = all_past[self.layer, :, : self.past_length]
            past = past.expand(self.rows, -1, -1, -1) if self.examples is None else past[self.examples]
            both = torch.cat([past, new], 1)
            out.append(repeat_kv(both, self.group_size) if self.group_size > 1 else both)
        return out[0], out[1]


@dataclass
class PackedEdits:
    """The hook of a wave: every write changes the positions of its own cell."""

    batch: PackedBatch
    changed: Bool[Tensor, "cell"]
    group_size: int
    writes: dict[str, list[tuple[int, Write]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for i, cell in enumerate(self.batch.cells):
            for write in cell.writes:
                self.writes.setdefault(write.name, []).append((i, write))

    def wants(self, name: str) -> bool:
        return name in self.writes

    def reads_by_query_head(self, layer: int) -> bool:
        """Whether keys or values of this layer are edited as single query heads read them."""
        names = (f"blocks.{layer}.kv.k", f"blocks.{layer}.kv.v")
        return any(write.by_query_head for name in names for _, write in self.writes.get(name, ()))

    def mixes_at_end(self, n_layers: int) -> bool:
        """Whether, behind the last layer, the last position's numbers may follow from those of earlier ones."""
        ends = (
            write
            for name in self.writes
            if layer_of_point(name, n_layers) == n_layers
            for _, write in self.writes[name]
        )
        return any(write.do.mixes_positions for write in ends)

    def __call__(self, name: str, x: Tensor) -> Tensor:
        if name not in self.writes:
            return x
        x = x.clone()
        view = move_position_first(name, x)
        for i, write in self.writes[name]:
            seat, positions = self.batch.cell_slots[i], write.positions
            assert positions is not None
            slots = seat.key_columns_of(positions) if write.uses_key_positions else seat.slots_of(positions)
            row = view[seat.row]
            if (
                write.uses_key_positions
                and not write.by_query_head
                and self.reads_by_query_head(layer_of_point(name, 0))
            ):
                self.changed[i] |= write.into_group(row, slots, positions, seat.key_columns_of, self.group_size)
            else:
                self.changed[i] |= write.apply_to_row(row, slots, positions, seat.key_columns_of)
        return x


def make_unchanged_batch(base: BaseRuns, n_layers: int) -> PackedBatch:
    """A wave of the base runs as they are."""
    length = base.tokens.shape[1]
    cells = [Cell(i, (), n_layers, length) for i in range(len(base.tokens))]
    return PackedBatch(cells, [CellSlots(-1, 0, length, 0)] * len(cells), [], 0, 0)


@torch.no_grad()
def run_packed(
    model: GLM, base: BaseRuns, batch: PackedBatch, metric: Metric
) -> tuple[Float[Tensor, "cell"], Bool[Tensor, "cell"]]:
    """The metric of every cell of a wave, and whether its edits changed any number."""
    device, cfg = base.tokens.device, model.cfg
    changed = torch.zeros(len(batch.cells), dtype=torch.bool, device=device)
    hook = PackedEdits(batch, changed, cfg.n_groups)
    position, cell = assign_slots(batch, base.tokens.shape[1], device)
    mask = build_segment_mask(position, cell, batch, base.resid[0].dtype)
    angles = rotary_angles(position, cfg, base.resid[0].dtype)
    owner = torch.tensor([c.example for c in batch.cells], device=device)
    examples = owner[cell.amax(1)] if batch.row_start_layers else owner[:0]
    one = base.tokens.shape[0] == 1

    resid = base.resid[0].new_zeros(0, batch.width, cfg.d_model)
    for i in range(min(batch.row_start_layers, default=cfg.n_layers), cfg.n_layers):
        rows = sum(start <= i for start in batch.row_start_layers)
        new = slice(len(resid), rows)
        resid = torch.cat([resid, base.resid[i][examples[new, None], position[new].clamp(min=0)]])
        group = cfg.n_groups if hook.reads_by_query_head(i) else 1
        past = SharedPastKV(base.kv, i, None if one else examples[:rows], rows, batch.past_length, group)
        turns = angles[0][:rows], angles[1][:rows]
        resid = model.blocks[i](resid, turns, mask[:rows], past, scope_hook(hook, f"blocks.{i}"))
    return measure_outputs(model, base, batch, resid, owner, metric, hook), changed


def assign_slots(
    batch: PackedBatch, length: int, device: torch.device
) -> tuple[Int[Tensor, "row slot"], Int[Tensor, "row slot"]]:
    """The absolute position and the cell of every slot, -1 where a row is longer than its cells."""
    position = torch.full((len(batch.row_start_layers), batch.width), -1)
    cell = position.clone()
    for i, seat in enumerate(batch.cell_slots):
        if batch.row_start_layers:
            here = slice(seat.first_slot, seat.first_slot + length - seat.first_position)
            position[seat.row, here] = torch.arange(seat.first_position, length)
            cell[seat.row, here] = i
    return position.to(device), cell.to(device)


def build_segment_mask(
    position: Int[Tensor, "row slot"], cell: Int[Tensor, "row slot"], batch: PackedBatch, dtype: torch.dtype
) -> Float[Tensor, "row one slot key"]:
    """0 where a slot may look: at the past before its cell's first position, and at its own cell up to itself."""
    first = torch.tensor([c.first_position for c in batch.cells] + [0], device=position.device)[cell]
    past = torch.arange(batch.past_length, device=position.device) < first[:, :, None]
    own = (cell[:, :, None] == cell[:, None]) & (position[:, :, None] >= position[:, None])
    seen = rearrange(torch.cat([past, own], 2), "row slot key -> row 1 slot key")
    nothing = torch.zeros((), dtype=dtype, device=position.device)
    return torch.where(seen, nothing, torch.finfo(dtype).min)


def measure_outputs(
    model: GLM, base: BaseRuns, batch: PackedBatch, resid: Tensor, owner: Tensor, metric: Metric, hook: PackedEdits
) -> Float[Tensor, "cell"]:
    """From the residual stream that leaves the last layer to the metric, at the positions that it reads alone."""
    length, n_layers = base.tokens.shape[1], model.cfg.n_layers
    everywhere = metric.everywhere or hook.mixes_at_end(n_layers)
    read = torch.arange(0 if everywhere else length - 1, length, device=owner.device)
    x = base.resid[n_layers][owner][:, read]
    for i, (cell, seat) in enumerate(zip(batch.cells, batch.cell_slots, strict=True)):
        if cell.start_layer < n_layers:
            later = read >= seat.first_position
            x[i, later] = resid[seat.row, seat.slots_of(read[later])]
    end = OutputEdits(hook, read)
    x = end(f"blocks.{n_layers}.resid_pre", x)
    final = end("ln_final.normalized", model.ln_final(x, scope_hook(end, "ln_final")))
    if metric.columns is None or hook.wants("logits"):
        logits = end("logits", model.unembed(final))
        logits = logits if metric.columns is None else logits[..., metric.columns]
    else:
        logits = final @ model.unembed.get_parameter("weight")[metric.columns].T
        if model.cfg.head_bias:
            logits = logits + model.unembed.get_parameter("bias")[metric.columns]
    return metric(logits if metric.everywhere else logits[:, -1:], base.example_indices[owner])


@dataclass
class OutputEdits:
    """The hook behind the last layer, where every cell is a row and its slots are the positions read."""

    edits: PackedEdits
    read_positions: Int[Tensor, "slot"]

    def __call__(self, name: str, x: Tensor) -> Tensor:
        for i, write in self.edits.writes.get(name, ()):
            assert write.positions is not None
            here = self.read_positions[torch.isin(self.read_positions, write.positions)]
            if len(here):
                self.edits.changed[i] |= write.apply_to_row(
                    x[i], here - self.read_positions[0], here, lambda keys: keys
                )
        return x
