"""What interventions do to a metric, for many prompts and many variants at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from glmlens.lens import Lens
from glmlens.patch.apply import allowed
from glmlens.patch.engine import BaseRuns, make_unchanged_batch, run_packed
from glmlens.patch.interventions import (
    Intervention,
    InterventionCompiler,
    Write,
    as_interventions,
    read_position_names,
    refuse_mixed,
)
from glmlens.patch.metrics import Metric, as_metric
from glmlens.patch.packing import Cell, PackedBatch, estimate_row_bytes, pack_batches
from glmlens.patch.sites import PatchError, repeat_kv
from glmlens.patch.values import Swap, TokenIds, to_token_ids
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

PositionNames = Mapping[str, int]
Variant = Sequence[Intervention]
DEFAULT_BATCH_BYTES = 2**28
"""Bytes that the rows of one wave may weigh, unless told otherwise."""


@dataclass(frozen=True)
class Cost:
    """What a job takes: cells to run, cells that nothing can change, passes of waves, and the largest wave's bytes.

    `flops` are multiplications and additions in the matrices of the layers and the unembedding, without attention's
    own; `naive_flops` are those of a whole forward for every cell.
    """

    cells: int
    unchanged: int
    batches: int
    bytes: int
    flops: int
    naive_flops: int

    def __add__(self, other: "Cost") -> "Cost":
        sums = {name: getattr(self, name) + getattr(other, name) for name in vars(self)}
        return Cost(**sums | {"bytes": max(self.bytes, other.bytes)})


NO_COST = Cost(0, 0, 0, 0, 0, 0)


@dataclass
class EvaluationJob:
    """Variants of prompts to be measured: which prompts, against which other runs, and how.

    `names` are the named positions of every prompt, or of all when they are the same. Raises PatchError for other
    numbers of prompts, sources and names, and for sources of another length.
    """

    lens: Lens
    prompts: Sequence[TokenIds]
    metric: Metric
    sources: Sequence[TokenIds] | None = None
    position_names: Sequence[PositionNames] | PositionNames | Any = ()
    most_bytes: int = DEFAULT_BATCH_BYTES
    recorded_points: Sequence[str] = ()  # points that a later job with the same `bases` will ask for
    base_runs: dict[tuple[TokenIds, ...], BaseRuns] = field(default_factory=dict)
    compiler: InterventionCompiler = field(init=False)
    positions: list[dict[str, int]] = field(init=False)  # of every prompt by name
    order: dict[str, int] = field(init=False)  # of every point in a forward
    cost_so_far: Cost = NO_COST

    def __post_init__(self) -> None:
        self.compiler = InterventionCompiler(self.lens)
        names = (
            [self.position_names] * len(self.prompts)
            if isinstance(self.position_names, Mapping)
            else list(self.position_names)
        )
        for what, given in (("names of positions", names), ("sources", self.sources)):
            if given and len(given) != len(self.prompts):
                raise PatchError(f"{len(self.prompts)} prompts and {len(given)} {what}: give one for every prompt")
        given = zip(names or [{}] * len(self.prompts), self.prompts, strict=True)
        self.positions = [read_position_names(named, len(prompt)) for named, prompt in given]
        for prompt, source in zip(self.prompts, self.sources or self.prompts, strict=True):
            if len(prompt) != len(source):
                raise PatchError(describe_length_mismatch(self.lens, prompt, source))
        self.order = {name: i for i, name in enumerate(self.compiler.resolver.points)}

    def measure_baseline(self) -> Float[Tensor, "example"]:
        """The metric of the prompts as they are."""
        out = torch.zeros(len(self.prompts), device=self.lens.device, dtype=torch.float64)
        for group in self.group_by_length():
            base = self.run_base(group, [])
            wave = make_unchanged_batch(base, self.lens.cfg.n_layers)
            out[base.example_indices] = self.run_batch(base, wave)[0].double()
        return out

    def run_batch(self, base: BaseRuns, batch: PackedBatch) -> tuple[Float[Tensor, "cell"], Bool[Tensor, "cell"]]:
        """As of the engine; CheckpointError where it comes to no number because a weight is none."""
        values, changed = run_packed(self.lens.model, base, batch, self.metric)
        self.lens.check_weights_finite(values)
        return values, changed

    def run_variants(
        self, variants: Sequence[Variant], todo: Bool[Tensor, "variant example"]
    ) -> Iterator[tuple[Int[Tensor, "done"], Int[Tensor, "done"], Float[Tensor, "done"], Bool[Tensor, "done"]]]:
        """Wave after wave: variant and example of what is done, its metric, and whether anything was changed."""
        for base, cells, where, still in self.compile_cells(variants, todo):
            if len(still):
                plain = self.run_batch(base, make_unchanged_batch(base, self.lens.cfg.n_layers))[0]
                self.cost_so_far += self.cost_of_unchanged(len(still), base)
                local = torch.tensor(
                    [base.example_indices.tolist().index(e) for _, e in still], device=self.lens.device
                )
                yield *self.to_index_tensors(still), plain[local], torch.zeros_like(local, dtype=torch.bool)
            for wave in self.pack_cells(base, cells):
                values, changed = self.run_batch(base, wave)
                self.cost_so_far += self.cost_of_batch(wave, base.tokens.shape[1])
                yield *self.to_index_tensors([where[id(cell)] for cell in wave.cells]), values, changed

    def estimate_cost(self, variants: Sequence[Variant]) -> Cost:
        """What `run` would take, found without running more than the prompts themselves."""
        total, everything = NO_COST, torch.ones(len(variants), len(self.prompts), dtype=torch.bool)
        for base, cells, _, still in self.compile_cells(variants, everything):
            total += self.cost_of_unchanged(len(still), base)
            for wave in self.pack_cells(base, cells):
                total += self.cost_of_batch(wave, base.tokens.shape[1])
        return total

    def cost_of_unchanged(self, n: int, base: BaseRuns) -> Cost:
        """What n cells take that nothing can change."""
        return Cost(0, n, 0, 0, 0, n * self.count_flops(0, base.tokens.shape[1], True))

    def cost_of_batch(self, batch: PackedBatch, length: int) -> Cost:
        needed = sum(self.count_flops(cell.start_layer, length - cell.first_position) for cell in batch.cells)
        weight = len(batch.row_start_layers) * estimate_row_bytes(
            self.lens.model, batch.width, batch.past_length, self.lens.dtype
        )
        return Cost(len(batch.cells), 0, 1, weight, needed, len(batch.cells) * self.count_flops(0, length, True))

    def count_flops(self, start: int, positions: int, all_logits: bool = False) -> int:
        """Of one run from a layer on over so many positions; of the last layer's, only what the metric can see."""
        layer = sum(p.numel() for p in self.lens.model.blocks[0].parameters() if p.ndim == 2)
        cfg, everywhere = self.lens.cfg, all_logits or self.metric.everywhere
        columns = cfg.d_logits if all_logits or self.metric.columns is None else len(self.metric.columns)
        read = positions if everywhere else 1
        kv_only = 2 * cfg.d_model * cfg.n_kv_heads * cfg.d_head
        unseen = 0 if everywhere or start == cfg.n_layers else (positions - 1) * (layer - kv_only)
        return 2 * ((cfg.n_layers - start) * positions * layer - unseen + read * columns * cfg.d_model)

    # ---- how ----

    def group_by_length(self) -> list[list[int]]:
        """Numbers of examples of one length, as many together as the budget lets be recorded."""
        cfg, found = self.lens.cfg, list[list[int]]()
        for length in sorted(set(map(len, self.prompts))):
            same = [i for i, prompt in enumerate(self.prompts) if len(prompt) == length]
            one = length * cfg.n_layers * (2 * cfg.n_kv_heads * cfg.d_head + 3 * cfg.d_model) * self.lens.dtype.itemsize
            many = max(1, self.most_bytes // one)
            found += [same[i : i + many] for i in range(0, len(same), many)]
        return found

    def run_base(
        self, group: Sequence[int], names: Sequence[str], prompts: Sequence[TokenIds] | None = None
    ) -> BaseRuns:
        """The runs of a group of prompts; kept, where all prompts are one group, for whoever asks again."""
        rows = tuple((self.prompts if prompts is None else prompts)[i] for i in group)
        if rows in self.base_runs and set(names) <= self.base_runs[rows].values.keys():
            return self.base_runs[rows]
        names = list(dict.fromkeys([*names, *self.recorded_points]))
        tokens = torch.tensor(rows, device=self.lens.device)
        base = BaseRuns.record(self.lens, tokens, torch.tensor(group, device=self.lens.device), names)
        if len(group) == len(self.prompts):
            self.base_runs[rows] = base
        return base

    def compile_cells(
        self, variants: Sequence[Variant], todo: Bool[Tensor, "variant example"]
    ) -> Iterator[tuple[BaseRuns, list[Cell], dict[int, tuple[int, int]], list[tuple[int, int]]]]:
        """For prompts of one length: the base, the cells to run, which each is, and those that nothing changes."""
        everything = dict.fromkeys(one for variant in variants for one in variant)
        swaps = [one.site for one in everything if one.do == Swap()]
        if swaps and self.sources is None:
            raise PatchError("Swap() is the value of the other run: give source prompts, or Swap.of_prompt")
        names = list(dict.fromkeys(name for site in swaps for name in self.compiler.resolver.resolve_names(site)))
        for group in self.group_by_length():
            wanted = [(v, i) for v in range(len(variants)) for i in range(len(group)) if bool(todo[v, group[i]])]
            if not wanted:
                continue
            self.compiler.record_sources(everything, len(self.prompts[group[0]]))
            base = self.run_base(group, names)
            others = self.record_sources(base, group, names)
            cells, where, still = list[Cell](), dict[int, tuple[int, int]](), list[tuple[int, int]]()
            compiled: dict[tuple[Intervention, tuple], list[Write]] = {}
            for v, i in wanted:
                found = [
                    pair
                    for one in variants[v]
                    for pair in self.compile_writes(one, group[i], i, base, others, compiled)
                ]
                writes = self.needed(found)
                if writes:
                    cells.append(Cell.from_writes(i, writes, self.lens.cfg.n_layers))
                    where[id(cells[-1])] = (v, group[i])
                else:
                    still.append((v, group[i]))
            yield base, cells, where, still

    def record_sources(self, base: BaseRuns, group: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """What the other runs have at the points named; before their first different token, the base's own."""
        if not names:
            return {}
        assert self.sources is not None
        other = self.run_base(group, names, self.sources)
        same = (other.tokens == base.tokens).int().cumprod(1).bool()  # causality: equal there but for rounding
        return {name: keep_shared_prefix(other.values[name], base.values[name], same) for name in names}

    def compile_writes(
        self,
        intervention: Intervention,
        example_index: int,
        i: int,
        base: BaseRuns,
        others: Mapping[str, Tensor],
        compiled: dict,
    ) -> list[tuple[Write, Tensor]]:
        """The writes of an intervention in an example, each with the positions at which it may change the base run."""
        key = (intervention, tuple(self.positions[example_index].items()))
        if key not in compiled:
            compiled[key] = self.compiler.compile_writes(
                intervention, base.tokens.shape[1], self.positions[example_index]
            )
        if intervention.do != Swap():
            return [(write, write.positions) for write in compiled[key]]
        return [self.bind_swap_source(write, i, base, others) for write in compiled[key]]

    def bind_swap_source(
        self, write: Write, i: int, base: BaseRuns, others: Mapping[str, Tensor]
    ) -> tuple[Write, Tensor]:
        value, here, at = others[write.name][i], base.values[write.name][i], write.positions
        assert at is not None
        kept = repeat_kv(value[None], self.lens.cfg.n_groups)[0] if write.by_query_head else value
        return replace(write, source=kept), at[(value[at] != here[at]).flatten(1).any(1)]

    def needed(self, writes: Sequence[tuple[Write, Tensor]]) -> list[Write]:
        """The writes without the positions at which they put what is there already.

        A value of the base run is there as long as no write before it has changed anything: not before the first
        position of any, nor, at any position, before the first point of any.
        """
        if len(writes) == 1:  # nothing can have been changed before it
            return [write.with_positions(at) for write, at in writes if len(at)]
        refuse_mixed([write for write, _ in writes])
        effective = [(self.order[write.name], int(at[0])) for write, at in writes if len(at)]
        if not effective:
            return []
        point, first = min(order for order, _ in effective), min(at for _, at in effective)
        kept = []
        for write, at in writes:
            if write.do == Swap():
                assert write.positions is not None
                later = self.order[write.name] >= point
                at = write.positions[write.positions >= first] if later else at
            if len(at):
                kept.append(write.with_positions(at))
        return kept

    def pack_cells(self, base: BaseRuns, cells: Sequence[Cell]) -> Iterator[PackedBatch]:
        def weight(width: int, past: int) -> int:
            return estimate_row_bytes(self.lens.model, width, past, self.lens.dtype)

        return pack_batches(cells, base.tokens.shape[1], self.lens.cfg.n_layers, self.most_bytes, weight)

    def to_index_tensors(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        both = torch.tensor(pairs, device=self.lens.device)
        return both[:, 0], both[:, 1]


def keep_shared_prefix(value: Tensor, base: Tensor, same: Bool[Tensor, "example pos"]) -> Tensor:
    return torch.where(same.view(*same.shape, *[1] * (value.ndim - 2)), base, value)


def describe_length_mismatch(lens: Lens, first_ids: TokenIds, second_ids: TokenIds) -> str:
    """Both tokenisations under each other, for prompts of different length."""
    rows = [lens.to_labels(torch.tensor([row], device=lens.device)) for row in (first_ids, second_ids)]
    longest = max(map(len, rows))
    padded = [row + [""] * (longest - len(row)) for row in rows]
    widths = [max(map(len, pair)) for pair in zip(*padded, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in padded]
    differ = next((i for i, (a, b) in enumerate(zip(*padded, strict=True)) if a != b), 0)
    return (
        f"the two prompts have {len(first_ids)} and {len(second_ids)} tokens, and differ from token {differ} on; a value is put "
        f"at its own position, so they must be as long:\n  {lines[0]}\n  {lines[1]}"
    )


def of_task(prompts: Any, others: Any, metric: Any, names: Any) -> tuple[Any, Any, Any, Any]:
    """Prompts, others, metric and names of positions, where a task's Examples bring those that are not given."""
    if isinstance(prompts, Examples):
        names = names or [{**example.positions} for example in prompts]
        metric = prompts if metric is None else metric
        others = prompts.counterfactual(others) if isinstance(others, str) else others
        prompts = prompts.tokens
    return prompts, others, metric, names


def as_variants(variants: Any) -> list[list[Intervention]]:
    """Variants as lists; PatchError for interventions that are not in a list of their own."""
    if isinstance(variants, Intervention | str | bytes | Mapping) or any(isinstance(v, Intervention) for v in variants):
        raise PatchError("variants are lists of interventions that hold together: [[one], [another], [one, another]]")
    return [as_interventions(variant) for variant in variants]


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
    """The metric of every prompt under every variant, a list of interventions that hold together.

    They hold as in `run`: in the order of the forward, and at one point in the order given. `sources` are the runs that
    `Swap()` takes values from. With a task's Examples as `prompts`, the metric is theirs, positions have their names
    and `sources` may name a counterfactual. `metric` is (right, wrong), Examples, a Metric or a function of the last
    logits, fn(logits [row, vocab]) -> [row]. Raises PatchError for a variant that changes nothing in any prompt, unless
    allow="no change".
    """
    prompts, sources, metric, position_names = of_task(prompts, sources, metric, position_names)
    rows, variants = to_token_ids(lens, prompts), as_variants(variants)
    allow = allowed(allow)
    others = None if sources is None else to_token_ids(lens, sources)
    job = EvaluationJob(lens, rows, as_metric(metric, lens, len(rows)), others, position_names, most_bytes)
    out = torch.full((len(variants), len(rows)), torch.nan, dtype=torch.float64, device=lens.device)
    moved = torch.zeros_like(out, dtype=torch.bool)
    with tqdm(total=out.numel(), disable=not progress, unit="cell", leave=False) as bar:
        for variant, example, values, changed in job.run_variants(
            variants, torch.ones_like(out, dtype=torch.bool).cpu()
        ):
            out[variant, example], moved[variant, example] = values.double(), changed
            bar.update(len(values))
    require_effect(variants, moved, allow)
    return out


def require_effect(
    variants: Sequence[Variant], changed: Bool[Tensor, "variant example"], allow: str | Sequence[str]
) -> None:
    """Raise PatchError for variants that changed nothing in any example, unless "no change" is allowed."""
    idle = [v for v in range(len(variants)) if variants[v] and not bool(changed[v].any())]
    if idle and "no change" not in allowed(allow):
        said = "; ".join(map(str, variants[idle[0]]))
        raise PatchError(
            f"{len(idle)} of {len(variants)} variants changed nothing: {said}. If meant, allow='no change'"
        )
