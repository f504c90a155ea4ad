"""A check of a run on the meta device: shapes, bytes, and where its hooks fire, without computing anything."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from glmlens.hook_points import Point
from glmlens.text_tables import format_bytes, format_ranges, format_table


class Points(list[Point]):
    """A list of points, printed as a table with the layers together."""

    @property
    def bytes(self) -> int:
        """The bytes of all points."""
        return sum(point.bytes for point in self)

    def __repr__(self) -> str:
        lines: dict[str, list[Point]] = {}
        for point in self:
            lines.setdefault(point.local, []).append(point)
        rows = [
            (
                format_layers(local, points),
                " ".join(points[0].axes),
                str(points[0].shape),
                format_bytes(Points(points).bytes),
            )
            for local, points in lines.items()
        ]
        return f"{len(self)} points, {format_bytes(self.bytes)}\n{format_table(rows)}" if rows else "0 points"


def format_layers(local: str, points: list[Point]) -> str:
    """Return the name of a point with the layers of `points`, such as blocks.0-3.attn.z."""
    layers = [point.layer for point in points if point.layer is not None]
    return f"blocks.{format_ranges(layers)}.{local}" if layers else local


@dataclass(frozen=True)
class RunCheck:
    """The check of a run: the points it would record, those it would store, and where its hooks would fire.

    Points that are not stored are derived from those that are. `not_tried` lists hooks that could not run on the meta
    device.
    """

    points: Points
    stored: Points
    fires: list[tuple[str, list[str]]]
    not_tried: list[str]

    @property
    def bytes(self) -> int:
        """The bytes of the points that would be stored."""
        return self.stored.bytes

    def __repr__(self) -> str:
        n_derived = len(self.points) - len(self.stored)
        lines = [f"would store {self.stored!r}"] + ([f"and derive {n_derived} points from them"] if n_derived else [])
        lines += [f"hook {hook}: fires at {len(names)} points: {', '.join(names[:4])}" for hook, names in self.fires]
        return "\n".join(lines + [f"needs numbers, not tried: {why}" for why in self.not_tried])


class MetaDeviceMode(TorchFunctionMode):
    """A context in which every operation runs on the meta device, whatever the device of its arguments."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs or {}))
        return func(*args, **kwargs)
