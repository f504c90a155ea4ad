"""The places along the axes of a grid, and what to call them."""

from collections.abc import Sequence

import torch

from glmlens.lens import Lens
from glmlens.patch.sites import PatchError, Place, Site, SiteResolver
from glmlens.patch.values import TokenIds


def site_field(site: Site, axis: str) -> str:
    """What a site calls an axis of its point: where it is changed is `pos`, whatever the point calls it."""
    return "pos" if axis == site.axes[1] else axis


def list_places(atlas: SiteResolver, site: Site, axis: str, prompts: Sequence[TokenIds]) -> list[Place]:
    """The places along one axis of the grid: those that the site names, or all."""
    names = atlas.resolve_names(site)
    known = [*(["layer"] if names[0].startswith("blocks.") else []), "pos", *site.axes[1:]]
    known += ["pair"] if "rotated" in site.axes else ["head"] if site.point in ("kv.k", "kv.v") else []
    if axis not in known:
        raise PatchError(f"over {axis!r}: {site.point} has {', '.join(dict.fromkeys(known))}")
    given = getattr(site, site_field(site, axis), None)
    if given is not None:
        return list(given)
    if axis in ("pos", "query", "key") and len(set(map(len, prompts))) > 1:
        raise PatchError("prompts of several lengths: name the positions, Site(..., pos=('S2', 'end'))")
    return list(range(atlas.axis_size(site, axis, len(prompts[0]))))


def place_label(lens: Lens, axis: str, place: Place, prompts: Sequence[TokenIds]) -> str:
    """What to call a place: a position of a single prompt with its token."""
    if axis not in ("pos", "query", "key") or isinstance(place, str) or len(prompts) > 1:
        return str(place)
    return f"{place} {lens.to_labels(torch.tensor([prompts[0][place]]))[0]}"
