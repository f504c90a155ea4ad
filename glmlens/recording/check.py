"""What a run would do, found before it is paid for: shapes, bytes, and where hooks fire."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from glmlens.hook_points import Point
from glmlens.text_tables import format_bytes, format_ranges, format_table


class Points(list[Point]):
    """Points, shown as a short table with the layers together."""

    @property
    def bytes(self) -> int:
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
    layers = [point.layer for point in points if point.layer is not None]
    return f"blocks.{format_ranges(layers)}.{local}" if layers else local


@dataclass(frozen=True)
class RunCheck:
    """What a run would record (`points`), what of it would be stored and weigh `bytes`, and where hooks would fire.

    The other points follow from those that are stored. `not_tried` says which hooks could not be called.
    """

    points: Points
    stored: Points
    fires: list[tuple[str, list[str]]]
    not_tried: list[str]

    @property
    def bytes(self) -> int:
        return self.stored.bytes

    def __repr__(self) -> str:
        follow = len(self.points) - len(self.stored)
        lines = [f"would store {self.stored!r}"] + ([f"and derive {follow} points from them"] if follow else [])
        lines += [f"hook {hook}: fires at {len(names)} points: {', '.join(names[:4])}" for hook, names in self.fires]
        return "\n".join(lines + [f"needs numbers, not tried: {why}" for why in self.not_tried])


class MetaDeviceMode(TorchFunctionMode):
    """Inside, every operation runs on the meta device, whatever its arguments live on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to("meta"), (args, kwargs or {}))
        return func(*args, **kwargs)
