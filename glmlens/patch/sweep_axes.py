"""List the places along the axes of a sweep's grid, and label them."""

from collections.abc import Sequence

import torch

from glmlens.lens import Lens
from glmlens.patch.replacement_values import TokenIds
from glmlens.patch.sites import PatchError, Place, Site, SiteResolver


def site_field(site: Site, axis: str) -> str:
    """Return the field of a site for an axis of its point: `pos` for that of position (query, pos or key)."""
    return "pos" if axis == site.axes[1] else axis


def list_places(resolver: SiteResolver, site: Site, axis: str, prompts: Sequence[TokenIds]) -> list[Place]:
    """Return the places along one axis of the grid: those that the site names, or all.

    Raise PatchError for an axis that the point has not got, and for all positions of prompts of several lengths.
    """
    names = resolver.resolve_names(site)
    known = [*(["layer"] if names[0].startswith("blocks.") else []), "pos", *site.axes[1:]]
    known += ["pair"] if "rotated" in site.axes else ["head"] if site.point in ("kv.k", "kv.v") else []
    if axis not in known:
        raise PatchError(f"over {axis!r}: {site.point} has {', '.join(dict.fromkeys(known))}")
    given = getattr(site, site_field(site, axis), None)
    if given is not None:
        return list(given)
    if axis in ("pos", "query", "key") and len(set(map(len, prompts))) > 1:
        raise PatchError("prompts of several lengths: name the positions, Site(..., pos=('S2', 'end'))")
    return list(range(resolver.axis_size(site, axis, len(prompts[0]))))


def place_label(lens: Lens, axis: str, place: Place, prompts: Sequence[TokenIds]) -> str:
    """Return the label of a place; for a position of a single prompt, with its token."""
    if axis not in ("pos", "query", "key") or isinstance(place, str) or len(prompts) > 1:
        return str(place)
    return f"{place} {lens.to_labels(torch.tensor([prompts[0][place]]))[0]}"
