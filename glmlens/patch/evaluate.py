"""What interventions do to a metric, for many prompts and many variants at once."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from glmlens.lens import Lens
from glmlens.patch.changes import Ids, Swap, ids
from glmlens.patch.engine import Base, through, unchanged
from glmlens.patch.interventions import (
    Compiler,
    Intervention,
    Write,
    as_interventions,
    position_names,
    refuse_mixed,
)
from glmlens.patch.metrics import Metric, as_metric
from glmlens.patch.running import allowed
from glmlens.patch.sites import PatchError, ungrouped
from glmlens.patch.waves import Cell, Wave, row_bytes, waves
from glmlens.prompt import Prompt
from glmlens.tasks.task import Examples

Names = Mapping[str, int]
Variant = Sequence[Intervention]
BUDGET = 2**28
"""Bytes that the rows of one wave may weigh, unless told otherwise."""


@dataclass(frozen=True)
class Cost:
    """What a job takes: cells to run, cells that nothing can change, passes of waves, and the largest wave's bytes.

    `flops` are multiplications and additions in the matrices of the layers and the unembedding, without attention's
    own; `naive_flops` are those of a whole forward for every cell.
    """

    cells: int
    unchanged: int
    waves: int
    bytes: int
    flops: int
    naive_flops: int

    def __add__(self, other: "Cost") -> "Cost":
        sums = {name: getattr(self, name) + getattr(other, name) for name in vars(self)}
        return Cost(**sums | {"bytes": max(self.bytes, other.bytes)})


NOTHING = Cost(0, 0, 0, 0, 0, 0)


@dataclass
class Job:
    """Variants of prompts to be measured: which prompts, against which other runs, and how.

    `names` are the named positions of every prompt, or of all when they are the same. Raises PatchError for other
    numbers of prompts, sources and names, and for sources of another length.
    """

    lens: Lens
    prompts: Sequence[Ids]
    metric: Metric
    sources: Sequence[Ids] | None = None
    names: Sequence[Names] | Names | Any = ()
    most_bytes: int = BUDGET
    watched: Sequence[str] = ()  # points that a later job with the same `bases` will ask for
    bases: dict[tuple[Ids, ...], Base] = field(default_factory=dict)
    compiler: Compiler = field(init=False)
    positions: list[dict[str, int]] = field(init=False)  # of every prompt by name
    order: dict[str, int] = field(init=False)  # of every point in a forward
    spent: Cost = NOTHING

    def __post_init__(self) -> None:
        self.compiler = Compiler(self.lens)
        names = [self.names] * len(self.prompts) if isinstance(self.names, Mapping) else list(self.names)
        for what, given in (("names of positions", names), ("sources", self.sources)):
            if given and len(given) != len(self.prompts):
                raise PatchError(f"{len(self.prompts)} prompts and {len(given)} {what}: give one for every prompt")
        given = zip(names or [{}] * len(self.prompts), self.prompts, strict=True)
        self.positions = [position_names(named, len(prompt)) for named, prompt in given]
        for prompt, source in zip(self.prompts, self.sources or self.prompts, strict=True):
            if len(prompt) != len(source):
                raise PatchError(lengths_differ(self.lens, prompt, source))
        self.order = {name: i for i, name in enumerate(self.compiler.atlas.points)}

    def baseline(self) -> Float[Tensor, "example"]:
        """The metric of the prompts as they are."""
        out = torch.zeros(len(self.prompts), device=self.lens.device, dtype=torch.float64)
        for group in self.groups():
            base = self.base(group, [])
            wave = unchanged(base, self.lens.cfg.n_layers)
            out[base.numbers] = self.through(base, wave)[0].double()
        return out

    def through(self, base: Base, wave: Wave) -> tuple[Float[Tensor, "cell"], Bool[Tensor, "cell"]]:
        """As of the engine; CheckpointError where it comes to no number because a weight is none."""
        values, changed = through(self.lens.model, base, wave, self.metric)
        self.lens.blame_weights(values)
        return values, changed

    def run(
        self, variants: Sequence[Variant], todo: Bool[Tensor, "variant example"]
    ) -> Iterator[tuple[Int[Tensor, "done"], Int[Tensor, "done"], Float[Tensor, "done"], Bool[Tensor, "done"]]]:
        """Wave after wave: variant and example of what is done, its metric, and whether anything was changed."""
        for base, cells, where, still in self.prepared(variants, todo):
            if len(still):
                plain = self.through(base, unchanged(base, self.lens.cfg.n_layers))[0]
                self.spent += self.still(len(still), base)
                local = torch.tensor([base.numbers.tolist().index(e) for _, e in still], device=self.lens.device)
                yield *self.indices(still), plain[local], torch.zeros_like(local, dtype=torch.bool)
            for wave in self.waves(base, cells):
                values, changed = self.through(base, wave)
                self.spent += self.cost_of(wave, base.tokens.shape[1])
                yield *self.indices([where[id(cell)] for cell in wave.cells]), values, changed

    def cost(self, variants: Sequence[Variant]) -> Cost:
        """What `run` would take, found without running more than the prompts themselves."""
        total, everything = NOTHING, torch.ones(len(variants), len(self.prompts), dtype=torch.bool)
        for base, cells, _, still in self.prepared(variants, everything):
            total += self.still(len(still), base)
            for wave in self.waves(base, cells):
                total += self.cost_of(wave, base.tokens.shape[1])
        return total

    def still(self, n: int, base: Base) -> Cost:
        """What n cells take that nothing can change."""
        return Cost(0, n, 0, 0, 0, n * self.flops(0, base.tokens.shape[1], True))

    def cost_of(self, wave: Wave, length: int) -> Cost:
        needed = sum(self.flops(cell.start, length - cell.first) for cell in wave.cells)
        weight = len(wave.starts) * row_bytes(self.lens.model, wave.width, wave.past, self.lens.dtype)
        return Cost(len(wave.cells), 0, 1, weight, needed, len(wave.cells) * self.flops(0, length, True))

    def flops(self, start: int, positions: int, all_logits: bool = False) -> int:
        """Of one run from a layer on over so many positions; of the last layer's, only what the metric can see."""
        layer = sum(p.numel() for p in self.lens.model.blocks[0].parameters() if p.ndim == 2)
        cfg, everywhere = self.lens.cfg, all_logits or self.metric.everywhere
        columns = cfg.d_logits if all_logits or self.metric.columns is None else len(self.metric.columns)
        read = positions if everywhere else 1
        kv_only = 2 * cfg.d_model * cfg.n_kv_heads * cfg.d_head
        unseen = 0 if everywhere or start == cfg.n_layers else (positions - 1) * (layer - kv_only)
        return 2 * ((cfg.n_layers - start) * positions * layer - unseen + read * columns * cfg.d_model)

    # ---- how ----

    def groups(self) -> list[list[int]]:
        """Numbers of examples of one length, as many together as the budget lets be recorded."""
        cfg, found = self.lens.cfg, list[list[int]]()
        for length in sorted(set(map(len, self.prompts))):
            same = [i for i, prompt in enumerate(self.prompts) if len(prompt) == length]
            one = length * cfg.n_layers * (2 * cfg.n_kv_heads * cfg.d_head + 3 * cfg.d_model) * self.lens.dtype.itemsize
            many = max(1, self.most_bytes // one)
            found += [same[i : i + many] for i in range(0, len(same), many)]
        return found

    def base(self, group: Sequence[int], names: Sequence[str], prompts: Sequence[Ids] | None = None) -> Base:
        """The runs of a group of prompts; kept, where all prompts are one group, for whoever asks again."""
        rows = tuple((self.prompts if prompts is None else prompts)[i] for i in group)
        if rows in self.bases and set(names) <= self.bases[rows].values.keys():
            return self.bases[rows]
        names = list(dict.fromkeys([*names, *self.watched]))
        tokens = torch.tensor(rows, device=self.lens.device)
        base = Base.of(self.lens, tokens, torch.tensor(group, device=self.lens.device), names)
        if len(group) == len(self.prompts):
            self.bases[rows] = base
        return base

    def prepared(
        self, variants: Sequence[Variant], todo: Bool[Tensor, "variant example"]
    ) -> Iterator[tuple[Base, list[Cell], dict[int, tuple[int, int]], list[tuple[int, int]]]]:
        """For prompts of one length: the base, the cells to run, which each is, and those that nothing changes."""
        everything = dict.fromkeys(one for variant in variants for one in variant)
        swaps = [one.site for one in everything if one.do == Swap()]
        if swaps and self.sources is None:
            raise PatchError("Swap() is the value of the other run: give source prompts, or Swap.of_prompt")
        names = list(dict.fromkeys(name for site in swaps for name in self.compiler.atlas.names(site)))
        for group in self.groups():
            wanted = [(v, i) for v in range(len(variants)) for i in range(len(group)) if bool(todo[v, group[i]])]
            if not wanted:
                continue
            self.compiler.prepare(everything, len(self.prompts[group[0]]))
            base = self.base(group, names)
            others = self.others(base, group, names)
            cells, where, still = list[Cell](), dict[int, tuple[int, int]](), list[tuple[int, int]]()
            compiled: dict[tuple[Intervention, tuple], list[Write]] = {}
            for v, i in wanted:
                found = [pair for one in variants[v] for pair in self.writes(one, group[i], i, base, others, compiled)]
                writes = self.needed(found)
                if writes:
                    cells.append(Cell.of(i, writes, self.lens.cfg.n_layers))
                    where[id(cells[-1])] = (v, group[i])
                else:
                    still.append((v, group[i]))
            yield base, cells, where, still

    def others(self, base: Base, group: Sequence[int], names: Sequence[str]) -> dict[str, Tensor]:
        """What the other runs have at the points named; before their first different token, the base's own."""
        if not names:
            return {}
        assert self.sources is not None
        other = self.base(group, names, self.sources)
        same = (other.tokens == base.tokens).int().cumprod(1).bool()  # causality: equal there but for rounding
        return {name: alike(other.values[name], base.values[name], same) for name in names}

    def writes(
        self, one: Intervention, number: int, i: int, base: Base, others: Mapping[str, Tensor], compiled: dict
    ) -> list[tuple[Write, Tensor]]:
        """The writes of an intervention in an example, each with the positions at which it may change the base run."""
        key = (one, tuple(self.positions[number].items()))
        if key not in compiled:
            compiled[key] = self.compiler.writes(one, base.tokens.shape[1], self.positions[number])
        if one.do != Swap():
            return [(write, write.positions) for write in compiled[key]]
        return [self.swap(write, i, base, others) for write in compiled[key]]

    def swap(self, write: Write, i: int, base: Base, others: Mapping[str, Tensor]) -> tuple[Write, Tensor]:
        value, here, at = others[write.name][i], base.values[write.name][i], write.positions
        assert at is not None
        kept = ungrouped(value[None], self.lens.cfg.n_groups)[0] if write.ungrouped else value
        return replace(write, kept=kept), at[(value[at] != here[at]).flatten(1).any(1)]

    def needed(self, writes: Sequence[tuple[Write, Tensor]]) -> list[Write]:
        """The writes without the positions at which they put what is there already.

        A value of the base run is there as long as no write before it has changed anything: not before the first
        position of any, nor, at any position, before the first point of any.
        """
        if len(writes) == 1:  # nothing can have been changed before it
            return [write.at(at) for write, at in writes if len(at)]
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
                kept.append(write.at(at))
        return kept

    def waves(self, base: Base, cells: Sequence[Cell]) -> Iterator[Wave]:
        def weight(width: int, past: int) -> int:
            return row_bytes(self.lens.model, width, past, self.lens.dtype)

        return waves(cells, base.tokens.shape[1], self.lens.cfg.n_layers, self.most_bytes, weight)

    def indices(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        both = torch.tensor(pairs, device=self.lens.device)
        return both[:, 0], both[:, 1]


def alike(value: Tensor, base: Tensor, same: Bool[Tensor, "example pos"]) -> Tensor:
    return torch.where(same.view(*same.shape, *[1] * (value.ndim - 2)), base, value)


def lengths_differ(lens: Lens, one: Ids, other: Ids) -> str:
    """Both tokenisations under each other, for prompts of different length."""
    rows = [lens.to_labels(torch.tensor([row], device=lens.device)) for row in (one, other)]
    longest = max(map(len, rows))
    padded = [row + [""] * (longest - len(row)) for row in rows]
    widths = [max(map(len, pair)) for pair in zip(*padded, strict=True)]
    lines = ["  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in padded]
    differ = next((i for i, (a, b) in enumerate(zip(*padded, strict=True)) if a != b), 0)
    return (
        f"the two prompts have {len(one)} and {len(other)} tokens, and differ from token {differ} on; a value is put "
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
    names: Sequence[Names] | Names | Any = (),
    allow: str | Sequence[str] = (),
    most_bytes: int = BUDGET,
    progress: bool = True,
) -> Float[Tensor, "variant example"]:
    """The metric of every prompt under every variant, a list of interventions that hold together.

    They hold as in `run`: in the order of the forward, and at one point in the order given. `sources` are the runs that
    `Swap()` takes values from. With a task's Examples as `prompts`, the metric is theirs, positions have their names
    and `sources` may name a counterfactual. `metric` is (right, wrong), Examples, a Metric or a function of the last
    logits, fn(logits [row, vocab]) -> [row]. Raises PatchError for a variant that changes nothing in any prompt, unless
    allow="no change".
    """
    prompts, sources, metric, names = of_task(prompts, sources, metric, names)
    rows, variants = ids(lens, prompts), as_variants(variants)
    allow = allowed(allow)
    others = None if sources is None else ids(lens, sources)
    job = Job(lens, rows, as_metric(metric, lens, len(rows)), others, names, most_bytes)
    out = torch.full((len(variants), len(rows)), torch.nan, dtype=torch.float64, device=lens.device)
    moved = torch.zeros_like(out, dtype=torch.bool)
    with tqdm(total=out.numel(), disable=not progress, unit="cell", leave=False) as bar:
        for variant, example, values, changed in job.run(variants, torch.ones_like(out, dtype=torch.bool).cpu()):
            out[variant, example], moved[variant, example] = values.double(), changed
            bar.update(len(values))
    refuse_idle(variants, moved, allow)
    return out


def refuse_idle(
    variants: Sequence[Variant], moved: Bool[Tensor, "variant example"], allow: str | Sequence[str]
) -> None:
    """Raise PatchError for variants that changed nothing in any example, unless "no change" is allowed."""
    idle = [v for v in range(len(variants)) if variants[v] and not bool(moved[v].any())]
    if idle and "no change" not in allowed(allow):
        said = "; ".join(map(str, variants[idle[0]]))
        raise PatchError(
            f"{len(idle)} of {len(variants)} variants changed nothing: {said}. If meant, allow='no change'"
        )
