"""Run sweeps: the same change at every place of a grid, for many pairs of prompts, with error bars."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from glmlens.deprecated import rename_keyword
from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.patch.apply import read_allowed_effects
from glmlens.patch.evaluate import DEFAULT_BATCH_BYTES, NO_COST, Cost, EvaluationJob, MeasuredCells, require_effect
from glmlens.patch.interventions import Intervention, PositionNames
from glmlens.patch.metrics import Metric
from glmlens.patch.packed_runs import BaseRuns
from glmlens.patch.pairs import PromptPairs
from glmlens.patch.replacement_values import Apply, Change, Swap, TokenIds, as_change, name_of
from glmlens.patch.sites import PatchError, Site, SiteResolver
from glmlens.patch.sweep_axes import list_places, place_label, site_field
from glmlens.patch.sweep_checkpoint_keys import key_of, key_or_refuse
from glmlens.patch.sweep_checkpoints import SweepCheckpoint
from glmlens.results import Labelled, list_axes
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

DIRECTIONS = {"denoise": "corrupt run, clean values put in", "noise": "clean run, corrupt values put in"}
BOOTSTRAP_DRAWS = 1000


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Labelled):
    """A grid of effects: (metric of the changed run - base) / (other - base), means over pairs first.

    0 is the run that is changed and 1 the run that the values are from, or with `normalise=False` the plain metric.
    `raw[pair, ...]` are the metrics of the changed runs and `clean[pair]`, `corrupt[pair]` those of the plain ones.
    `low` and `high` bound 95 % of bootstrap means over pairs (nan for one pair). `floor` is the 95 % quantile of the
    magnitudes of effects with values from other pairs (nan without `null`). `unchanged[pair, ...]` is True where the
    change changed no number. Cells that were not run are nan; `finished` is False if there are any.
    """

    raw: Labelled = field(kw_only=True, repr=False)
    clean: np.ndarray = field(kw_only=True)
    corrupt: np.ndarray = field(kw_only=True)
    low: Labelled = field(kw_only=True, repr=False)
    high: Labelled = field(kw_only=True, repr=False)
    floor: Labelled = field(kw_only=True, repr=False)
    unchanged: Labelled = field(kw_only=True, repr=False)
    cost: Cost = field(kw_only=True, repr=False)
    finished: bool = field(kw_only=True, default=True)

    def keep(self, axis: str, places: Sequence[int]) -> Labelled:  # type: ignore[override]
        """Return some places along an axis, as plain labelled numbers."""
        return Labelled(self.values, self.axes, self.labels, self.about, chosen=self.chosen).keep(axis, places)


@rename_keyword("names", "position_names")
def sweep(
    lens: Lens,
    clean: Prompt | Examples,
    corrupt: Prompt | str | None,
    site: Site | str | Any,
    *,
    over: str | Sequence[str],
    metric: Any = None,
    do: Change | Any = None,
    direction: str = "denoise",
    position_names: Sequence[PositionNames] | PositionNames | Any = (),
    normalise: bool = True,
    null: Integer = 0,
    seed: Integer = 0,
    most_bytes: int = DEFAULT_BATCH_BYTES,
    checkpoint: str | Path | None = None,
    allow: str | Sequence[str] = (),
    progress: bool = True,
) -> Sweep:
    """Change a site place by place along the axes `over`, and measure each changed run.

    `clean` are prompts and `corrupt` as many others, each as long as its partner; with a task's Examples as `clean`,
    `corrupt` names a counterfactual, `metric` is theirs and positions have their names. `metric` is (right, wrong), a
    task's Examples, a Metric or a function of the last logits, fn(logits [row, vocab]) -> [row]. `over` are "layer" and
    axes of the point, ("layer", "pos") or "layer" alone; along each, the places that the site names, or all.
    `direction` is "denoise", "noise" or "both", an axis of its own. `do` is Swap(), the other run's value, unless
    given. For the floor, sources are exchanged between pairs `null` times.

    With a `checkpoint` file, finished cells are stored there and not run again. It is of one model, prompts, places,
    change, named positions and metric; functions count by their code, closure and globals. On KeyboardInterrupt a
    sweep returns what is finished.

    Raise PatchError for pairs of different length, for a place that is not there, for baselines too close to
    normalise by, for a checkpoint of another sweep or of a function that cannot be told from others, and for a sweep of
    which no cell changes anything unless allow="no change".
    """
    allow = read_allowed_effects(allow)
    null = read_integer(null, "null", least=0, error=PatchError)
    seed = read_integer(seed, "seed", least=0, error=PatchError)
    plan = SweepPlan.build(
        lens, clean, corrupt, site,
        over=over, metric=metric, do=do, direction=direction, position_names=position_names, most_bytes=most_bytes,
    )  # fmt: skip
    baselines = plan.measure_baselines(normalise)
    orders = shuffle_sources(plan.pairs, null, seed)
    if orders and plan.do != Swap():
        raise PatchError(f"a null floor exchanges the sources of Swap(), and {plan.do} has none: null=0")
    store = SweepCheckpoint.open(checkpoint, {} if checkpoint is None else plan.keys())
    grids = [DirectionGrid(direction, plan.empty_grid()) for direction in plan.directions]
    finished = False
    total = len(plan.variants) * len(plan.pairs) * len(plan.directions) * (1 + len(orders))
    with tqdm(total=total, disable=not progress, unit="cell", desc=str(plan.site)) as bar:
        try:
            for grid in grids:
                run_cells(plan, plan.pairs.orient(grid.direction), grid.cells, store, name=grid.direction, bar=bar)
            for order in orders:
                for grid in grids:
                    null_cells = plan.empty_grid()
                    grid.nulls.append(null_cells)
                    pairs = plan.pairs.orient(grid.direction).reorder_sources(order)
                    name = f"{grid.direction} null {key_of(tuple(order))[:16]}"
                    run_cells(plan, pairs, null_cells, store, name=name, bar=bar)
            finished = True
        except KeyboardInterrupt:
            bar.write(f"interrupted after {bar.n} of {total} cells")
    if finished:
        changed = torch.stack([grid.cells.changed for grid in grids]).any(0)
        if not bool(changed.any()):
            require_effect(plan.variants, changed, allow)
    return build_sweep(plan, grids, baselines, normalise=normalise, seed=seed, finished=finished)


@rename_keyword("names", "position_names")
def check_sweep(
    lens: Lens,
    clean: Prompt | Examples,
    corrupt: Prompt | str | None,
    site: Site | str | Any,
    *,
    over: str | Sequence[str],
    metric: Any = None,
    do: Change | Any = None,
    direction: str = "denoise",
    position_names: Sequence[PositionNames] | PositionNames | Any = (),
    most_bytes: int = DEFAULT_BATCH_BYTES,
) -> Cost:
    """Return what such a sweep would take; only the prompts themselves are run."""
    plan = SweepPlan.build(
        lens, clean, corrupt, site,
        over=over, metric=metric, do=do, direction=direction, position_names=position_names, most_bytes=most_bytes,
    )  # fmt: skip
    costs = [plan.make_job(plan.pairs.orient(way)).estimate_cost(plan.variants) for way in plan.directions]
    return sum(costs[1:], costs[0])


@dataclass(eq=False)
class CellGrid:
    """The metric of every cell, nan where it was not run, whether its change changed any number, and the cost."""

    values: Float[Tensor, "variant example"]
    changed: Bool[Tensor, "variant example"]
    cost: Cost = NO_COST

    def fill(self, done: MeasuredCells) -> None:
        """Put in the cells of one batch."""
        where = done.variants.cpu(), done.examples.cpu()
        self.values[where] = done.metrics.double().cpu()
        self.changed[where] = done.changed.cpu()


def run_cells(
    plan: "SweepPlan", pairs: PromptPairs, cells: CellGrid, store: SweepCheckpoint, *, name: str, bar: Any
) -> None:
    """Fill the grid with the cells stored under `name`, then run those that are missing, storing after each batch."""
    cells.values, cells.changed = store.load_cells(name, cells.values, cells.changed)
    todo = cells.values.isnan()
    bar.update(int((~todo).sum()))
    job = plan.make_job(pairs)
    for done in job.run_variants(plan.variants, todo):
        cells.fill(done)
        store.save_cells(name, cells.values, cells.changed)
        bar.update(len(done))
    cells.cost = job.cost_so_far


@dataclass(frozen=True, eq=False, kw_only=True)
class Baselines:
    """The metric of the clean and of the corrupt run of every pair."""

    clean: Float[np.ndarray, "pair"]
    corrupt: Float[np.ndarray, "pair"]

    def orient(self, direction: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the metrics of the run that is changed and of the run that values come from."""
        return (self.clean, self.corrupt) if direction == "noise" else (self.corrupt, self.clean)


@dataclass(frozen=True, eq=False, kw_only=True)
class SweepPlan:
    """A sweep whose arguments have been read: pairs, grid, variants and labels.

    `base_runs` are shared by all its jobs: both directions need the same runs.
    """

    pairs: PromptPairs
    site: Site
    do: Change
    over: tuple[str, ...]
    labels: dict[str, list[str]]
    variants: list[list[Intervention]]
    directions: tuple[str, ...]
    most_bytes: int
    recorded_points: tuple[str, ...] = ()
    base_runs: dict[tuple[TokenIds, ...], BaseRuns] = field(default_factory=dict)

    @staticmethod
    def build(
        lens: Lens, clean: Any, corrupt: Any, site: Any, *, over: Sequence[str] | str, metric: Any,
        do: Any, direction: str, position_names: Any, most_bytes: int,
    ) -> "SweepPlan":  # fmt: skip
        """Read the arguments of `sweep`; raise PatchError for what cannot be swept."""
        if metric is None and not isinstance(clean, Examples):
            raise PatchError("no metric: give (right, wrong), a function of logits [row, vocab] or a task's Examples")
        over = list_axes(over)
        if len(set(over)) != len(over):
            raise PatchError(f"over {over}: one axis is there twice")
        if not isinstance(site, Site | str):
            raise PatchError(f"{site!r:.60} is no site: give Site('resid_post', pos='end') or the name of a point")
        site = Site(site) if isinstance(site, str) else site
        directions = tuple(DIRECTIONS) if direction == "both" else (direction,)
        if not set(directions) <= DIRECTIONS.keys():
            raise PatchError(f"direction is {direction!r}; choose from 'denoise', 'noise', 'both'")
        do = Swap() if do is None else as_change(do)
        if corrupt is None and (do == Swap() or direction != "noise"):
            raise PatchError(
                "without corrupt prompts only clean ones can be changed: direction='noise' and a do= such as Zero()"
            )
        pairs = PromptPairs.build(lens, clean, corrupt, metric, position_names=position_names).pair_with_themselves()
        resolver = SiteResolver(lens)
        places = {axis: list_places(resolver, site, axis, pairs.prompts) for axis in over}
        # One variant per cell of the grid, in the order of its axes.
        fields = [site_field(site, axis) for axis in over]
        sites = [site.at(**dict(zip(fields, where, strict=True))) for where in product(*places.values())]
        return SweepPlan(
            pairs=pairs,
            site=site,
            do=do,
            over=over,
            labels={
                axis: [place_label(lens, axis, place, pairs.prompts) for place in listed]
                for axis, listed in places.items()
            },
            variants=[[Intervention(one, do)] for one in sites],
            directions=directions,
            most_bytes=most_bytes,
            recorded_points=resolver.resolve_names(site) if do == Swap() else (),
        )

    @property
    def lens(self) -> Lens:
        return self.pairs.lens

    @property
    def metric(self) -> Metric:
        return self.pairs.metric

    def make_job(self, pairs: PromptPairs) -> EvaluationJob:
        """Return a job over pairs as they are oriented, which shares the base runs of this plan."""
        return EvaluationJob(
            pairs, most_bytes=self.most_bytes, recorded_points=self.recorded_points, base_runs=self.base_runs
        )

    def empty_grid(self) -> CellGrid:
        """Return a grid without any cell run."""
        values = torch.full((len(self.variants), len(self.pairs)), torch.nan, dtype=torch.float64)
        return CellGrid(values, torch.zeros_like(values, dtype=torch.bool))

    def measure_baselines(self, normalise: bool) -> Baselines:
        """Measure clean and corrupt runs; with `normalise`, raise PatchError when they are too close to divide by."""
        clean, corrupt = (
            self.make_job(self.pairs.orient(direction)).measure_baseline().cpu().numpy()
            for direction in ("noise", "denoise")
        )
        distance, scale = abs((clean - corrupt).mean()), np.abs([clean, corrupt]).mean()
        if normalise and distance < max(1e-3 * scale, 1e-6):
            raise PatchError(
                f"{self.metric.name} is {clean.mean():.4g} clean and {corrupt.mean():.4g} corrupt: too close "
                "to divide by their distance. normalise=False gives the plain metric"
            )
        return Baselines(clean=clean, corrupt=corrupt)

    def keys(self) -> dict[str, str]:
        """Return a key for each thing that cells depend on: sweeps with the same keys may share them.

        Raise PatchError for a metric or a change that has no key.
        """
        change: Any = ("given", self.do.key) if isinstance(self.do, Apply) and self.do.key is not None else self.do
        fn = name_of(self.do.fn) if isinstance(self.do, Apply) else ""
        instead = f"give it one that changes with what it does, Apply({fn}, key='...')"
        return {
            "model": key_of((self.lens.model_hash, str(self.lens.dtype))),
            "prompts": key_of((self.pairs.prompts, self.pairs.sources)),
            "places": key_of([str(one.site) for variant in self.variants for one in variant]),
            "change": key_or_refuse(change, f"the change {self.do}", instead),
            "positions": key_of(list(self.pairs.position_names)),
            "metric": self.metric.digest(),
        }

    def describe(self, baselines: Baselines, *, normalise: bool, seed: int) -> dict[str, str]:
        """Return what the numbers are: metric, change, directions, pairs, interval, model."""
        value = "effect: (metric - base) / (other - base), 0 the changed run's, 1 its source's"
        grouping = {"head": "query heads", "kv": "key-value heads, each with its group of query heads"}
        heads = [grouping[axis] for axis in ("head", "kv") if axis in self.site.axes]
        interval = f"95 % of {BOOTSTRAP_DRAWS} bootstrap means over pairs, seed {seed}"
        return {
            "metric": self.metric.name,
            "value": value if normalise else f"plain {self.metric.name}",
            "site": str(self.site),
            "change": str(self.do),
            "direction": "; ".join(f"{way}: {DIRECTIONS[way]}" for way in self.directions),
            **({"heads": "; ".join(heads)} if heads else {}),
            "pairs": str(len(self.pairs)),
            "baselines": f"clean {baselines.clean.mean():.4g}, corrupt {baselines.corrupt.mean():.4g}",
            "interval": interval if len(self.pairs) > 1 else "none: one pair",
            "model": self.lens.model_hash,
            "tokenizer": self.lens.tokenizer_hash,
        }


def shuffle_sources(pairs: PromptPairs, n: int, seed: int) -> list[list[int]]:
    """Return n orders of the pairs in which each has the source of another pair of the same length."""
    draw, orders = np.random.default_rng(seed), list[list[int]]()
    groups = pairs.group_by_length()
    for _ in range(n):
        order = list(range(len(pairs)))
        for length, same in groups.items():
            if len(same) < 2:
                raise PatchError(f"a null floor exchanges sources between pairs: of {length} tokens there is one")
            # Each takes the source of its neighbour in a random ring, so that none keeps its own.
            ring = draw.permutation(same)
            for i, j in zip(ring, np.roll(ring, 1), strict=True):
                order[i] = int(j)
        orders.append(order)
    return orders


@dataclass(eq=False)
class DirectionGrid:
    """The cells of one direction, and those with exchanged sources."""

    direction: str
    cells: CellGrid
    nulls: list[CellGrid] = field(default_factory=list)

    @property
    def cost(self) -> Cost:
        return sum((null.cost for null in self.nulls), self.cells.cost)

    def compute_statistics(self, baselines: Baselines, *, normalise: bool, seed: int) -> "EffectStatistics":
        """Compute the mean effect of every cell over pairs, its interval and the null floor."""
        base, other = baselines.orient(self.direction)

        def compute_effect(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
            """[cell, pair], pairs drawn [draw, pair] -> [cell, draw]: the ratio of means over the pairs drawn."""
            mean = values[:, pairs].mean(-1)
            return (mean - base[pairs].mean(-1)) / (other - base)[pairs].mean(-1) if normalise else mean

        values, n = self.cells.values.numpy(), len(base)
        every_pair = np.arange(n)
        mean = compute_effect(values, every_pair)
        nothing = np.full_like(mean, np.nan)
        if n == 1:
            return EffectStatistics(mean=mean, low=nothing, high=nothing, floor=nothing)
        drawn = np.random.default_rng(seed).integers(0, n, (BOOTSTRAP_DRAWS, n))
        # In parts, so that [cell, draw, pair] is never held at once.
        means = np.concatenate([compute_effect(values, part) for part in np.array_split(drawn, 50)], -1)
        low, high = np.quantile(means, [0.025, 0.975], axis=-1)
        floor = nothing
        if self.nulls:
            null_effects = [np.abs(compute_effect(null.values.numpy(), every_pair)) for null in self.nulls]
            floor = np.quantile(null_effects, 0.95, axis=0)
        return EffectStatistics(mean=mean, low=low, high=high, floor=floor)


@dataclass(frozen=True, eq=False, kw_only=True)
class EffectStatistics:
    """Per cell: the mean effect over pairs, the bounds of its interval, and the null floor."""

    mean: Float[np.ndarray, "cell"]
    low: Float[np.ndarray, "cell"]
    high: Float[np.ndarray, "cell"]
    floor: Float[np.ndarray, "cell"]


def build_sweep(
    plan: SweepPlan,
    grids: Sequence[DirectionGrid],
    baselines: Baselines,
    *,
    normalise: bool,
    seed: int,
    finished: bool,
) -> Sweep:
    """Return the result of a plan whose grids have been filled."""
    both = len(grids) > 1
    axes = ("direction", *plan.over) if both else plan.over
    labels = {"direction": list(plan.directions), **plan.labels} if both else plan.labels
    about = plan.describe(baselines, normalise=normalise, seed=seed)
    chosen = tuple(axis for axis in plan.over if getattr(plan.site, site_field(plan.site, axis), None) is not None)

    def to_labelled(per_direction: Sequence[np.ndarray], *leading: str) -> Labelled:
        """One array [leading, cell] per direction -> [leading, direction, over]."""
        x = np.moveaxis(np.stack(per_direction), 0, len(leading)) if both else per_direction[0]
        sizes = [len(labels[axis]) for axis in axes]
        values = x.reshape(*x.shape[: len(leading)], *sizes)
        return Labelled(values, (*leading, *axes), labels, about, chosen=chosen)

    statistics = [grid.compute_statistics(baselines, normalise=normalise, seed=seed) for grid in grids]
    return Sweep(
        to_labelled([one.mean for one in statistics]).values,
        axes,
        labels,
        about,
        raw=to_labelled([grid.cells.values.T.numpy() for grid in grids], "pair"),
        clean=baselines.clean,
        corrupt=baselines.corrupt,
        low=to_labelled([one.low for one in statistics]),
        high=to_labelled([one.high for one in statistics]),
        floor=to_labelled([one.floor for one in statistics]),
        unchanged=to_labelled([~grid.cells.changed.T.numpy() for grid in grids], "pair"),
        chosen=chosen,
        finished=finished,
        cost=sum((grid.cost for grid in grids), NO_COST),
    )
