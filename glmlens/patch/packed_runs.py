"""Run many changed runs in one forward, without what an edit cannot have changed.

A cell is one changed run. It starts at the layer of its first edit, with the residual stream of the base run, and at
the position of its first edit: earlier positions cannot attend to it, so their keys and values are those of the base
run. Its positions are a segment. Segments are packed end to end into rows of one width, and a mask keeps them apart
(packing.py has a picture). A batch of rows passes each layer once, and rows join it at the layer where they start. At
the end only the positions and tokens that the metric reads are unembedded.
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
from glmlens.patch.packing import Cell, PackedBatch, layer_of_point, pack_outputs
from glmlens.patch.sites import move_position_first, repeat_kv


@dataclass(frozen=True, eq=False)
class BaseRuns:
    """The unchanged runs of examples of one length: the residual stream that enters every layer, and the KV cache.

    The last entry of `resid` leaves the last layer. `example_indices` are the numbers of these examples among all
    prompts, which the metric receives. `values` [example, position, rest] are what was recorded at other points.
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
        """Run the examples once and record the points `names` as `values`."""
        last = f"blocks.{lens.cfg.n_layers - 1}.resid_post"
        kv = lens.new_kv(*tokens.shape)
        wanted = ["resid_pre", last, *names]
        # No logits are computed unless they are a point that is patched.
        no_positions = torch.zeros(0, dtype=torch.long, device=lens.device)
        keep = None if "logits" in names else no_positions
        _, acts = lens.run_with_cache(
            tokens, wanted, kv=kv, logits_to_keep=keep, attention_mask=torch.ones_like(tokens)
        )
        resid = [acts["resid_pre", i] for i in range(lens.cfg.n_layers)] + [acts[last]]
        values = {name: move_position_first(name, acts[name]) for name in names}
        return BaseRuns(tokens=tokens, example_indices=example_indices, resid=resid, kv=kv, values=values)


@dataclass(frozen=True)
class SharedPastKV(LayerKV):
    """One layer's keys and values of the base run, put before those of each row.

    `examples` are the base rows of the packed rows; None when there is one example. With `group_size` above 1 keys and
    values are returned as every query head reads them.
    """

    examples: Int[Tensor, "row"] | None
    rows: int
    past_length: int
    group_size: int

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.prepend_past(self.cache.keys, k), self.prepend_past(self.cache.values, v)

    def prepend_past(
        self, cached: Float[Tensor, "layer example pos kv d"], new: Float[Tensor, "row slot kv d"]
    ) -> Float[Tensor, "row key kv_or_head d"]:
        """Return the base run's entries and the new ones; the cache itself is not changed."""
        past = cached[self.layer, :, : self.past_length]
        past = past.expand(self.rows, -1, -1, -1) if self.examples is None else past[self.examples]
        both = torch.cat([past, new], 1)
        return repeat_kv(both, self.group_size) if self.group_size > 1 else both


@dataclass
class PackedEdits:
    """The hook of a batch: every write changes the slots of its own cell, and `changed` notes whether it did."""

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
        """Whether an edit behind the last layer may read other positions: then all of them must be there."""
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
        view = move_position_first(name, x)  # [row, slot, rest], or [row, key, rest] at keys and values
        for i, write in self.writes[name]:
            place, positions = self.batch.cell_slots[i], write.positions
            assert positions is not None
            slots = place.key_columns_of(positions) if write.uses_key_positions else place.slots_of(positions)
            row = view[place.row]
            # Another write of this layer may be by query head; keys and values are then repeated for every head.
            repeated = write.uses_key_positions and self.reads_by_query_head(layer_of_point(name, 0))
            if repeated and not write.by_query_head:
                self.changed[i] |= write.into_group(row, slots, positions, place.key_columns_of, self.group_size)
            else:
                self.changed[i] |= write.apply_to_row(row, slots, positions, place.key_columns_of)
        return x


def make_unchanged_batch(base: BaseRuns, n_layers: int) -> PackedBatch:
    """Return a batch of the base runs without any edit."""
    length = base.tokens.shape[1]
    return pack_outputs(
        [
            Cell.from_writes(variant=-1, example=-1, row=i, writes=(), n_layers=n_layers, length=length)
            for i in range(len(base.tokens))
        ]
    )


@torch.no_grad()
def run_packed(
    model: GLM, *, base: BaseRuns, batch: PackedBatch, metric: Metric
) -> tuple[Float[Tensor, "cell"], Bool[Tensor, "cell"]]:
    """Run a packed batch; return the metric of every cell and whether its edits changed any number.

    `packing.py` has a picture of the layout.
    """
    device, cfg = base.tokens.device, model.cfg
    dtype = base.resid[0].dtype

    # 1. Lay out: which position of which cell stands in every slot, what it may attend to, its rotary angles.
    changed = torch.zeros(len(batch.cells), dtype=torch.bool, device=device)
    hook = PackedEdits(batch, changed, cfg.n_groups)
    position, cell = assign_slots(batch, base.tokens.shape[1], device)
    mask = build_segment_mask(position, cell, batch, dtype)
    cos, sin = rotary_angles(position, cfg, dtype)
    base_row_of_cell = torch.tensor([c.row for c in batch.cells], device=device)
    # All cells of a row are of one example, so its largest cell number (slots without a cell have -1) names it.
    base_row_of_row = base_row_of_cell[cell.amax(1)] if batch.row_start_layers else base_row_of_cell[:0]
    single_example = base.tokens.shape[0] == 1

    # 2. Pass the layers: rows that start at a layer join there, with the base run's residual stream.
    resid = base.resid[0].new_zeros(0, batch.width, cfg.d_model)
    for i in range(min(batch.row_start_layers, default=cfg.n_layers), cfg.n_layers):
        rows = sum(start <= i for start in batch.row_start_layers)
        if rows > len(resid):
            joining = slice(len(resid), rows)
            # Slots without a cell hold position 0; no cell attends to them.
            entering = base.resid[i][base_row_of_row[joining, None], position[joining].clamp(min=0)]
            resid = torch.cat([resid, entering])
        past = SharedPastKV(
            cache=base.kv,
            layer=i,
            examples=None if single_example else base_row_of_row[:rows],
            rows=rows,
            past_length=batch.past_length,
            group_size=cfg.n_groups if hook.reads_by_query_head(i) else 1,
        )
        resid = model.blocks[i](resid, (cos[:rows], sin[:rows]), mask[:rows], past, scope_hook(hook, f"blocks.{i}"))

    # 3. and 4. Collect what leaves the last layer at the positions that the metric reads, and measure it.
    final_resid, read_positions = collect_final_residuals(base, batch, resid, base_row_of_cell, metric, hook)
    metrics = measure_outputs(model, base, final_resid, read_positions, base_row_of_cell, metric, hook)
    return metrics, changed


def assign_slots(
    batch: PackedBatch, length: int, device: torch.device
) -> tuple[Int[Tensor, "row slot"], Int[Tensor, "row slot"]]:
    """Return the absolute position and the cell of every slot, -1 where a row is longer than its cells."""
    position = torch.full((len(batch.row_start_layers), batch.width), -1)
    cell = position.clone()
    if batch.row_start_layers:  # otherwise all cells start behind the last layer and have no slots
        for i, place in enumerate(batch.cell_slots):
            here = slice(place.first_slot, place.first_slot + length - place.first_position)
            position[place.row, here] = torch.arange(place.first_position, length)
            cell[place.row, here] = i
    return position.to(device), cell.to(device)


def build_segment_mask(
    position: Int[Tensor, "row slot"], cell: Int[Tensor, "row slot"], batch: PackedBatch, dtype: torch.dtype
) -> Float[Tensor, "row one slot key"]:
    """Return the additive mask: 0 at the past before the cell's first position, and at the cell up to the slot."""
    # Slots without a cell have number -1, which reads the 0 appended: they may attend to nothing of the past.
    first = torch.tensor([c.first_position for c in batch.cells] + [0], device=position.device)[cell]
    past = torch.arange(batch.past_length, device=position.device) < first[:, :, None]
    own = (cell[:, :, None] == cell[:, None]) & (position[:, :, None] >= position[:, None])
    seen = rearrange(torch.cat([past, own], 2), "row slot key -> row 1 slot key")
    nothing = torch.zeros((), dtype=dtype, device=position.device)
    return torch.where(seen, nothing, torch.finfo(dtype).min)


def collect_final_residuals(
    base: BaseRuns, batch: PackedBatch, resid: Tensor, base_row_of_cell: Tensor, metric: Metric, hook: PackedEdits
) -> tuple[Float[Tensor, "cell read model"], Int[Tensor, "read"]]:
    """Return what leaves the last layer, of every cell at the positions read, and these positions.

    Before its first changed position a cell is the base run; from there on it has slots of its own.
    """
    length, n_layers = base.tokens.shape[1], len(base.resid) - 1
    reads_all = metric.everywhere or hook.mixes_at_end(n_layers)
    read = torch.arange(0 if reads_all else length - 1, length, device=base.tokens.device)
    x = base.resid[n_layers][base_row_of_cell][:, read]
    for i, (cell, slots) in enumerate(zip(batch.cells, batch.cell_slots, strict=True)):
        if cell.start_layer < n_layers:
            later = read >= slots.first_position
            x[i, later] = resid[slots.row, slots.slots_of(read[later])]
    return x, read


def measure_outputs(
    model: GLM,
    base: BaseRuns,
    x: Float[Tensor, "cell read model"],
    read: Int[Tensor, "read"],
    base_row_of_cell: Int[Tensor, "cell"],
    metric: Metric,
    hook: PackedEdits,
) -> Float[Tensor, "cell"]:
    """Run the edits behind the last layer, the norm and the unembedding; return the metric of every cell."""
    end = OutputEdits(hook, read)
    x = end(f"blocks.{model.cfg.n_layers}.resid_pre", x)
    final = end("ln_final.normalized", model.ln_final(x, scope_hook(end, "ln_final")))
    if metric.columns is None or hook.wants("logits"):
        logits = metric.select_columns(end("logits", model.unembed(final)))
    else:  # only the logits of the metric's tokens
        logits = final @ model.unembed.get_parameter("weight")[metric.columns].T
        if model.cfg.head_bias:
            logits = logits + model.unembed.get_parameter("bias")[metric.columns]
    return metric(metric.select_positions(logits), base.example_indices[base_row_of_cell])


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
