"""Read whole numbers from arguments (layers, heads, positions, steps): of Python, numpy or torch, slices and masks."""

from collections.abc import Iterable, Mapping
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

if TYPE_CHECKING:
    Integer = SupportsIndex
    Integers = SupportsIndex | Iterable[Any] | slice | None
else:  # at run time the functions below check, and raise errors of their own
    Integer = Integers = Any


def read_integer(
    asked: Any,
    what: str,
    *,
    least: int | None = None,
    size: int | None = None,
    error: type[Exception] = ValueError,
    outside: type[Exception] | None = None,
) -> int:
    """Return one whole number from an int, a numpy integer or an integer tensor without axes.

    `least` is the smallest number allowed; with `size`, the number must be in 0 to size - 1. Raises `error` for any
    other value (True, 5.9, "56", several numbers) and `outside`, by default the same class, for a number out of range.
    """
    value = as_python(asked)
    # bool is an int to Python; True as a layer is a mistake.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise error(f"{what} is {shorten(asked)}: give one whole number")
    number = int(index(value))
    limit = least if size is None else 0
    if size is not None and not 0 <= number < size:
        raise (outside or error)(f"{what} {number} asked for; there are {size}, 0 to {size - 1}")
    if limit is not None and number < limit:
        raise (outside or error)(f"{what} is {number}; expected at least {limit}")
    return number


def read_integers(
    asked: Any,
    what: str,
    *,
    size: int | None = None,
    mask_size: int | None = None,
    negative: bool = False,
    named: bool = False,
    error: type[Exception] = ValueError,
    outside: type[Exception] | None = None,
) -> tuple[Any, ...]:
    """Return whole numbers, in the order given, from one number, several, a slice or a mask.

    Several are a list, range, array, tensor or set. With `size`, numbers must be in 0 to size - 1, a slice selects from
    these, and a mask must have that many entries; `mask_size` is the size for slices and masks only. Without a size a
    mask, or a slice without an end, is an error. `negative` allows numbers below 0 (with `size`, those that count from
    the end) and `named` allows strings, which are returned as they are. Raises `error` for an empty selection and for
    anything that is no whole number, and `outside`, by default the same class, for a number out of range.
    """
    value = as_python(asked)
    known = size if mask_size is None else mask_size
    if isinstance(value, slice):
        value = expand_slice(value, what, known, error)
    listed = split_values(value, named)
    if listed is None:
        raise error(f"{what} is {shorten(asked)}: give whole numbers, 3 or [3, 5] or range(3, 9)")
    # Booleans alone are a mask; booleans among numbers are an error below.
    if listed and all(isinstance(one, bool) for one in listed):
        listed = read_mask(listed, what, known, error)
    for one in listed:
        if isinstance(one, bool) or not (hasattr(one, "__index__") or (named and isinstance(one, str))):
            raise error(f"{what} holds {shorten(one)}: give whole numbers, 3 or [3, 5] or range(3, 9)")
    numbers = tuple(one if isinstance(one, str) else int(index(one)) for one in listed)
    if not numbers:
        raise error(f"{what} came out empty: give at least one, or leave {what}= out to mean all")
    # With `negative` and a size, -size is the first index; without a size no number is too small.
    below = [n for n in numbers if not isinstance(n, str) and n < (-(size or 0) if negative and size else 0)]
    if below and (size is not None or not negative):
        raise (outside or error)(f"{what} {below[0]} asked for: these are counted from 0; give whole numbers from 0")
    above = [n for n in numbers if size is not None and not isinstance(n, str) and n >= size]
    if above:
        raise (outside or error)(f"{what} {above[0]} asked for; there are {size}, 0 to {(size or 0) - 1}")
    return numbers


def as_python(asked: Any) -> Any:
    """Return a tensor, an array or a numpy number as Python numbers and lists; anything else is returned unchanged."""
    return asked.tolist() if hasattr(asked, "tolist") else asked


def split_values(value: Any, named: bool) -> list[Any] | None:
    """Return one or several values as a list, and None if `value` cannot be any (a bool, bytes, a mapping)."""
    if isinstance(value, bool | bytes | bytearray | Mapping) or (isinstance(value, str) and not named):
        return None
    if isinstance(value, str) or hasattr(value, "__index__"):
        return [value]
    return [as_python(one) for one in value] if isinstance(value, Iterable) else None


def expand_slice(asked: slice, what: str, size: int | None, error: type[Exception]) -> range:
    """Return the numbers of a slice of range(size); without a size, the slice must have an end of its own."""
    ends = [None if end is None else as_python(end) for end in (asked.start, asked.stop, asked.step)]
    if any(end is not None and (isinstance(end, bool) or not hasattr(end, "__index__")) for end in ends):
        raise error(f"{what} is {asked}: the ends of a slice must be whole numbers")
    # With a size, Python's own rules: slice(-2, None) are the last two.
    if size is not None:
        return range(*slice(*ends).indices(size))
    start, stop, step = ends
    start = start or 0
    step = 1 if step is None else step
    if stop is None or start < 0 or stop < 0 or step < 1:
        raise error(f"{what} is {asked}, and its end is not known here: give numbers, as range(3, 9)")
    return range(start, stop, step)


def read_mask(mask: list[bool], what: str, size: int | None, error: type[Exception]) -> list[int]:
    """Return the indices of a mask that are True. Raises `error` unless the mask has `size` entries."""
    if size is None:
        raise error(
            f"{what} is a mask of {len(mask)} times True or False, and the number of places is unknown here: give the "
            "numbers of those that are True, mask.nonzero().flatten()"
        )
    if len(mask) != size:
        raise error(f"{what} is a mask of {len(mask)}; there are {size}")
    return [i for i, selected in enumerate(mask) if selected]


def shorten(asked: Any) -> str:
    """Return the repr of a value, cut to 80 characters for an error message."""
    text = repr(asked)
    return text if len(text) <= 80 else f"{text[:79]}…"
