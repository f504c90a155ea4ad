"""Changes: what to put at a place, as plain data that can be printed, compared and saved."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from glmlens.lens import Lens
from glmlens.patch.sites import PatchError
from glmlens.text.prompt_kinds import is_whole_number
from glmlens.text.prompts import Prompt

TokenIds = tuple[int, ...]
Functions = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class ChangeTarget:
    """The place that a change is applied to; its numbers are [position, chosen rest].

    `positions` are absolute and `widths` the full sizes of the axes after them. At a point with axes query, head and
    key, `widths` is that of head alone and `keys` are the absolute positions of the chosen keys. `select` takes these
    places from a tensor over all positions, [pos, rest]; `choose` from one that has these positions (and keys) alone.
    """

    name: str
    positions: Tensor
    widths: tuple[int, ...]
    keys: Tensor | None
    select: Callable[[Tensor], Tensor]
    choose: Callable[[Tensor], Tensor]


class Change:
    """What is put at a place; `replace_values` computes it.

    `prompts` are run to record values that the change uses. With `needs_same_length` they must be as long as the prompt
    that is changed. `mixes_positions` is whether new numbers at a position may depend on those at other positions.
    """

    prompts: tuple[TokenIds, ...] = ()
    needs_same_length: ClassVar[bool] = True
    mixes_positions: ClassVar[bool] = True

    def in_lens(self, lens: Lens) -> "Change":
        """Return this change with what it takes from the model filled in."""
        return self

    def reduce_source(self, values: Tensor) -> Tensor:
        """Reduce the values [prompt, pos, rest] of its prompts to the source of the change: [pos or 1, rest]."""
        return values[0]

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        """Return the numbers instead of `old`, of the same shape; `source` is what `reduce_source` returned."""
        raise NotImplementedError

    def __str__(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Swap(Change):
    """The value of another run at the same place; without tokens, of the run that a sweep pairs this one with.

    Raise PatchError for tokens that are not the ids of one prompt.
    """

    mixes_positions = False
    tokens: TokenIds | Any = ()  # also a list or tensor of ids

    def __post_init__(self) -> None:
        if not (isinstance(self.tokens, tuple) and not self.tokens):
            rows = rows_of_ids(self.tokens, "Swap", "Swap.of_prompt(lens, prompt)")
            object.__setattr__(self, "tokens", require_one_row(rows, "Swap"))

    @classmethod
    def of_prompt(cls, lens: Lens, prompt: Prompt) -> "Swap":
        return cls(require_one_row(to_token_ids(lens, prompt), "Swap.of_prompt"))

    @property
    def prompts(self) -> tuple[TokenIds, ...]:  # type: ignore[override]
        return (self.tokens,) if self.tokens else ()

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        if source is None:
            raise PatchError("Swap() names no run: outside a sweep give Swap.of_prompt(lens, prompt)")
        return target.select(source)

    def __str__(self) -> str:
        return f"the value of {'a run of ' + str(len(self.tokens)) + ' tokens' if self.tokens else 'the other run'}"


@dataclass(frozen=True)
class Zero(Change):
    """Zero."""

    mixes_positions = False

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        return torch.zeros_like(old)


@dataclass(frozen=True)
class Mean(Change):
    """The mean of the values of prompts, over their positions too unless `by_position`.

    Raise PatchError for prompts that are not rows of token ids.
    """

    mixes_positions = False
    prompts: tuple[TokenIds, ...] | Any = ()  # type: ignore[assignment]
    by_position: bool = False

    def __post_init__(self) -> None:
        rows = rows_of_ids(self.prompts, "Mean", "Mean.of_prompts(lens, prompts)")
        object.__setattr__(self, "prompts", rows)

    @classmethod
    def of_prompts(cls, lens: Lens, prompts: Prompt, by_position: bool = False) -> "Mean":
        return cls(to_token_ids(lens, prompts), by_position)

    @property
    def needs_same_length(self) -> bool:  # type: ignore[override]
        return self.by_position

    def reduce_source(self, values: Tensor) -> Tensor:
        return values.mean(0) if self.by_position else values.flatten(0, 1).mean(0, keepdim=True)

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        assert source is not None
        return target.select(
            source if self.by_position else source.expand(int(target.positions.max()) + 1, *source.shape[1:])
        )

    def __str__(self) -> str:
        return f"the mean over {len(self.prompts)} prompts{' position by position' if self.by_position else ''}"


@dataclass(frozen=True)
class Resample(Change):
    """The values of one of several prompts, drawn once by the seed.

    Raise PatchError for prompts that are not rows of token ids.
    """

    mixes_positions = False
    prompts: tuple[TokenIds, ...] | Any = ()  # type: ignore[assignment]
    seed: int | Any = 0

    def __post_init__(self) -> None:
        rows = rows_of_ids(self.prompts, "Resample", "Resample.of_prompts(lens, prompts)")
        object.__setattr__(self, "prompts", rows)
        object.__setattr__(self, "seed", read_whole_number(self.seed, "Resample: seed"))

    @classmethod
    def of_prompts(cls, lens: Lens, prompts: Prompt, seed: int = 0) -> "Resample":
        return cls(to_token_ids(lens, prompts), seed)

    def reduce_source(self, values: Tensor) -> Tensor:
        drawn = torch.randint(len(values), (), generator=torch.Generator().manual_seed(self.seed))
        return values[int(drawn)]

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        assert source is not None
        return target.select(source)

    def __str__(self) -> str:
        return f"the value of one of {len(self.prompts)} prompts (seed {self.seed})"


@dataclass(frozen=True)
class Noise(Change):
    """Gaussian noise added, of `scale` times the standard deviation of the model's token embeddings.

    Meng et al. 2022, arXiv 2202.05262, section 2.1, which takes 3. With `unit`, the standard deviation is `scale` times
    that number instead. The noise is a function of the seed, the name of the point, the
    absolute position (at attention's scores and pattern also of the key's) and the width of the point: it is the same
    in a forward, a generation and a sweep, for every prompt, and with any other changes. For other noise in other
    prompts give other seeds. It is drawn on the CPU in float32, the same for every device and dtype.
    """

    mixes_positions = False
    scale: int | float | Any = 3.0
    seed: int | Any = 0
    unit: float | Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", number(self.scale, "Noise: scale"))
        object.__setattr__(self, "seed", read_whole_number(self.seed, "Noise: seed"))
        if self.unit is not None:
            object.__setattr__(self, "unit", number(self.unit, "Noise: unit"))

    @classmethod
    def of_lens(cls, lens: Lens, scale: int | float = 3.0, seed: int = 0) -> "Noise":
        """Return noise with the standard deviation of this model's embeddings as its unit."""
        return cls(scale, seed, float(lens.W_E.float().std()))

    def in_lens(self, lens: Lens) -> "Noise":
        return self if self.unit is not None else replace(self, unit=float(lens.W_E.float().std()))

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        assert self.unit is not None, "the change of an intervention that has not been compiled"
        noise = torch.stack([self.draw_position(target, position) for position in target.positions.tolist()])
        return old + self.scale * self.unit * target.choose(noise.to(old.device, old.dtype))

    def draw_position(self, at: ChangeTarget, position: int) -> Tensor:
        """Return standard normal numbers at one position: [rest], or at an attention pattern [head, chosen keys]."""
        if at.keys is None:
            return torch.randn(at.widths, generator=self.make_generator(at.name, position))
        # Drawn in blocks of keys by absolute position, so that a key has the same noise however many there are.
        blocks, places = at.keys // BLOCK, at.keys % BLOCK
        noise = torch.empty(len(at.keys), *at.widths)
        for block in set(blocks.tolist()):
            draw = self.make_generator(at.name, position, block)
            here = (blocks == block).cpu()
            noise[here] = torch.randn(BLOCK, *at.widths, generator=draw)[places.cpu()[here]]
        return noise.movedim(0, -1)

    def make_generator(self, *place: Any) -> torch.Generator:
        """Return a generator whose seed is a hash of this seed and the place."""
        digest = hashlib.sha256(repr((self.seed, *place)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # 63 bits

    def __str__(self) -> str:
        unit = "standard deviation of the embeddings" if self.unit is None else f"{self.unit:.3g}"
        return f"noise of {self.scale} x {unit} added (seed {self.seed})"


BLOCK = 64  # keys for which noise is drawn at once


@dataclass(frozen=True)
class Apply(Change):
    """Any function of the numbers there, fn(x [position, chosen rest]) -> numbers of the same shape and dtype.

    `key` identifies it in a sweep's checkpoint, where its code, closure and globals cannot.
    """

    fn: Callable[[Tensor], Tensor] | Any
    key: str | None = None

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise PatchError(
                f"Apply({self.fn!r}): expected a function of the numbers there, such as Apply(lambda x: x / 2)"
            )

    def __hash__(self) -> int:
        try:
            return hash((Apply, self.fn, self.key))
        except TypeError:  # a callable that compares by its fields and has no hash
            return hash((Apply, type(self.fn), self.key))

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Any:
        return self.fn(old)

    def __str__(self) -> str:
        return f"{name_of(self.fn)}(it)"


def name_of(fn: Any) -> str:
    """Return the name of a function, or of the class of another callable."""
    return str(getattr(fn, "__name__", None) or type(fn).__name__)


@dataclass(frozen=True)
class Put(Change):
    """One number everywhere, or a vector along the last axis."""

    mixes_positions = False
    value: tuple[float, ...] | int | float | Any

    def __post_init__(self) -> None:
        value = number(self.value, "Put", finite=False) if is_single(self.value) else to_float_tuple(self.value, "Put")
        object.__setattr__(self, "value", value)

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        if isinstance(self.value, int | float):
            return torch.full_like(old, self.value)
        return to_tensor_like(self.value, old).expand_as(old)


@dataclass(frozen=True)
class Scale(Change):
    """The numbers there times a factor."""

    mixes_positions = False
    factor: int | float | Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "factor", number(self.factor, "Scale: factor"))

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        return old * self.factor


@dataclass(frozen=True)
class Add(Change):
    """`scale` times a direction added along the last axis."""

    mixes_positions = False
    direction: tuple[float, ...] | Any
    scale: int | float | Any = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", to_float_tuple(self.direction, "Add: direction"))
        object.__setattr__(self, "scale", number(self.scale, "Add: scale"))

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        return old + self.scale * to_tensor_like(self.direction, old)

    def __str__(self) -> str:
        return f"{self.scale} x a direction of {len(self.direction)} added"


@dataclass(frozen=True)
class Remove(Change):
    """A direction of the last axis projected out: x - (x·u)u for its unit vector u."""

    mixes_positions = False
    direction: tuple[float, ...] | Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "direction", to_float_tuple(self.direction, "Remove: direction"))
        if not any(self.direction):
            raise PatchError("the direction to remove is zero")

    def replace_values(self, old: Tensor, target: ChangeTarget, source: Tensor | None) -> Tensor:
        unit = torch.nn.functional.normalize(to_tensor_like(self.direction, old), dim=0)
        return old - (old @ unit).unsqueeze(-1) * unit

    def __str__(self) -> str:
        return f"a direction of {len(self.direction)} removed"


CHANGE_TYPES = {kind.__name__: kind for kind in (Swap, Zero, Mean, Resample, Noise, Apply, Put, Scale, Add, Remove)}


def as_change(change: Any) -> Change:
    """Return a change; raise PatchError for anything else, such as the class without its brackets."""
    if isinstance(change, Change):
        return change
    if isinstance(change, type) and issubclass(change, Change):
        raise PatchError(f"{change.__name__} is a kind of change: make one, {change.__name__}(...)")
    if callable(change):
        raise PatchError(f"{name_of(change)} is a function: as a change it is Apply({name_of(change)})")
    raise PatchError(f"{change!r:.60} is no change; the changes are {', '.join(CHANGE_TYPES)}")


def to_token_ids(lens: Lens, prompts: Prompt) -> tuple[TokenIds, ...]:
    """Return the token ids of one prompt or several, each without its padding."""
    tokens, mask = lens.to_batch(prompts)
    real = torch.ones_like(tokens) if mask is None else mask
    return tuple(tuple(row[keep.bool()].tolist()) for row, keep in zip(tokens, real, strict=True))


def rows_of_ids(rows: Any, what: str, instead: str) -> tuple[TokenIds, ...]:
    """Return rows of token ids as tuples, from one row or several; raise PatchError that names `instead` otherwise."""
    plain: Any = rows.tolist() if isinstance(rows, Tensor | np.ndarray) else rows
    listed = list(plain) if isinstance(plain, Sequence) and not isinstance(plain, str | bytes) else [plain]
    if listed and all(is_whole_number(i) for i in listed):
        listed = [listed]
    if not listed:
        raise PatchError(f"{what} is of no prompt: type {instead}")
    ids = []
    for row in listed:
        row = row.tolist() if isinstance(row, Tensor | np.ndarray) else row
        if not isinstance(row, list | tuple) or not row or not all(is_whole_number(i) for i in row):
            raise PatchError(f"{what} holds token ids, not {rows!r:.60}: for a prompt of any kind type {instead}")
        ids.append(tuple(int(i) for i in row))
    return tuple(ids)


def require_one_row(rows: Sequence[TokenIds], what: str) -> TokenIds:
    """Return the only row; raise PatchError for several."""
    if len(rows) != 1:
        raise PatchError(f"{what} takes one prompt, not {len(rows)}: for several there are Mean and Resample")
    return rows[0]


def read_whole_number(x: Any, what: str) -> int:
    """Return a whole number as an int; raise PatchError for anything else."""
    if not is_whole_number(x):
        raise PatchError(f"{what} is {x!r:.60}; expected a whole number")
    return int(x)


def is_single(x: Any) -> bool:
    """Whether this is one number (or a bool), and not several."""
    return isinstance(x, int | float | np.number | np.bool_) or (isinstance(x, Tensor | np.ndarray) and x.ndim == 0)


def number(x: Any, what: str, *, finite: bool = True) -> int | float:
    """Return one number of Python's; raise PatchError for a bool, a text, nan and, if `finite`, infinity."""
    plain = x.item() if isinstance(x, Tensor | np.ndarray | np.generic) and is_single(x) else x
    if isinstance(plain, bool) or not isinstance(plain, int | float):
        raise PatchError(f"{what} is {x!r:.60}; expected a number")
    if math.isnan(plain) or (finite and math.isinf(plain)):
        raise PatchError(f"{what} is {plain}; expected a {'finite number' if finite else 'number'}")
    return plain


def to_float_tuple(direction: Any, what: str) -> tuple[float, ...]:
    """Return a vector as plain numbers; raise PatchError for a single number, a text, a matrix, nan and infinity."""
    plain: Any = direction.detach() if isinstance(direction, Tensor) else direction
    plain = plain.tolist() if isinstance(plain, Tensor | np.ndarray) else plain
    if isinstance(plain, str | bytes | Mapping) or not isinstance(plain, Sequence):
        raise PatchError(
            f"{what} is {direction!r:.60}; expected a vector along the last axis. "
            "For a function of the numbers there is Apply(lambda x: ...)"
        )
    if not plain:
        raise PatchError(f"{what} is an empty vector")
    if not all(is_single(x) for x in plain):
        shape = tuple(direction.shape) if isinstance(direction, Tensor | np.ndarray) else f"{direction!r:.60}"
        raise PatchError(f"{what} is {shape}; expected one vector, as wide as the last axis")
    return tuple(float(number(x, what)) for x in plain)


def to_tensor_like(direction: Sequence[float], like: Tensor) -> Tensor:
    """Return a vector as a tensor with dtype and device of `like`; raise PatchError for another width."""
    if like.shape[-1] != len(direction):
        raise PatchError(f"a vector of {len(direction)} for a place that is {like.shape[-1]} wide")
    return torch.tensor(direction, dtype=like.dtype, device=like.device)


def change_to_json(change: Change, functions: Functions) -> dict[str, Any]:
    """Return a change as JSON data: a function by its name in `functions`, or else by its own.

    Raise PatchError for a kind of change that is not in CHANGE_TYPES, and for a function without a name.
    """
    if type(change) not in CHANGE_TYPES.values():
        raise PatchError(
            f"a {type(change).__name__} cannot be saved; the changes that can are {', '.join(CHANGE_TYPES)}"
        )
    data: dict[str, Any] = {"kind": type(change).__name__, **vars(change)}
    if isinstance(change, Apply):
        given = [name for name, fn in functions.items() if fn is change.fn]
        data["fn"] = given[0] if given else getattr(change.fn, "__name__", "<lambda>")
        if data["fn"] == "<lambda>":
            raise PatchError(
                f"{change} cannot be saved: name its function, save_interventions(..., functions={{'name': fn}})"
            )
    return data


def change_from_json(data: dict[str, Any], functions: Functions) -> Change:
    """Return the change that `change_to_json` wrote; functions are taken from `functions` alone."""
    kind = data.get("kind")
    if kind not in CHANGE_TYPES:
        raise PatchError(f"no change is called {kind!r}; there are {', '.join(CHANGE_TYPES)}")
    fields = {name: to_nested_tuple(value) for name, value in data.items() if name != "kind"}
    if kind == "Apply":
        name = str(fields.get("fn"))
        short = name.rpartition(":")[2]  # older files say "module:name"
        if name not in functions and short not in functions:
            raise PatchError(
                f"the file applies a function called {name!r}, which it does not hold: give it by its name, "
                f"load_interventions(..., functions={{{short!r}: {short}}})"
            )
        fields["fn"] = functions.get(name, functions.get(short))
    try:
        return CHANGE_TYPES[kind](**fields)
    except TypeError as e:
        raise PatchError(f"a {kind} with {', '.join(fields) or 'nothing'}: {e}") from None


def to_nested_tuple(value: Any) -> Any:
    """Return lists, at any depth, as tuples."""
    return tuple(map(to_nested_tuple, value)) if isinstance(value, list) else value
