"""Old public names, which work for one more release and warn with the new name."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def resolve_old_names(module: str, new_names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for `module` that finds each old name under its new one, "package.module.name".

    The new object is imported when the old name is used, so that an alias may point to a package above this one.
    """

    def __getattr__(name: str) -> Any:
        if name not in new_names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", new_names[name])
        target, _, attribute = new_names[name].rpartition(".")
        return getattr(import_module(target), attribute)

    return __getattr__


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """Warn the caller of the caller that `old` is now called `new`."""
    warnings.warn(f"{old} is now called {new}; the old name goes with the next release", DeprecationWarning, stacklevel)
