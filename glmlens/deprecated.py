"""Aliases for public names of the last release, each with a DeprecationWarning that gives the new name."""

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def resolve_old_names(module: str, new_names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for `module` that maps each old name to its new one, "package.module.name".

    The new object is imported when the old name is used, so that an alias may refer to a package above this one.
    Any other name raises AttributeError.
    """

    def __getattr__(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", new_names[name])
        # Imported here and not above: the new module may import this one's package.
        target, _, attribute = new_names[name].rpartition(".")
        return getattr(import_module(target), attribute)

    return __getattr__


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Issue a DeprecationWarning that `old` is now called `new`, at the line that called this function's caller."""
    text = f"{old} is now called {new}; the old name will be removed in the next release"
    warnings.warn(text, DeprecationWarning, stacklevel)


def rename_keyword(old: str, new: str) -> Callable[[Callable[Parameters, Result]], Callable[Parameters, Result]]:
    """Return a decorator that lets a function accept the keyword `old` for `new`, with a DeprecationWarning.

    Both keywords in one call raise TypeError.
    """

    def decorate(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
        @functools.wraps(function)
        def call(*args: Any, **keywords: Any) -> Result:
            if old in keywords:
                if new in keywords:
                    raise TypeError(f"{function.__name__}() got both {old}= and {new}=; {new}= is the name")
                warn_renamed(f"{function.__name__}({old}=)", f"{new}=")
                keywords[new] = keywords.pop(old)
            return function(*args, **keywords)

        return call

    return decorate


def rename_method(old: str, new: str) -> Callable[..., Any]:
    """Return a method `old` that calls the method `new`, with a DeprecationWarning."""

    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", f".{new}")
        return getattr(self, new)(*args, **keywords)

    call.__name__ = old
    call.__doc__ = f"Deprecated: use `{new}`."
    return call


def rename_attribute(old: str, new: str) -> Any:
    """Return a property `old` that reads the attribute `new`, with a DeprecationWarning."""

    def get(self: Any) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", f".{new}")
        return getattr(self, new)

    return property(get, doc=f"Deprecated: use `{new}`.")
