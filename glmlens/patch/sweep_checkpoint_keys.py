"""Keys of functions and data: hashes that are equal in every process for equal code and data, and differ otherwise.

A function is hashed by its code, constants, defaults, the values that it closes over and the globals that it reads.
Functions of the standard library and of the packages in LIBRARIES are hashed by name, tensors by their numbers.
"""

import dis
import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glmlens.errors import GlmlensError
from glmlens.lens import Lens
from glmlens.lens.weights import ModelHash
from glmlens.model import GLM
from glmlens.patch.sites import PatchError
from glmlens.text.tokenizer import Tokenizer

LIBRARIES = frozenset(sys.stdlib_module_names) - {"__main__"} | {
    "einops", "glmlens", "jaxtyping", "numpy", "scipy", "torch", "typing_extensions"
}  # fmt: skip
BOOKKEEPING = frozenset(
    "__module__ __qualname__ __doc__ __dict__ __weakref__ __annotations__ __annotate__ __annotate_func__ "
    "__annotations_cache__ __dataclass_fields__ __dataclass_params__ __match_args__ __firstlineno__ "
    "__static_attributes__ __abstractmethods__ _abc_impl __parameters__ __orig_bases__ __slots__".split()
)  # attributes of a class that do not affect what it computes


class UnkeyableError(GlmlensError, TypeError):
    """Something that cannot be hashed reliably; the message names it."""


def key_of(thing: Any) -> str:
    """Return 64 hex digits that differ for code or data that differs from `thing`.

    Raise UnkeyableError for open files, generators and extension objects that cannot be pickled.
    """
    return Hasher().digest(thing).hex()


def key_or_refuse(thing: Any, what: str, instead: str) -> str:
    """Return `key_of(thing)`; raise PatchError that `what` has no key, with what to type `instead`."""
    try:
        return key_of(thing)
    except UnkeyableError as e:
        raise PatchError(
            f"{what} has no key that would tell it from another, and a checkpoint needs one ({e}): {instead}"
        ) from None


class Hasher:
    """Hash nested things. What contains itself, and a function or class that occurs again, is hashed as a number."""

    def __init__(self) -> None:
        self.inside: list[Any] = []
        self.seen: list[types.FunctionType | type] = []

    def digest(self, thing: Any) -> bytes:
        """Return the digest of a thing from those of its parts; raise UnkeyableError for what has none."""
        for kind, known in (("inside", self.inside), ("seen", self.seen)):
            again = next((i for i, other in enumerate(known) if other is thing), None)
            if again is not None:
                return hash_parts(kind, str(again).encode())
        if isinstance(thing, types.FunctionType | type):
            self.seen.append(thing)
        self.inside.append(thing)
        try:
            kind, *parts = self.parts(thing)
            return hash_parts(str(kind), *(part if isinstance(part, bytes) else self.digest(part) for part in parts))
        except RecursionError:
            raise UnkeyableError("it is nested too deeply") from None
        finally:
            self.inside.pop()

    def parts(self, thing: Any) -> tuple[Any, ...]:
        """Return the name of a thing's kind, then its parts: bytes, or things with parts of their own."""
        kind = type(thing)
        if thing is None or thing is Ellipsis or thing is NotImplemented or kind in (bool, int, float, complex):
            return kind.__name__, repr(thing).encode()
        if kind in (str, bytes, bytearray):
            return kind.__name__, thing.encode(errors="surrogatepass") if kind is str else bytes(thing)
        if kind in (tuple, list):
            return (kind.__name__, *thing)
        if kind in (set, frozenset):
            return (kind.__name__, *sorted(map(self.digest, thing)))
        if kind in (dict, types.MappingProxyType):
            pairs = sorted(thing.items()) if all(type(name) is str for name in thing) else list(thing.items())
            return "mapping", pairs
        if isinstance(thing, Tensor):
            return "tensor", str(thing.dtype), tuple(thing.shape), tensor_bytes(thing)
        if isinstance(thing, np.ndarray) and thing.dtype.kind != "O":
            return "array", str(thing.dtype), thing.shape, np.ascontiguousarray(thing).tobytes()
        if isinstance(thing, torch.dtype | torch.device | torch.Size):
            return "torch", str(thing)
        if isinstance(thing, Lens):
            return "lens", thing.model_hash, thing.tokenizer_hash, [splice.coder for splice in thing.dictionaries]
        if isinstance(thing, Tokenizer):
            return "tokenizer", thing.fingerprint()
        if isinstance(thing, GLM):
            return "model", ModelHash().of(thing)
        return self.code_parts(thing)

    def code_parts(self, thing: Any) -> tuple[Any, ...]:
        """Return the parts of code, functions, methods, classes, modules, and last of all other objects."""
        if isinstance(thing, types.CodeType):
            return (
                "code", thing.co_code, thing.co_consts, thing.co_names, thing.co_varnames, thing.co_freevars,
                thing.co_cellvars, thing.co_argcount, thing.co_posonlyargcount, thing.co_kwonlyargcount,
                thing.co_flags, getattr(thing, "co_exceptiontable", b""),
            )  # fmt: skip
        if isinstance(thing, types.FunctionType):
            return self.function_parts(thing)
        if isinstance(thing, types.MethodType):
            return "method", thing.__func__, thing.__self__
        if isinstance(thing, types.BuiltinFunctionType):
            owner = thing.__self__ if not isinstance(thing.__self__, types.ModuleType) else None
            return "builtin", str(thing.__module__), thing.__qualname__, owner
        if isinstance(thing, functools.partial):
            return "partial", thing.func, thing.args, thing.keywords
        if isinstance(thing, staticmethod | classmethod):
            return type(thing).__name__, thing.__func__
        if isinstance(thing, property):
            return "property", thing.fget, thing.fset, thing.fdel
        if isinstance(thing, types.ModuleType):
            return "module", thing.__name__, b"" if is_library(thing.__name__) else module_source(thing)
        if isinstance(thing, type):
            return self.class_parts(thing)
        return self.object_parts(thing)

    def function_parts(self, fn: types.FunctionType) -> tuple[Any, ...]:
        cells = [[] if is_empty(cell) else [cell.cell_contents] for cell in fn.__closure__ or ()]
        ours = not is_library(fn.__module__)
        if not ours and "<locals>" not in fn.__qualname__:
            return "library", fn.__module__, fn.__qualname__
        read = find_globals(fn) if ours else {}  # what a library's function reads is the library's
        return "function", fn.__code__, fn.__defaults__, fn.__kwdefaults__, cells, read

    def class_parts(self, cls: type) -> tuple[Any, ...]:
        if is_library(cls.__module__) and "<locals>" not in cls.__qualname__:
            return "library", cls.__module__, cls.__qualname__
        own = {name: value for name, value in vars(cls).items() if name not in BOOKKEEPING}
        own = {name: value for name, value in own.items() if not isinstance(value, types.MemberDescriptorType)}
        return "class", cls.__name__, list(cls.__bases__), own

    def object_parts(self, thing: Any) -> tuple[Any, ...]:
        """Of any other object, its class and the state that pickle would keep."""
        if isinstance(thing, torch.Generator | Iterator):
            raise UnkeyableError(f"a {type(thing).__name__} gives something else each time")
        try:
            reduced = thing.__reduce_ex__(4)
        except Exception as e:
            raise UnkeyableError(f"a {type(thing).__name__} cannot be told from another: {e}") from None
        if isinstance(reduced, str):  # a global of this name
            module = str(getattr(thing, "__module__", None) or type(thing).__module__)
            if is_library(module):
                return "library", module, reduced
            if hasattr(thing, "__wrapped__"):  # a function behind functools.cache
                return "wrapped", type(thing), thing.__wrapped__
            raise UnkeyableError(f"a {type(thing).__name__} is known by its name {reduced!r} alone")
        items = [list(part) if isinstance(part, Iterator) else part for part in reduced[3:]]
        return "object", reduced[0], reduced[1], reduced[2] if len(reduced) > 2 else None, items, type(thing)


def hash_parts(kind: str, *parts: bytes) -> bytes:
    """Return one digest; every part is preceded by its length, so that parts cannot be confused."""
    digest = hashlib.sha256()
    for part in (kind.encode(), *parts):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.digest()


def tensor_bytes(x: Tensor) -> bytes:
    """Return the numbers of a tensor as bytes; raise UnkeyableError for one without dense numbers."""
    if x.is_meta or x.layout != torch.strided or x.is_quantized:
        raise UnkeyableError(f"a tensor that is {'on meta' if x.is_meta else 'not dense'} has no numbers to compare")
    plain = x.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def is_empty(cell: types.CellType) -> bool:
    """Whether a closure's cell has not been assigned yet."""
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def is_library(module: str | None) -> bool:
    """Whether code of this module is hashed by name."""
    return (module or "").split(".")[0] in LIBRARIES


def find_globals(fn: types.FunctionType) -> dict[str, Any]:
    """Return the globals that a function reads, by name; of the user's other modules the attributes, as tools.scale."""
    found: dict[str, Any] = {}
    for chain in find_global_chains(fn.__code__):
        if chain[0] not in fn.__globals__:
            continue
        name, value = chain[0], fn.__globals__[chain[0]]
        for attribute in chain[1:]:
            if not isinstance(value, types.ModuleType) or is_library(value.__name__) or not hasattr(value, attribute):
                break
            name, value = f"{name}.{attribute}", getattr(value, attribute)
        found[name] = value
    return found


def find_global_chains(code: types.CodeType) -> list[tuple[str, ...]]:
    """Return the globals that code reads, each with the attributes read from it at once; code inside it included."""
    found: list[list[str]] = []
    follows = False  # whether this instruction takes an attribute of a global
    for i in dis.get_instructions(code):
        if i.opname == "IMPORT_NAME" and not is_library(i.argval):
            raise UnkeyableError(f"it imports {i.argval!r} itself, whose code may change: import it above the function")
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found.append([str(i.argval)])
            follows = True
        elif follows and i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            found[-1].append(str(i.argval))
        elif i.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            follows = False
    inner = [
        chain for const in code.co_consts if isinstance(const, types.CodeType) for chain in find_global_chains(const)
    ]
    return [*map(tuple, found), *inner]


def module_source(module: types.ModuleType) -> bytes:
    """Return the bytes of a module's file; raise UnkeyableError for a module without one."""
    try:
        return Path(str(module.__file__)).read_bytes()
    except (AttributeError, OSError):
        raise UnkeyableError(f"the module {module.__name__} has no file to compare") from None


def find_differing_keys(kept: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    """Return the names under which two mappings of keys differ, sorted."""
    return sorted(name for name in kept.keys() | asked.keys() if kept.get(name) != asked.get(name))
