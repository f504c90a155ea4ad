"""Sweeps: the same change at every place of a grid, for many pairs of prompts, with error bars."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from glmlens.integers import Integer, read_integer
from glmlens.lens import Lens
from glmlens.patch.apply import allowed
from glmlens.patch.checkpoint_keys import key_of, key_or_refuse
from glmlens.patch.checkpoints import SweepCheckpoint
from glmlens.patch.engine import BaseRuns
from glmlens.patch.evaluate import (
    DEFAULT_BATCH_BYTES,
    NO_COST,
    Cost,
    EvaluationJob,
    PositionNames,
    of_task,
    require_effect,
)
from glmlens.patch.grid import list_places, place_label, site_field
from glmlens.patch.interventions import Intervention
from glmlens.patch.metrics import Metric, as_metric
from glmlens.patch.sites import PatchError, Site, SiteResolver
from glmlens.patch.values import Apply, Change, Swap, TokenIds, as_change, name_of, to_token_ids
from glmlens.results import Labelled, list_axes
from glmlens.tasks.task import Examples
from glmlens.text.prompts import Prompt

DIRECTIONS = {"denoise": "corrupt run, clean values put in", "noise": "clean run, corrupt values put in"}


@dataclass(frozen=True, eq=False, repr=False)
class Sweep(Labelled):
    """A grid of effects: (metric of the changed run - base) / (other - base), means over pairs first.

    0 is the run that is changed and 1 the run that the values are from, or with `normalise=False` the plain metric.
    `raw[pair, ...]` are the metrics of the changed runs and `clean[pair]`, `corrupt[pair]` those of the plain ones.
    `low` and `high` bound 95 % of bootstrap means over pairs (nan for one pair). `floor` is what 95 % of the effects of
    values from other pairs stay below in magnitude (nan unless asked for). `unchanged[pair, ...]` is where the change
    changed nothing. Cells that were not run are nan, and `finished` says whether there are any.
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
        """Some places along an axis as plain labelled numbers."""
        return Labelled(self.values, self.axes, self.labels, self.about, chosen=self.chosen).keep(axis, places)


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
    """Change a site place by place along the axes `over`, and measure.

    `clean` are prompts and `corrupt` as many others, each as long as its partner; with a task's Examples as `clean`,
    `corrupt` names a counterfactual, `metric` is theirs and positions have their names. `metric` is (right, wrong), a
    task's Examples, a Metric or a function of the last logits, fn(logits [row, vocab]) -> [row]. `over` are "layer" and
    axes of the point, ("layer", "pos") or "layer" alone; along each, the places that the site names, or all.
    `direction` is "denoise", "noise" or "both", an axis of its own. `do` is Swap(), the other run's value, unless
    given. `null` is how often pairs exchange their sources for the floor.

    With a `checkpoint` file, finished cells are kept there and not run again. It is of one model, prompts, places,
    change, named positions and metric; functions count by their code, closure and globals. Interrupted, a sweep returns
    what is finished.

    Raises PatchError for pairs of different length, for a place that is not there, for baselines too close to
    normalise by, for a checkpoint of another sweep or of a function that cannot be told from others, and for a sweep of
    which no cell changes anything unless allow="no change".
    """
    allow = allowed(allow)
    null = read_integer(null, "null", least=0, error=PatchError)
    seed = read_integer(seed, "seed", least=0, error=PatchError)
    plan = SweepPlan.build(lens, clean, corrupt, site, over, metric, do, direction, position_names, most_bytes)
    plan.measure_baselines(normalise)
    runs = [DirectionGrid.make_empty(plan, way) for way in plan.directions]
    nulls = plan.shuffle_sources(null, seed)
    if nulls and plan.do != Swap():
        raise PatchError(f"a null floor exchanges the sources of Swap(), and {plan.do} has none: null=0")
    store = SweepCheckpoint.open(checkpoint, {} if checkpoint is None else plan.keys())
    finished = False
    total = len(plan.variants) * len(plan.clean_prompts) * len(plan.directions) * (1 + len(nulls))
    with tqdm(total=total, disable=not progress, unit="cell", desc=str(plan.site)) as bar:
        try:
            for run in runs:
                run.run_cells(bar, store)
            for order in nulls:
                for run in runs:
                    run.run_null_cells(bar, store, order)
            finished = True
        except KeyboardInterrupt:
            bar.write(f"interrupted after {bar.n} of {total} cells")
    if finished:
        moved = torch.stack([run.changed for run in runs]).any(0)
        if not bool(moved.any()):
            require_effect(plan.variants, moved, allow)
    return plan.build_sweep(runs, normalise, seed, finished)


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
    """What such a sweep would take; only the prompts themselves are run."""
    plan = SweepPlan.build(lens, clean, corrupt, site, over, metric, do, direction, position_names, most_bytes)
    costs = [plan.make_job(way).estimate_cost(plan.variants) for way in plan.directions]
    return sum(costs[1:], costs[0])


@dataclass
class SweepPlan:
    """A sweep that has been understood: prompts, variants and labels."""

    lens: Lens
    clean_prompts: tuple[TokenIds, ...]
    corrupt_prompts: tuple[TokenIds, ...]
    site: Site
    do: Change
    over: tuple[str, ...]
    labels: dict[str, list[str]]
    variants: list[list[Intervention]]
    metric: Metric
    directions: tuple[str, ...]
    position_names: Sequence[PositionNames] | PositionNames | Any
    most_bytes: int
    recorded_points: tuple[str, ...] = ()
    base_runs: dict[tuple[TokenIds, ...], BaseRuns] = field(default_factory=dict)

    @staticmethod
    def build(
        lens: Lens, clean: Any, corrupt: Any, site: Any, over: Sequence[str] | str, metric: Any,
        do: Any, direction: str, position_names: Any, most_bytes: int,
    ) -> "SweepPlan":  # fmt: skip
        clean, corrupt, metric, position_names = of_task(clean, corrupt, metric, position_names)
        if metric is None:
            raise PatchError("no metric: give (right, wrong), a function of logits [row, vocab] or a task's Examples")
        over = list_axes(over)
        if len(set(over)) != len(over):
            raise PatchError(f"over {over}: one axis is there twice")
        if not isinstance(site, Site | str):
            raise PatchError(f"{site!r:.60} is no site: give Site('resid_post', pos='end') or the name of a point")
        directions = tuple(DIRECTIONS) if direction == "both" else (direction,)
        if not set(directions) <= DIRECTIONS.keys():
            raise PatchError(f"direction is {direction!r}; choose from 'denoise', 'noise', 'both'")
        do = Swap() if do is None else as_change(do)
        if corrupt is None and (do == Swap() or direction != "noise"):
            raise PatchError(
                "without corrupt prompts only clean ones can be changed: direction='noise' and a do= such as Zero()"
            )
        prompts, site = to_token_ids(lens, clean), Site(site) if isinstance(site, str) else site
        others = prompts if corrupt is None else to_token_ids(lens, corrupt)
        if len(prompts) != len(others):
            raise PatchError(f"{len(prompts)} clean and {len(others)} corrupt prompts: they are compared in pairs")
        atlas, over = SiteResolver(lens), list_axes(over)
        grid = {axis: list_places(atlas, site, axis, prompts) for axis in over}
        fields = [site_field(site, axis) for axis in over]
        sites = [site.at(**dict(zip(fields, where, strict=True))) for where in product(*grid.values())]
        variants = [[Intervention(one, do)] for one in sites]
        labels = {axis: [place_label(lens, axis, place, prompts) for place in found] for axis, found in grid.items()}
        read = as_metric(metric, lens, len(prompts))
        watched = atlas.resolve_names(site) if do == Swap() else ()
        return SweepPlan(
            lens,
            prompts,
            others,
            site,
            do,
            over,
            labels,
            variants,
            read,
            directions,
            position_names,
            most_bytes,
            watched,
        )

    def make_job(self, direction: str, order: Sequence[int] | None = None) -> EvaluationJob:
        """Measuring in one direction, with the sources of other pairs when their order is given."""
        base, source = (
            (self.corrupt_prompts, self.clean_prompts)
            if direction == "denoise"
            else (self.clean_prompts, self.corrupt_prompts)
        )
        taken = source if order is None else [source[i] for i in order]
        return EvaluationJob(
            self.lens,
            base,
            self.metric,
            taken,
            self.position_names,
            self.most_bytes,
            self.recorded_points,
            self.base_runs,
        )

    def measure_baselines(self, normalise: bool) -> None:
        """Find the baselines; PatchError when they are too close to divide by their distance."""
        self.clean = self.make_job("noise").measure_baseline().cpu().numpy()
        self.corrupt = self.make_job("denoise").measure_baseline().cpu().numpy()
        distance, scale = abs((self.clean - self.corrupt).mean()), np.abs([self.clean, self.corrupt]).mean()
        if normalise and distance < max(1e-3 * scale, 1e-6):
            raise PatchError(
                f"{self.metric.name} is {self.clean.mean():.4g} clean and {self.corrupt.mean():.4g} corrupt: too close "
                "to divide by their distance. normalise=False gives the plain metric"
            )

    def shuffle_sources(self, n: int, seed: int) -> list[list[int]]:
        """n orders of the pairs in which each has the source of another of the same length."""
        draw, found = np.random.default_rng(seed), list[list[int]]()
        for _ in range(n):
            order = list(range(len(self.clean_prompts)))
            for length in sorted(set(map(len, self.clean_prompts))):
                same = [i for i in order if len(self.clean_prompts[i]) == length]
                if len(same) < 2:
                    raise PatchError(f"a null floor exchanges sources between pairs: of {length} tokens there is one")
                ring = draw.permutation(same)
                for i, j in zip(ring, np.roll(ring, 1), strict=True):
                    order[i] = int(j)
            found.append(order)
        return found

    def keys(self) -> dict[str, str]:
        """What the cells are cells of, each by its key: sweeps of the same keys may share them.

        Raises PatchError for a metric or a change that has no key.
        """
        change: Any = ("given", self.do.key) if isinstance(self.do, Apply) and self.do.key is not None else self.do
        fn = name_of(self.do.fn) if isinstance(self.do, Apply) else ""
        instead = f"give it one that changes with what it does, Apply({fn}, key='...')"
        return {
            "model": key_of((self.lens.model_hash, str(self.lens.dtype))),
            "prompts": key_of((self.clean_prompts, self.corrupt_prompts)),
            "places": key_of([str(one.site) for variant in self.variants for one in variant]),
            "change": key_or_refuse(change, f"the change {self.do}", instead),
            "positions": key_of(self.make_job("noise").positions),
            "metric": self.metric.digest(),
        }

    def build_sweep(self, runs: "Sequence[DirectionGrid]", normalise: bool, seed: int, finished: bool) -> Sweep:
        both = len(runs) > 1
        axes = (*(("direction",) if both else ()), *self.over)
        labels = {**({"direction": list(self.directions)} if both else {}), **self.labels}

        def to_labelled(per_run: Sequence[np.ndarray], *more: str) -> Labelled:
            """[direction, more, cell] to [more, direction, over]."""
            x = np.stack(per_run) if both else per_run[0]
            x = np.moveaxis(x, 0, len(more)) if both else x
            sizes = [len(labels[axis]) for axis in axes]
            return Labelled(x.reshape(*x.shape[: len(more)], *sizes), (*more, *axes), labels, about, chosen=chosen)

        chosen = tuple(axis for axis in self.over if getattr(self.site, site_field(self.site, axis), None) is not None)
        about = self.describe(normalise, seed)
        parts = [run.compute_statistics(normalise, seed) for run in runs]
        mean, low, high, floor = (to_labelled([part[i] for part in parts]) for i in range(4))
        raw = to_labelled([run.values.T.cpu().numpy() for run in runs], "pair")
        unchanged = to_labelled([~run.changed.T.cpu().numpy() for run in runs], "pair")
        return Sweep(
            mean.values, axes, labels, about, raw=raw, clean=self.clean, corrupt=self.corrupt, low=low, high=high,
            floor=floor, unchanged=unchanged, chosen=chosen, finished=finished,
            cost=sum((run.cost for run in runs), NO_COST),
        )  # fmt: skip

    def describe(self, normalise: bool, seed: int) -> dict[str, str]:
        value = "effect: (metric - base) / (other - base), 0 the changed run's, 1 its source's"
        grouping = {"head": "query heads", "kv": "key-value heads, each with its group of query heads"}
        said = [grouping[axis] for axis in ("head", "kv") if axis in self.site.axes]
        return {
            "metric": self.metric.name,
            "value": value if normalise else f"plain {self.metric.name}",
            "site": str(self.site),
            "change": str(self.do),
            "direction": "; ".join(f"{way}: {DIRECTIONS[way]}" for way in self.directions),
            **({"heads": "; ".join(said)} if said else {}),
            "pairs": str(len(self.clean_prompts)),
            "baselines": f"clean {self.clean.mean():.4g}, corrupt {self.corrupt.mean():.4g}",
            "interval": f"95 % of 1000 bootstrap means over pairs, seed {seed}"
            if len(self.clean_prompts) > 1
            else "none: one pair",
            "model": self.lens.model_hash,
            "tokenizer": self.lens.tokenizer_hash,
        }


@dataclass
class DirectionGrid:
    """The numbers of one direction as they come in."""

    plan: SweepPlan
    direction: str
    values: Tensor  # variant example, nan where not run
    changed: Tensor
    nulls: list[Tensor] = field(default_factory=list)
    cost: Cost = NO_COST

    @staticmethod
    def make_empty(plan: SweepPlan, direction: str) -> "DirectionGrid":
        values = torch.full((len(plan.variants), len(plan.clean_prompts)), torch.nan, dtype=torch.float64)
        return DirectionGrid(plan, direction, values, torch.zeros_like(values, dtype=torch.bool))

    def run_cells(self, bar: Any, store: SweepCheckpoint) -> None:
        self.values, self.changed = store.load_cells(self.direction, self.values, self.changed)
        self.run_missing_cells(
            self.plan.make_job(self.direction), self.values, self.changed, bar, store, self.direction
        )

    def run_null_cells(self, bar: Any, store: SweepCheckpoint, order: Sequence[int]) -> None:
        """Run the cells with the sources in this order, under which they are kept."""
        name = f"{self.direction} null {key_of(tuple(order))[:16]}"
        empty = torch.full_like(self.values, torch.nan)
        values, moved = store.load_cells(name, empty, torch.zeros_like(self.changed))
        self.nulls.append(values)
        self.run_missing_cells(self.plan.make_job(self.direction, order), values, moved, bar, store, name)

    def run_missing_cells(
        self, job: EvaluationJob, values: Tensor, changed_cells: Tensor, bar: Any, store: SweepCheckpoint, name: str
    ) -> None:
        """Run the cells that are nan, in place."""
        todo = values.isnan()
        bar.update(int((~todo).sum()))
        for variant, example, found, changed in job.run_variants(self.plan.variants, todo):
            where = variant.cpu(), example.cpu()
            values[where], changed_cells[where] = found.double().cpu(), changed.cpu()
            store.save_cells(name, values, changed_cells)
            bar.update(len(found))
        self.cost += job.cost_so_far

    def compute_statistics(self, normalise: bool, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Per cell: the mean effect, its interval, and the null floor."""
        base, other = self.plan.corrupt, self.plan.clean
        if self.direction == "noise":
            base, other = other, base

        def compute_effect(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
            """[..., pair drawn] to [cell, ...]: the ratio of means over the pairs drawn."""
            mean = values[:, pairs].mean(-1)
            return (mean - base[pairs].mean(-1)) / (other - base)[pairs].mean(-1) if normalise else mean

        values, n = self.values.numpy(), len(self.plan.clean_prompts)
        middle = compute_effect(values, np.arange(n))
        nothing = np.full_like(middle, np.nan)
        if n == 1:
            return middle, nothing, nothing, nothing
        drawn = np.random.default_rng(seed).integers(0, n, (1000, n))
        means = np.concatenate([compute_effect(values, some) for some in np.array_split(drawn, 50)], -1)
        low, high = np.quantile(means, [0.025, 0.975], axis=-1)
        return middle, low, high, self.null_floor(compute_effect, n, nothing)

    def null_floor(self, effect: Any, n: int, nothing: np.ndarray) -> np.ndarray:
        if not self.nulls:
            return nothing
        return np.quantile([np.abs(effect(null.numpy(), np.arange(n))) for null in self.nulls], 0.95, axis=0)
