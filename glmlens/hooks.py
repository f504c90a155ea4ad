"""Hooks: functions that `GLM.forward` calls once for every hook point, and edits restricted to steps and positions."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from glmlens.hook_points import HookError, Point
from glmlens.integers import Integers, read_integers

Hook = Callable[[str, Tensor], Tensor]
"""`hook(name, x)` returns the tensor that the model uses: `x` itself, or a replacement."""


def off(name: str, x: Tensor) -> Tensor:
    """Return `x`: the hook that changes nothing."""
    return x


def scope_hook(hook: Hook, scope: str) -> Hook:
    """Return `hook` for use inside a scope: there "attn.q" reaches it as "blocks.3.attn.q" under the scope "blocks.3".

    A scope inside a scope is one `ScopedHook` with both prefixes, so that nested modules cost one call.
    """
    if hook is off:
        return off
    if isinstance(hook, ScopedHook):
        return ScopedHook(hook.hook, hook.prefix + scope)
    return ScopedHook(hook, scope)


def hook_requests(hook: Hook, name: str) -> bool:
    """Whether `hook` requests `name`, a point computed only on request.

    A hook requests points with a method `wants(name)`; a plain function requests none.
    """
    return False if hook is off else getattr(hook, "wants", request_nothing)(name)


def request_nothing(name: str) -> bool:
    """Return False: the `wants` of a hook that has none."""
    return False


class ScopedHook:
    """A hook that puts a prefix, "blocks.3.", before every name and passes it on."""

    __slots__ = ("hook", "prefix")

    def __init__(self, hook: Hook, scope: str):
        self.hook = hook
        self.prefix = scope + "."

    def __call__(self, name: str, x: Tensor) -> Tensor:
        return self.hook(self.prefix + name, x)

    def wants(self, name: str) -> bool:
        """Whether the hook inside requests the point, by its full name."""
        return getattr(self.hook, "wants", request_nothing)(self.prefix + name)


Edit = Callable[[Tensor, Point], Tensor]
"""What a user passes: `fn(x, point)` returns the tensor that the model uses instead of `x`."""

Hooks = Mapping[str, Edit] | Sequence[tuple[str, Edit]]


@dataclass(frozen=True)
class Only:
    """An edit restricted to some steps of a generation and to some absolute positions; see `only`."""

    fn: Edit
    steps: frozenset[int] | None
    positions: frozenset[int] | None

    def select_positions(self, point: Point) -> Tensor | None:
        """Return a mask [batch, pos] or [batch, key] of the positions that this edit applies to, None for nowhere."""
        # Scores and patterns have a query and a key axis: there, positions are the query's.
        by_key = "key" in point.axes and "query" not in point.axes
        positions = point.key_positions if by_key else point.positions
        assert positions is not None
        if self.steps is not None and point.step not in self.steps:
            return None
        if self.positions is None:
            return torch.ones_like(positions, dtype=torch.bool)
        selected = torch.isin(positions, torch.tensor(sorted(self.positions), device=positions.device))
        return selected if bool(selected.any()) else None

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        # The edit gets a copy: if it writes in place, the other positions of x still are what they were.
        return self.merge(self.fn(x.clone(), point), x, point, self.select_positions(point))

    def merge(self, new: Tensor, x: Tensor, point: Point, where: Tensor | None) -> Tensor:
        """Return `new` at the positions in the mask `where` and `x` at the others.

        A `new` of another type, shape, dtype or device is returned unchanged, for the caller to report.
        """
        if where is None:
            return x
        fits = isinstance(new, Tensor) and (new.shape, new.dtype, new.device) == (x.shape, x.dtype, x.device)
        if self.positions is None or not fits:
            return new
        along = point.axes.index(next(axis for axis in ("pos", "query", "key") if axis in point.axes))
        # Reshape the mask [batch, pos] so that it broadcasts over the other axes of x.
        shape = [size if i in (0, along) else 1 for i, size in enumerate(x.shape)]
        return torch.where(where.to(x.device).reshape(shape), new, x)


def only(fn: Any, *, steps: Integers = None, positions: Integers = None) -> Only:
    """Return the edit `fn` restricted to some generation steps (0 is the prompt) and to some absolute positions.

    At a point with a `query` axis, positions are the query's; at `kv.k` and `kv.v` they are the key's. At other
    positions the result of `fn` is ignored. A run that reaches none of the steps or positions raises HookError. A mask
    raises HookError too, as the number of positions is not known before the run: give numbers.
    """
    if isinstance(fn, Only):
        raise HookError("only() of an only(): give steps and positions in one call")
    if not callable(fn):
        raise HookError(f"only() restricts an edit, a function fn(x, point); got {fn!r:.80}")
    return Only(
        fn=cast(Edit, fn),
        steps=None if steps is None else frozenset(read_integers(steps, "steps", error=HookError)),
        positions=None if positions is None else frozenset(read_integers(positions, "positions", error=HookError)),
    )


def list_edits(hooks: Any) -> list[tuple[str, Edit]]:
    """Return the (name, edit) pairs of a mapping or a sequence of pairs, in the order given.

    Raises HookError for anything else, for a name with several edits and for an edit that cannot be called.
    """
    if hooks is None:
        return []
    if isinstance(hooks, str) or not isinstance(hooks, Iterable):
        raise HookError(f"{SPELLINGS}; got {hooks!r:.80}")
    listed: list[Any] = list(hooks.items()) if isinstance(hooks, Mapping) else list(hooks)
    # hooks=(name, fn) is a likely slip for hooks=[(name, fn)].
    if len(listed) == 2 and isinstance(listed[0], str) and callable(listed[1]):
        raise HookError(f"{SPELLINGS}: put the pair of {listed[0]!r} in a list, hooks=[(name, fn)]")
    for entry in listed:
        if not (isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise HookError(f"{SPELLINGS}; got {entry!r:.80}")
        name: str = entry[0]
        fn: Any = entry[1]
        if isinstance(fn, list | tuple):
            raise HookError(f"{name!r} has {len(fn)} hooks: give a pair for each, [({name!r}, first), ...]")
        if not callable(fn):
            raise HookError(f"{SPELLINGS}; got {fn!r:.80} at {name!r}, which is no function")
        check_signature(name, cast(Edit, fn))
    return listed


SPELLINGS = 'hooks are {"blocks.3.attn.z": fn} or [("blocks.*.attn.z", fn), ...]'


def check_signature(name: str, fn: Any) -> None:
    """Raise HookError for a function that cannot be called as fn(x, point)."""
    try:
        signature = inspect.signature(fn.fn if isinstance(fn, Only) else fn)
    except (TypeError, ValueError):  # some functions written in C have no signature
        return
    try:
        signature.bind(None, None)
    except TypeError as e:
        called = f"{get_edit_name(fn)}{signature}"
        raise HookError(
            f"{name!r}: {called} cannot be called as fn(x, point), with the tensor and its hook point: {e}"
        ) from None


def get_edit_name(fn: Any) -> str:
    """Return the name of an edit for error messages: its function's name, or its class's."""
    return get_edit_name(fn.fn) if isinstance(fn, Only) else getattr(fn, "__name__", type(fn).__name__)
