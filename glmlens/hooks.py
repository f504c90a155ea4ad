"""What a hook is: a function handed to `forward` and called once for every named tensor; and edits that hold only somewhere."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from glmlens.hook_points import HookError, Point
from glmlens.integers import Integers, read_integers

Hook = Callable[[str, Tensor], Tensor]


"""Look at `x`, or return what the model should use instead."""


def off(name: str, x: Tensor) -> Tensor:
    """No hook: the model as published."""
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


"""What a user passes: `fn(x, point)` returns what the model should use instead of x."""


Hooks = Mapping[str, Edit] | Sequence[tuple[str, Edit]]


@dataclass(frozen=True)
class Only:
    """An edit that holds only at some steps of a generation and at some absolute positions; see `only`."""

    fn: Edit
    steps: frozenset[int] | None
    positions: frozenset[int] | None

    def select_positions(self, point: Point) -> Tensor | None:
        """Where along (batch, pos or key) this edit holds: None where it holds nowhere."""
        where = point.key_positions if "key" in point.axes and "query" not in point.axes else point.positions
        assert where is not None
        if self.steps is not None and point.step not in self.steps:
            return None
        if self.positions is None:
            return torch.ones_like(where, dtype=torch.bool)
        here = torch.isin(where, torch.tensor(sorted(self.positions), device=where.device))
        return here if bool(here.any()) else None

    def __call__(self, x: Tensor, point: Point) -> Tensor:
        return self.merge(self.fn(x.clone(), point), x, point, self.select_positions(point))

    def merge(self, new: Tensor, x: Tensor, point: Point, where: Tensor | None) -> Tensor:
        """`new` where this edit holds and x elsewhere; a result that cannot stand in for x is returned as it is."""
        alike = isinstance(new, Tensor) and (new.shape, new.dtype, new.device) == (x.shape, x.dtype, x.device)
        if where is None or self.positions is None or not alike:
            return x if where is None else new
        along = point.axes.index(next(axis for axis in ("pos", "query", "key") if axis in point.axes))
        shape = [size if i in (0, along) else 1 for i, size in enumerate(x.shape)]
        return torch.where(where.to(x.device).reshape(shape), new, x)


def only(fn: Any, *, steps: Integers = None, positions: Integers = None) -> Only:
    """Restrict an edit to some generation steps (0 is the prompt) and to some absolute positions.

    At a point with a `query` axis, positions are the query's; at `kv.k` and `kv.v` they are the key's. Rows of the
    result at other positions are dropped. A run that never reaches any of them is a HookError.
    How many positions there are is not known before it is run, so a mask is a HookError: give the numbers.
    """
    if isinstance(fn, Only):
        raise HookError("only() of an only(): give steps and positions in one call")
    if not callable(fn):
        raise HookError(f"only() restricts an edit, a function fn(x, point); got {fn!r:.80}")
    chosen = [
        None if numbers is None else frozenset(read_integers(numbers, what, error=HookError))
        for numbers, what in ((steps, "steps"), (positions, "positions"))
    ]
    return Only(cast(Edit, fn), *chosen)


def list_edits(hooks: Any) -> list[tuple[str, Edit]]:
    """The (name, edit) pairs of either spelling, in the order given; HookError for what is no hook."""
    if hooks is None:
        return []
    if isinstance(hooks, str) or not isinstance(hooks, Iterable):
        raise HookError(f"{SPELLINGS}; got {hooks!r:.80}")
    listed: list[Any] = list(hooks.items()) if isinstance(hooks, Mapping) else list(hooks)
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
    except (TypeError, ValueError):  # some of those written in C do not say what they take
        return
    try:
        signature.bind(None, None)
    except TypeError as e:
        raise HookError(
            f"{name!r}: {get_edit_name(fn)}{signature} cannot be called as fn(x, point), the tensor there and where it is: {e}"
        ) from None


def get_edit_name(fn: Any) -> str:
    """What to call an edit in a message."""
    return get_edit_name(fn.fn) if isinstance(fn, Only) else getattr(fn, "__name__", type(fn).__name__)
