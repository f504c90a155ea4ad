"""What to put at a place: plain data that prints, compares and saves."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from glmlens.lens import Lens
from glmlens.patch.sites import PatchError
from glmlens.prompt import Prompt

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Where:
    """What a change may ask about the numbers it changes: [position, the chosen rest].

    `pick` takes a tensor over all positions, [pos, the whole rest], to these places.
    """

    name: str
    positions: Tensor
    rest: tuple[int, ...]
    pick: Callable[[Tensor], Tensor]


class Change:
    """What the numbers at a place become."""

    prompts: tuple[Ids, ...] = ()
    aligned: ClassVar[bool] = True  # the prompts must be as long as the one that is changed

    def of(self, values: Tensor) -> Tensor:
        """What to keep of the values [prompt, pos, rest] of its prompts: [pos or 1, rest]."""
        return values[0]

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        """The numbers instead of `old`, of the same shape; `kept` is what `of` kept."""
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Swap(Change):
    """The value of another run at the same place; without tokens, of the run that a sweep pairs this one with."""

    tokens: Ids = ()

    @classmethod
    def of_prompt(cls, lens: Lens, prompt: Prompt) -> "Swap":
        (tokens,) = ids(lens, prompt)
        return cls(tokens)

    @property
    def prompts(self) -> tuple[Ids, ...]:  # type: ignore[override]
        return (self.tokens,) if self.tokens else ()

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        if kept is None:
            raise PatchError("Swap() names no run: outside a sweep give Swap.of_prompt(lens, prompt)")
        return at.pick(kept)

    def __str__(self) -> str:
        return f"the value of {'a run of ' + str(len(self.tokens)) + ' tokens' if self.tokens else 'the other run'}"


@dataclass(frozen=True)
class Zero(Change):
    """Nothing."""

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        return torch.zeros_like(old)


@dataclass(frozen=True)
class Mean(Change):
    """The mean over prompts, and over their positions unless `by_position`."""

    prompts: tuple[Ids, ...]  # type: ignore[assignment]
    by_position: bool = False

    @classmethod
    def of_prompts(cls, lens: Lens, prompts: Prompt, by_position: bool = False) -> "Mean":
        return cls(ids(lens, prompts), by_position)

    @property
    def aligned(self) -> bool:  # type: ignore[override]
        return self.by_position

    def of(self, values: Tensor) -> Tensor:
        return values.mean(0) if self.by_position else values.flatten(0, 1).mean(0, keepdim=True)

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        assert kept is not None
        return at.pick(kept if self.by_position else kept.expand(int(at.positions.max()) + 1, *kept.shape[1:]))

    def __str__(self) -> str:
        return f"the mean over {len(self.prompts)} prompts{' position by position' if self.by_position else ''}"


@dataclass(frozen=True)
class Resample(Change):
    """The value of one of several prompts, drawn once by the seed."""

    prompts: tuple[Ids, ...]  # type: ignore[assignment]
    seed: int = 0

    @classmethod
    def of_prompts(cls, lens: Lens, prompts: Prompt, seed: int = 0) -> "Resample":
        return cls(ids(lens, prompts), seed)

    def of(self, values: Tensor) -> Tensor:
        drawn = torch.randint(len(values), (), generator=torch.Generator().manual_seed(self.seed))
        return values[int(drawn)]

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        assert kept is not None
        return at.pick(kept)

    def __str__(self) -> str:
        return f"the value of one of {len(self.prompts)} prompts (seed {self.seed})"


@dataclass(frozen=True)
class Noise(Change):
    """Gaussian noise added, of `scale` times the standard deviation of the token embeddings (Meng et al. 2022, arXiv
    2202.05262, section 2.1, which takes 3).

    The same numbers at the same place for the same seed, whatever else is changed.
    """

    scale: int | float = 3.0
    seed: int = 0
    unit: float = 1.0

    @classmethod
    def of_lens(cls, lens: Lens, scale: int | float = 3.0, seed: int = 0) -> "Noise":
        return cls(scale, seed, float(lens.W_E.float().std()))

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        noise = torch.zeros(int(at.positions.max()) + 1, *at.rest)
        for position in at.positions.tolist():
            draw = torch.Generator().manual_seed(hash((self.seed, position, *at.name.encode())) % 2**63)
            noise[position] = torch.randn(at.rest, generator=draw)
        return old + self.scale * self.unit * at.pick(noise.to(old.device, old.dtype))

    def __str__(self) -> str:
        return f"noise of {self.scale} x {self.unit:.3g} added (seed {self.seed})"


@dataclass(frozen=True)
class Apply(Change):
    """Any function of the numbers there, [position, the chosen rest]."""

    fn: Callable[[Tensor], Tensor]

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        return self.fn(old)

    def __str__(self) -> str:
        return f"{getattr(self.fn, '__name__', self.fn)}(it)"


@dataclass(frozen=True)
class Put(Change):
    """A number everywhere, or a vector along the last axis."""

    value: tuple[float, ...] | int | float

    def __post_init__(self) -> None:
        if not isinstance(self.value, int | float):
            object.__setattr__(self, "value", numbers(self.value))

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        if isinstance(self.value, int | float):
            return torch.full_like(old, self.value)
        return vector(self.value, old).expand_as(old)


@dataclass(frozen=True)
class Scale(Change):
    """The same numbers times a factor."""

    factor: int | float

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        return old * self.factor


@dataclass(frozen=True)
class Add(Change):
    """`scale` times a direction added along the last axis."""

    direction: tuple[float, ...]
    scale: int | float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", numbers(self.direction))

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        return old + self.scale * vector(self.direction, old)

    def __str__(self) -> str:
        return f"{self.scale} x a direction of {len(self.direction)} added"


@dataclass(frozen=True)
class Remove(Change):
    """The part along a direction of the last axis taken out: x - (x·u)u for its unit vector u."""

    direction: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", numbers(self.direction))
        if not any(self.direction):
            raise PatchError("the direction to remove is zero")

    def new(self, old: Tensor, at: Where, kept: Tensor | None) -> Tensor:
        unit = torch.nn.functional.normalize(vector(self.direction, old), dim=0)
        return old - (old @ unit).unsqueeze(-1) * unit

    def __str__(self) -> str:
        return f"a direction of {len(self.direction)} removed"


CHANGES = {kind.__name__: kind for kind in (Swap, Zero, Mean, Resample, Noise, Apply, Put, Scale, Add, Remove)}


def ids(lens: Lens, prompts: Prompt) -> tuple[Ids, ...]:
    """The token ids of one prompt or several, each without its padding."""
    tokens, mask = lens.to_batch(prompts)
    real = torch.ones_like(tokens) if mask is None else mask
    return tuple(tuple(row[keep.bool()].tolist()) for row, keep in zip(tokens, real, strict=True))


def numbers(direction: Any) -> tuple[float, ...]:
    """A vector as plain numbers."""
    listed = direction.detach().flatten().tolist() if isinstance(direction, Tensor) else direction
    return tuple(float(x) for x in listed)


def vector(direction: Sequence[float], like: Tensor) -> Tensor:
    if like.shape[-1] != len(direction):
        raise PatchError(f"a vector of {len(direction)} for a place that is {like.shape[-1]} wide")
    return torch.tensor(direction, dtype=like.dtype, device=like.device)


def to_data(change: Change) -> dict[str, Any]:
    """A change as what JSON can say; PatchError for a function that cannot be found again by its name."""
    data: dict[str, Any] = {"kind": type(change).__name__, **vars(change)}
    if isinstance(change, Apply):
        name = f"{change.fn.__module__}:{getattr(change.fn, '__qualname__', '?')}"
        if found(name) is not change.fn:
            raise PatchError(f"Apply({name}) cannot be saved: give a function that stands by name in a module")
        data["fn"] = name
    return data


def from_data(data: dict[str, Any]) -> Change:
    """The change that `to_data` wrote."""
    fields = {name: deep(value) for name, value in data.items() if name != "kind"}
    if data["kind"] not in CHANGES:
        raise PatchError(f"no change is called {data['kind']!r}; there are {', '.join(CHANGES)}")
    if data["kind"] == "Apply":
        fields["fn"] = found(data["fn"])
        if fields["fn"] is None:
            raise PatchError(f"there is no function {data['fn']} here")
    return CHANGES[data["kind"]](**fields)


def deep(value: Any) -> Any:
    return tuple(map(deep, value)) if isinstance(value, list) else value


def found(name: str) -> Any:
    """The function "module:name", or None."""
    module, _, path = name.partition(":")
    try:
        thing = importlib.import_module(module)
        for part in path.split("."):
            thing = getattr(thing, part)
    except (ImportError, AttributeError):
        return None
    return thing
