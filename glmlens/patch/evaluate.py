"""Run many variants of many prompts, and measure each: which cells to run, in which batches, at what cost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from glmlens.deprecated import rename_attribute, rename_keyword
from glmlens.lens import Lens
from glmlens.patch.apply import read_allowed_effects
from glmlens.patch.interventions import (
    Intervention,
    InterventionCompiler,
    PositionNames,
    Write,
    as_interventions,
    refuse_mixed,
)
from glmlens.patch.packed_runs import BaseRuns, make_unchanged_batch, run_packed
from glmlens.patch.packing import Cell, PackedBatch, estimate_row_bytes, pack_batches
from glmlens.patch.pairs import PromptPairs
from glmlens.patch.replacement_values import Swap, TokenIds
from glmlens.patch.sites import PatchError, repeat_kv
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

Variant = Sequence[Intervention]
DEFAULT_BATCH_BYTES = 2**28
"""Bytes that the rows of one batch may take, unless `most_bytes` is given."""


@dataclass(frozen=True)
class Cost:
    """What a job takes: cells to run, cells that nothing can change, batches, and the largest batch's bytes.

    `flops` are multiplications and additions in the matrices of the layers and the unembedding, without attention's
    own; `naive_flops` are those of a whole forward for every cell. Costs add up.
    """

    cells: int = 0
    unchanged: int = 0
    batches: int = 0
    bytes: int = 0
    flops: int = 0
    naive_flops: int = 0

    waves = rename_attribute("waves", "batches")

    def __add__(self, other: "Cost") -> "Cost":
        sums = {name: getattr(self, name) + getattr(other, name) for name in vars(self)}
        # batches run one after the other, so memory is that of the largest
        return Cost(**sums | {"bytes": max(self.bytes, other.bytes)})


NO_COST = Cost()


@dataclass(frozen=True, eq=False, kw_only=True)
class CompiledGroup:
    """The cells of prompts of one length: those to run, and those that no write can change."""

    base: BaseRuns
    cells: list[Cell]
    unchanged: list[Cell]


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredCells:
    """Cells that have been run, one batch of them: the metric of each, and whether its edits changed any number."""

    variants: Int[Tensor, "cell"]
    examples: Int[Tensor, "cell"]
    metrics: Float[Tensor, "cell"]
    changed: Bool[Tensor, "cell"]

    @staticmethod
    def from_cells(cells: Sequence[Cell], metrics: Tensor, changed: Tensor) -> "MeasuredCells":
        indices = torch.tensor([(cell.variant, cell.example) for cell in cells], device=metrics.device)
        return MeasuredCells(variants=indices[:, 0], examples=indices[:, 1], metrics=metrics, changed=changed)

    def __len__(self) -> int:
        return len(self.metrics)


@dataclass
class EvaluationJob:
    """Variants of prompts to run and measure.

    Base runs are kept in `base_runs`, which several jobs may share; `recorded_points` are points that a later job with
    the same `base_runs` needs.
    """

    pairs: PromptPairs
    most_bytes: int = DEFAULT_BATCH_BYTES
    recorded_points: Sequence[str] = ()
    base_runs: dict[tuple[TokenIds, ...], BaseRuns] = field(default_factory=dict)
    compiler: InterventionCompiler = field(init=False)
    order: dict[str, int] = field(init=False)  # of every point in a forward
    cost_so_far: Cost = NO_COST

    def __post_init__(self) -> None:
        self.compiler = InterventionCompiler(self.lens)
        self.order = {name: i for i, name in enumerate(self.compiler.resolver.points)}

    @property
    def lens(self) -> Lens:
        return self.pairs.lens

    def measure_baseline(self) -> Float[Tensor, "example"]:
        """Return the metric of the prompts without any edit."""
        out = torch.zeros(len(self.pairs), device=self.lens.device, dtype=torch.float64)
        for group in self.split_groups():
            base = self.run_base(group, [])
            out[base.example_indices] = self.measure_unchanged(base).double()
        return out

    def measure_unchanged(self, base: BaseRuns) -> Float[Tensor, "example"]:
        """Return the metric of base runs without any edit."""
        return self.run_batch(base, make_unchanged_batch(base, self.lens.cfg.n_layers))[0]

    def run_batch(self, base: BaseRuns, batch: PackedBatch) -> tuple[Float[Tensor, "cell"], Bool[Tensor, "cell"]]:
        """Run a batch as the engine does; raise CheckpointError for a metric that is nan because a weight is."""
        metrics, changed = run_packed(self.lens.model, base=base, batch=batch, metric=self.pairs.metric)
        self.lens.check_weights_finite(metrics)
        return metrics, changed

    def run_variants(
        self, variants: Sequence[Variant], todo: Bool[Tensor, "variant example"]
    ) -> Iterator[MeasuredCells]:
        """Run the cells that are True in `todo`, batch after batch."""
        for group in self.compile_cells(variants, todo):
            base = group.base
            if group.unchanged:
                # Cells that no write can change have the metric of their base run.
                metrics = self.measure_unchanged(base)
                self.cost_so_far += self.cost_of_unchanged(len(group.unchanged), base)
                rows = torch.tensor([cell.row for cell in group.unchanged], device=self.lens.device)
                yield MeasuredCells.from_cells(group.unchanged, metrics[rows], torch.zeros_like(rows, dtype=torch.bool))
            for batch in self.pack_cells(base, group.cells):
                metrics, changed = self.run_batch(base, batch)
                self.cost_so_far += self.cost_of_batch(batch, base.tokens.shape[1])
                yield MeasuredCells.from_cells(batch.cells, metrics, changed)

    def estimate_cost(self, variants: Sequence[Variant]) -> Cost:
        """Return what `run_variants` would take; only the prompts themselves are run."""
        total = NO_COST
        everything = torch.ones(len(variants), len(self.pairs), dtype=torch.bool)
        for group in self.compile_cells(variants, everything):
            total += self.cost_of_unchanged(len(group.unchanged), group.base)
            for batch in self.pack_cells(group.base, group.cells):
                total += self.cost_of_batch(batch, group.base.tokens.shape[1])
        return total

    def cost_of_unchanged(self, n: int, base: BaseRuns) -> Cost:
        """Return the cost of n cells that nothing can change: none, beside a whole forward for each."""
        return Cost(unchanged=n, naive_flops=n * self.count_flops(0, base.tokens.shape[1], all_logits=True))

    def cost_of_batch(self, batch: PackedBatch, length: int) -> Cost:
        """Return the cost of one batch of prompts of this length."""
        flops = sum(self.count_flops(cell.start_layer, length - cell.first_position) for cell in batch.cells)
        row_bytes = estimate_row_bytes(self.lens.model, batch.width, batch.past_length, self.lens.dtype)
        return Cost(
            cells=len(batch.cells),
            batches=1,
            bytes=len(batch.row_start_layers) * row_bytes,
            flops=flops,
            naive_flops=len(batch.cells) * self.count_flops(0, length, all_logits=True),
        )

    def count_flops(self, start: int, positions: int, *, all_logits: bool = False) -> int:
        """Return the flops of one run from a layer on over so many positions; by default of the logits read alone."""
        cfg, metric = self.lens.cfg, self.pairs.metric
        layer = sum(p.numel() for p in self.lens.model.blocks[0].parameters() if p.ndim == 2)
        everywhere = all_logits or metric.everywhere
        columns = cfg.d_logits if all_logits or metric.columns is None else len(metric.columns)
        read = positions if everywhere else 1
        # In the last layer, positions that the metric does not read need keys and values alone.
        kv_only = 2 * cfg.d_model * cfg.n_kv_heads * cfg.d_head
        unread = 0 if everywhere or start == cfg.n_layers else (positions - 1) * (layer - kv_only)
        return 2 * ((cfg.n_layers - start) * positions * layer - unread + read * columns * cfg.d_model)

    # ---- compile: from variants to cells ----

    def split_groups(self) -> list[list[int]]:
        """Return the indices of prompts of one length, as many together as `most_bytes` lets be recorded."""
        cfg, groups = self.lens.cfg, list[list[int]]()
        for length, same in self.pairs.group_by_length().items():
            # per layer and position: keys and values, and the residual streams
            entry = 2 * cfg.n_kv_heads * cfg.d_head + 3 * cfg.d_model
            example_bytes = length * cfg.n_layers * entry * self.lens.dtype.itemsize
            group_size = max(1, self.most_bytes // example_bytes)
            groups += [same[i : i + group_size] for i in range(0, len(same), group_size)]
        return groups

    def run_base(
        self, group: Sequence[int], names: Sequence[str], prompts: Sequence[TokenIds] | None = None
    ) -> BaseRuns:
        """Run a group of prompts (by default those to be changed) and record the points `names`.

        The runs are kept for later calls where all prompts are one group.
        """
        rows = tuple((self.pairs.prompts if prompts is None else prompts)[i] for i in group)
        if rows in self.base_runs and set(names) <= self.base_runs[rows].values.keys():
            return self.base_runs[rows]
        names = list(dict.fromkeys([*names, *self.recorded_points]))
        tokens = torch.tensor(rows, device=self.lens.device)
        base = BaseRuns.record(self.lens, tokens, torch.tensor(group, device=self.lens.device), names)
        if len(group) == len(self.pairs):
            self.base_runs[rows] = base
        return base

    def compile_cells(
        self, variants: Sequence[Variant], todo: Bool[Tensor, "variant example"]
    ) -> Iterator[CompiledGroup]:
        """Run the base runs of prompts of one length and compile their cells, group after group."""
        everything = dict.fromkeys(one for variant in variants for one in variant)
        swaps = [one.site for one in everything if one.do == Swap()]
        if swaps and self.pairs.sources is None:
            raise PatchError("Swap() is the value of the other run: give source prompts, or Swap.of_prompt")
        names = list(dict.fromkeys(name for site in swaps for name in self.compiler.resolver.resolve_names(site)))
        for group in self.split_groups():
            wanted = [(v, row) for v in range(len(variants)) for row in range(len(group)) if bool(todo[v, group[row]])]
            if wanted:
                yield self.compile_group(variants, group, wanted, everything, names)

    def compile_group(
        self,
        variants: Sequence[Variant],
        group: Sequence[int],
        wanted: Sequence[tuple[int, int]],
        interventions: Sequence[Intervention] | dict[Intervention, None],
        names: Sequence[str],
    ) -> CompiledGroup:
        """Return the cells of a group for the (variant, row of the group) wanted; `names` are points of Swap()."""
        n_layers, length = self.lens.cfg.n_layers, len(self.pairs.prompts[group[0]])
        self.compiler.record_sources(interventions, length)
        base = self.run_base(group, names)
        source_values = self.record_source_values(base, group, names)
        cells, unchanged = list[Cell](), list[Cell]()
        compiled: dict[tuple[Intervention, tuple[tuple[str, int], ...]], list[Write]] = {}
        for v, row in wanted:
            example = group[row]
            writes = self.drop_idle_positions(
                [
                    bound
                    for one in variants[v]
                    for write in self.compile_once(one, example, length, compiled)
                    for bound in [self.bind_source(one, write, row, base, source_values)]
                ]
            )
            cell = Cell.from_writes(
                variant=v, example=example, row=row, writes=writes, n_layers=n_layers, length=length
            )
            (cells if writes else unchanged).append(cell)
        return CompiledGroup(base=base, cells=cells, unchanged=unchanged)

    def record_source_values(self, base: BaseRuns, group: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """Return what the source runs have at the points named; before their first different token, the base's own."""
        if not names:
            return {}
        assert self.pairs.sources is not None
        source = self.run_base(group, names, self.pairs.sources)
        # By causality values are equal over the shared prefix but for rounding; taken from the base run they are
        # equal bit for bit, so that positions there count as unchanged.
        same = (source.tokens == base.tokens).int().cumprod(1).bool()
        return {name: keep_shared_prefix(source.values[name], base.values[name], same) for name in names}

    def compile_once(
        self,
        intervention: Intervention,
        example: int,
        length: int,
        compiled: dict[tuple[Intervention, tuple[tuple[str, int], ...]], list[Write]],
    ) -> list[Write]:
        """Return the writes of an intervention in an example; examples with equal named positions share them."""
        position_names = self.pairs.position_names[example]
        key = (intervention, tuple(position_names.items()))
        if key not in compiled:
            compiled[key] = self.compiler.compile_writes(intervention, length, position_names)
        return compiled[key]

    def bind_source(
        self, intervention: Intervention, write: Write, row: int, base: BaseRuns, source_values: Mapping[str, Tensor]
    ) -> tuple[Write, Tensor]:
        """Return the write with its source value, and the positions at which it may change the base run.

        Of `Swap()` these are the positions at which the source run has another value; of other changes all of them.
        """
        positions = write.positions
        assert positions is not None
        if intervention.do != Swap():
            return write, positions
        value, base_value = source_values[write.name][row], base.values[write.name][row]
        source = repeat_kv(value[None], self.lens.cfg.n_groups)[0] if write.by_query_head else value
        differs = (value[positions] != base_value[positions]).flatten(1).any(1)
        return replace(write, source=source), positions[differs]

    def drop_idle_positions(self, writes: Sequence[tuple[Write, Tensor]]) -> list[Write]:
        """Return the writes without the positions at which they put in what is there already.

        A base run's value is there as long as no write before it has changed anything: that is, before the first
        position of any write, and, at every position, before the first point of any write.
        """
        if len(writes) == 1:  # nothing can have been changed before it
            return [write.with_positions(at) for write, at in writes if len(at)]
        refuse_mixed([write for write, _ in writes])
        effective = [(self.order[write.name], int(at[0])) for write, at in writes if len(at)]
        if not effective:
            return []
        first_point = min(order for order, _ in effective)
        first_position = min(position for _, position in effective)
        needed = []
        for write, at in writes:
            if write.do == Swap() and self.order[write.name] >= first_point:
                # The value there may have been changed by an earlier write, so Swap() must put its own in again.
                assert write.positions is not None
                at = write.positions[write.positions >= first_position]
            if len(at):
                needed.append(write.with_positions(at))
        return needed

    def pack_cells(self, base: BaseRuns, cells: Sequence[Cell]) -> Iterator[PackedBatch]:
        """Pack cells of one group into batches of at most `most_bytes`."""

        def row_bytes(width: int, past_length: int) -> int:
            return estimate_row_bytes(self.lens.model, width, past_length, self.lens.dtype)

        return pack_batches(cells, base.tokens.shape[1], self.lens.cfg.n_layers, self.most_bytes, row_bytes)


def keep_shared_prefix(value: Tensor, base: Tensor, same: Bool[Tensor, "example pos"]) -> Tensor:
    """Return `value` [example, pos, rest] with the base's numbers where tokens so far are the same."""
    return torch.where(same.view(*same.shape, *[1] * (value.ndim - 2)), base, value)


def as_variants(variants: Any) -> list[list[Intervention]]:
    """Return variants as lists; raise PatchError for interventions that are not in a list of their own."""
    if isinstance(variants, Intervention | str | bytes | Mapping) or any(isinstance(v, Intervention) for v in variants):
        raise PatchError("variants are lists of interventions that hold together: [[one], [another], [one, another]]")
    return [as_interventions(variant) for variant in variants]


@rename_keyword("names", "position_names")
def evaluate(
    lens: Lens,
    prompts: Prompt | Examples,
    variants: Sequence[Variant] | Any,
    metric: Any = None,
    *,
    sources: Prompt | str | None = None,
    position_names: Sequence[PositionNames] | PositionNames | Any = (),
    allow: str | Sequence[str] = (),
    most_bytes: int = DEFAULT_BATCH_BYTES,
    progress: bool = True,
) -> Float[Tensor, "variant example"]:
    """Return the metric of every prompt under every variant, a list of interventions that hold together.

    Interventions hold as in `run_with_interventions`: in the order of the forward, and at one point in the order given.
    `sources` are the runs that `Swap()` takes values from. With a task's Examples as `prompts`, the metric is theirs,
    positions have their names and `sources` may name a counterfactual. `metric` is (right, wrong), Examples, a Metric
    or a function of the last logits, fn(logits [row, vocab]) -> [row]. Raise PatchError for a variant that changes
    nothing in any prompt, unless allow="no change".
    """
    variants, allow = as_variants(variants), read_allowed_effects(allow)
    pairs = PromptPairs.build(
        lens, prompts, sources, metric, position_names=position_names, nouns=("prompts", "sources")
    )
    job = EvaluationJob(pairs, most_bytes)
    out = torch.full((len(variants), len(pairs)), torch.nan, dtype=torch.float64, device=lens.device)
    changed = torch.zeros_like(out, dtype=torch.bool)
    todo = torch.ones(out.shape, dtype=torch.bool)
    with tqdm(total=out.numel(), disable=not progress, unit="cell", leave=False) as bar:
        for done in job.run_variants(variants, todo):
            out[done.variants, done.examples] = done.metrics.double()
            changed[done.variants, done.examples] = done.changed
            bar.update(len(done))
    require_effect(variants, changed, allow)
    return out


def require_effect(
    variants: Sequence[Variant], changed: Bool[Tensor, "variant example"], allow: str | Sequence[str]
) -> None:
    """Raise PatchError for variants that changed nothing in any example, unless "no change" is allowed."""
    idle = [v for v in range(len(variants)) if variants[v] and not bool(changed[v].any())]
    if idle and "no change" not in read_allowed_effects(allow):
        first = "; ".join(map(str, variants[idle[0]]))
        raise PatchError(
            f"{len(idle)} of {len(variants)} variants changed nothing: {first}. If meant, allow='no change'"
        )
