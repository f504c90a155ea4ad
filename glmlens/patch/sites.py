"""Sites: one vocabulary for every place in a model that can be changed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import torch
from einops import repeat
from torch import Tensor

from glmlens.config import GLMConfig
from glmlens.deprecated import rename_attribute
from glmlens.errors import GlmlensError
from glmlens.hook_points import HookError, Point, axes_of, local_name, resolve_names
from glmlens.integers import Integers, read_integers
from glmlens.lens import Lens
from glmlens.loading.checkpoint import build_meta_model
from glmlens.recording.recorder import trace_points

Place = int | str
PlaceSelection = Place | Integers


class PatchError(GlmlensError, ValueError):
    """An intervention, site or sweep that cannot be run; the message names what to type instead."""


@dataclass(frozen=True)
class Site:
    """A place in a model: a point, and of each of its axes the indices that are meant; None means all of them.

    `point` is a name as in `lens.points()`, "attn.z" with `layer=` or "blocks.3.attn.z". `pos` are absolute positions,
    or names of positions that an example has ("S2", "end"): along `query` at a pattern (its destination, with `key`
    its source), along `key` at `kv.k` and `kv.v` (the cache entry). `pair` are adjacent channels that rotary
    embeddings rotate together, `mlp` neurons. `head` at `kv.k` and `kv.v` is a query head: keys and values change for
    it alone, as if heads did not share them.
    """

    point: str | Any
    layer: PlaceSelection = None
    pos: PlaceSelection = None
    head: PlaceSelection = None
    kv: PlaceSelection = None
    key: PlaceSelection = None
    pair: PlaceSelection = None
    mlp: PlaceSelection = None
    d: PlaceSelection = None
    model: PlaceSelection = None

    def __post_init__(self) -> None:
        for field in fields(self)[1:]:
            object.__setattr__(self, field.name, to_place_tuple(getattr(self, field.name), field.name))
        if not isinstance(self.point, str):
            raise PatchError(f"{self.point!r:.60} is no point: give its name, as in lens.points()")
        if self.point.startswith("blocks.") and not re.match(r"blocks\.(\d+|\*)\..", self.point):
            raise PatchError(f"no point is called {self.point!r}: in a layer it is 'blocks.3.attn.z'")
        if self.point.startswith("blocks."):
            if self.layer is not None:
                raise PatchError(f"{self.point!r} names its layer: leave layer= out")
            layer, _, local = self.point.removeprefix("blocks.").partition(".")
            if layer != "*" and not (layer.isdecimal() and local):
                raise PatchError(f"{self.point!r} names no layer: write 'blocks.3.attn.z', or 'attn.z' with layer=")
            if layer != "*":
                object.__setattr__(self, "layer", (int(layer),))
            object.__setattr__(self, "point", local_name(self.point))

    ungrouped = rename_attribute("ungrouped", "by_query_head")

    @property
    def by_query_head(self) -> bool:
        """Whether keys or values are changed for single query heads, as if heads did not share them."""
        return self.point in ("kv.k", "kv.v") and self.head is not None

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the tensor there: batch, that of position, and the others."""
        return position_first_axes(self.point, self.by_query_head)

    def chosen_places(self) -> dict[str, tuple[Place, ...]]:
        """Return the places that have been chosen, by axis."""
        return {f.name: getattr(self, f.name) for f in fields(self)[1:] if getattr(self, f.name) is not None}

    def at(self, **places: Any) -> "Site":
        """Return the same site with some of its places chosen."""
        return replace(self, **places)

    def __str__(self) -> str:
        places = ", ".join(f"{name} {'+'.join(map(str, chosen))}" for name, chosen in self.chosen_places().items())
        return f"{self.point}{f' [{places}]' if places else ''}"


def to_place_tuple(places: Any, what: str, size: int | None = None) -> tuple[Place, ...] | None:
    """Return places as a tuple; raise PatchError for none, for one twice and for one that counts from the end.

    A mask can be read where the number of places, `size`, is given.
    """
    if places is None:
        return None
    found = read_integers(places, what, size=size, negative=size is None, named=True, error=PatchError)
    if len(set(found)) != len(found):
        raise PatchError(f"{what} {found}: one is there twice")
    if any(isinstance(p, int) and p < 0 for p in found):
        raise PatchError(f"{what} {found}: places are counted from 0, and the last position is called 'end'")
    if any(isinstance(p, str) for p in found) and what not in ("pos", "key"):
        raise PatchError(f"{what} {found}: only positions have names; give whole numbers")
    return found


def position_axis(axes: Sequence[str]) -> str:
    """Return the axis along which a tensor has positions: of an attention pattern, that of queries."""
    return next(axis for axis in ("query", "pos", "key") if axis in axes)


def position_first_axes(point: str, by_query_head: bool = False) -> tuple[str, ...]:
    """Return the axes of a point with batch and position first; by query head, `kv` is `head`."""
    axes = axes_of(point)
    along = position_axis(axes)
    rest = [axis for axis in axes if axis not in ("batch", along)]
    return ("batch", along, *("head" if by_query_head and axis == "kv" else axis for axis in rest))


def move_position_first(name: str, x: Tensor) -> Tensor:
    """Return the tensor at a point as [batch, position, rest], a view."""
    axes = axes_of(name)
    return x.movedim(axes.index(position_axis(axes)), 1)


def repeat_kv(x: Tensor, group_size: int) -> Tensor:
    """Return keys or values [batch, key, kv, d] as every query head reads them: [batch, key, head, d]."""
    return repeat(x, "batch key kv d -> batch key (kv group) d", group=group_size)


@dataclass(frozen=True)
class ResolvedSite:
    """A site in one model and prompt: names of tensors, positions, and the indices along the axes after those.

    None means all positions, or all indices.
    """

    names: tuple[str, ...]
    positions: tuple[int, ...] | None
    rest_indices: tuple[Tensor | None, ...]
    by_query_head: bool


@lru_cache(16)
def catalogue_for_config(cfg: GLMConfig, attention: str, dtype: torch.dtype) -> Mapping[str, Point]:
    """Return the points of every model of this shape, traced once on meta."""
    return trace_points(build_meta_model(cfg, attention, dtype))


class SiteResolver:
    """The points of a lens and the sizes of their axes; `resolve` gives the indices of a site."""

    def __init__(self, lens: Lens):
        self.lens, self.cfg = lens, lens.cfg
        self.points = catalogue_for_config(lens.cfg, lens.model.attention, lens.dtype)
        self.widths: dict[str, int] = {}
        for point in self.points.values():
            self.widths |= dict(zip(point.axes, point.shape, strict=True))

    def resolve_names(self, site: Site) -> tuple[str, ...]:
        """Return the names of a site's tensors; raise PatchError for a point or layer that is not there."""
        try:
            names = resolve_names(site.point, self.points)
        except HookError as e:
            raise PatchError(str(e)) from None
        if site.layer is None:
            return tuple(names)
        if not names[0].startswith("blocks."):
            raise PatchError(f"{site.point} is in no layer: leave layer= out")
        return tuple(
            f"blocks.{i}.{site.point}"
            for i in self.check_indices("layer", site.chosen_places()["layer"], self.cfg.n_layers)
        )

    def axis_size(self, site: Site, axis: str, length: int) -> int:
        """Return how many places there are along an axis of a site, in prompts of this length."""
        if axis in ("pos", "query", "key"):
            return length
        if axis == "pair" and "rotated" in site.axes:
            return self.cfg.d_rotary // 2
        return {"layer": self.cfg.n_layers, "head": self.cfg.n_heads, "kv": self.cfg.n_kv_heads}.get(
            axis, self.widths.get(axis, 0)
        )

    def check_indices(self, axis: str, places: Sequence[Place], size: int) -> list[int]:
        """Return places as numbers; raise PatchError for one that is not below `size`."""
        indices = [int(p) for p in places]
        if max(indices) >= size:
            raise PatchError(f"{axis} {max(indices)} asked for; there are {size}, 0 to {size - 1}")
        return indices

    def resolve(self, site: Site, length: int | None, position_names: Mapping[str, int]) -> ResolvedSite:
        """Return the indices of a site in a prompt of this length whose positions have these names.

        Without a length any position may still come, as in a generation. Raise PatchError for a place that this point
        has not got.
        """
        tensors, axes = self.resolve_names(site), site.axes
        for asked in site.chosen_places():
            if asked not in ("layer", "pos", *axes[2:]) and not self.is_alias_axis(asked, axes):
                raise PatchError(
                    f"{site.point} has axes {' '.join(axes[1:])}: no {asked}. {self.suggest_axis(site, asked)}"
                )
        positions = self.resolve_positions(site.pos, length, position_names)
        return ResolvedSite(
            names=tensors,
            positions=positions,
            rest_indices=tuple(self.resolve_axis(site, axis, length, position_names) for axis in axes[2:]),
            by_query_head=site.by_query_head,
        )

    def is_alias_axis(self, axis: str, axes: Sequence[str]) -> bool:
        """Whether `axis` is another name of one of these axes: pairs and d of the rotated channels, d of the rest."""
        return (axis == "pair" and "rotated" in axes) or (axis == "d" and bool({"rotated", "rest"} & set(axes)))

    def suggest_axis(self, site: Site, axis: str) -> str:
        """Return what to type instead of an axis that the site has not got."""
        if axis == "head" and "kv" in site.axes:
            return f"Heads share it: give kv=, or Site('kv.{site.point[-1]}', head=...) for what one query head reads"
        return "See lens.points()"

    def resolve_positions(
        self, places: Any, length: int | None, position_names: Mapping[str, int]
    ) -> tuple[int, ...] | None:
        """Return absolute positions, sorted, each once; None for all of a length that is not known."""
        if places is None:
            return None if length is None else tuple(range(length))
        positions = sorted({resolve_position_name(place, position_names) for place in places})
        if length is not None and positions[-1] >= length:
            raise PatchError(f"position {positions[-1]} asked for; the prompt has 0 to {length - 1}")
        return tuple(positions)

    def resolve_axis(
        self, site: Site, axis: str, length: int | None, position_names: Mapping[str, int]
    ) -> Tensor | None:
        """Return the indices along one axis after that of position; None for all."""
        # Rotary pair i rotates channels 2i and 2i + 1 together.
        places: Any = site.pair if axis == "rotated" and site.pair is not None else None
        if places is not None:
            pairs = self.check_indices("pair", places, self.cfg.d_rotary // 2)
            return torch.tensor([c for i in pairs for c in (2 * i, 2 * i + 1)], device=self.lens.device)
        if axis == "key":
            keys = self.resolve_positions(site.key, length, position_names)
            return None if keys is None else torch.tensor(keys, device=self.lens.device)
        places = getattr(site, "d" if axis in ("rotated", "rest") else axis, None)
        if places is None:
            return None
        return torch.tensor(self.check_indices(axis, places, self.axis_size(site, axis, 0)), device=self.lens.device)


def resolve_position_name(place: Place, position_names: Mapping[str, int]) -> int:
    """Return a position from its number or name; raise PatchError for an unknown name."""
    if isinstance(place, int):
        return place
    if place not in position_names:
        known = ", ".join(map(repr, position_names)) or "none: give numbers"
        raise PatchError(f"no position {place!r} here; the names are {known}")
    return position_names[place]
