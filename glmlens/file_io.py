"""Files on disk: checked before they are read, written atomically, folders locked against a second writer.

Reading never blocks (a pipe), never takes much more memory than what it returns (a device, a huge JSON) and never
unpickles. Every problem with a file is one error of class `error`, which names the file and what was found.
"""

import errno
import json
import os
import reprlib
import socket
import stat
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from glmlens.errors import GlmlensError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

MOST_JSON = 16_000_000  # bytes of a JSON file that the package saves
MOST_VALUES = 400_000  # values in it: each takes up to 300 bytes of memory
MOST_HEADER = 8_000_000  # bytes: parsing the header of a safetensors file takes up to 20 times its size
LOCK = ".glmlens-lock"
CHECKSUMS = "checksums"  # in the metadata: the CRC-32 of every tensor, in the order of their sorted names
NO_LOCKS = {
    errno.ENOSYS,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.EINVAL,
}  # errors of file systems without locks


class FileError(GlmlensError, ValueError):
    """A file that cannot be read or written; the message names it, what was found and what to do."""


Error = type[Exception]


def expand_path(path: str | Path, error: Error = FileError) -> Path:
    """Return the path with `~` and `~name` expanded. Raises `error` if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:  # no such user, or no HOME
        raise error(f"{path}: {e}: write the folder out") from e


# ---- reading ----


def refuse_strange(path: Path, most: int | None = None, error: Error = FileError) -> None:
    """Raise `error` if `path` is a folder, pipe, device or dangling link, or a file of more than `most` bytes."""
    try:
        if os.path.lexists(path) and not path.is_file():
            raise error(f"{path}: expected a file, found {describe_path(path)}")
        if most is not None and path.exists() and path.stat().st_size > most:
            raise error(f"{path}: {path.stat().st_size:,} bytes; expected {most:,} at most")
    except OSError as e:
        raise error(f"{path}: cannot be read: {e.strerror or e}") from e


def describe_path(path: Path) -> str:
    """Return what is at a path that is not a regular file, in words for an error message."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a link that leads nowhere"
    if stat.S_ISDIR(mode):
        return "a folder"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a socket" if stat.S_ISSOCK(mode) else "a device"


def refuse_missing(path: Path) -> None:
    """Raise FileNotFoundError if nothing is at `path`, not even a link."""
    if not os.path.lexists(path):
        raise FileNotFoundError(f"{path}: not found")


def read_bytes(path: Path, most: int, error: Error = FileError) -> bytes:
    """Return the content of a file of at most `most` bytes. Raises FileNotFoundError, or `error`."""
    refuse_missing(path)
    refuse_strange(path, most, error)
    try:
        # O_NONBLOCK: if a pipe has replaced the file since it was checked, opening it does not wait for a writer.
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(file, "rb") as opened:
            if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
                raise error(f"{path}: expected a file, found {describe_path(path)}")
            # One byte more than allowed: the file may have grown since its size was checked.
            data = opened.read(most + 1)
    except OSError as e:
        raise error(f"{path}: cannot be read: {e.strerror or e}") from e
    if len(data) > most:
        raise error(f"{path}: more than {most:,} bytes")
    return data


def read_json(
    path: Path, most: int = MOST_JSON, most_values: int = MOST_VALUES, error: Error = FileError
) -> dict[str, Any]:
    """Return the object in a JSON file of at most `most` bytes. Raises FileNotFoundError, or `error`."""
    return parse_json(read_bytes(path, most, error), str(path), most_values=most_values, error=error)


def parse_json(text: str | bytes, where: str, most_values: int = MOST_VALUES, error: Error = FileError) -> Any:
    """Return the object in a JSON text. `where` names it in an error."""
    # Commas bound the number of values before anything is parsed.
    values = text.count(b",") if isinstance(text, bytes) else text.count(",")
    if values > most_values:
        raise error(f"{where}: {values:,} values; expected {most_values:,} at most")
    try:
        data = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError, MemoryError) as e:
        raise error(f"{where}: not readable as JSON: {e}") from e
    if not isinstance(data, dict):
        raise error(f"{where}: expected an object, found {type(data).__name__}")
    return data


def field_of(data: Mapping[str, Any], name: str, kind: type, where: str, error: Error = FileError) -> Any:
    """Return `data[name]`, which must be of type `kind`: bool, int (0 or more), str, list or dict. Raises `error`."""
    value = data.get(name)
    if type(value) is not kind or (isinstance(value, int) and value < 0):
        raise error(f"{where}: expected {kind.__name__} as {name!r}, found {reprlib.repr(value)}")
    return value


def list_of(data: Mapping[str, Any], name: str, kind: type, where: str, error: Error = FileError) -> list[Any]:
    """Return `data[name]`, which must be a list of values of type `kind`. Raises `error`."""
    values = field_of(data, name, list, where, error=error)
    # Each value is checked as if it were the field, so that the error names the field.
    return [field_of({name: value}, name, kind, where, error=error) for value in values]


@contextmanager
def open_safetensors(path: Path, most_header: int = MOST_HEADER, error: Error = FileError) -> Iterator[Any]:
    """Open a safetensors file, memory-mapped. Problems with it, also those while it is read, are raised as `error`."""
    refuse_strange(path, None, error)
    try:
        with path.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > path.stat().st_size:
            raise error(f"{path}: not a whole safetensors file: its first 8 bytes give a header of {header:,} bytes")
        if header > most_header:  # safetensors would take 20 times its size in memory to parse it
            raise error(f"{path}: a header of {header:,} bytes; expected {most_header:,} at most")
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, MemoryError) as e:
        size = f" ({path.stat().st_size:,} bytes)" if path.exists() else ""
        raise error(f"{path}{size}: not a whole safetensors file: {e}") from e


class TensorFile:
    """The tensors of a safetensors file, each read, checked against its checksum and copied when it is requested.

    `header` is the SHA-256 of everything before the numbers: names, dtypes, shapes, metadata and checksums. With
    checksums, two files with the same header hold the same numbers. Raises FileNotFoundError, or `error`.
    """

    def __init__(self, path: Path, error: Error = FileError):
        refuse_missing(path)
        with open_safetensors(path, error=error):  # checks its size and header
            pass
        self.path = path
        self.error = error
        self.opened = path.stat()
        self.header = hash_header(path)
        self.file = safe_open(path, framework="pt")
        self.names: list[str] = sorted(self.file.keys())
        self.metadata: dict[str, str] = self.file.metadata() or {}
        checksums = self.metadata.get(CHECKSUMS, "").split()
        if CHECKSUMS in self.metadata and len(checksums) != len(self.names):
            raise error(f"{path}: {len(checksums)} checksums for {len(self.names)} tensors: it is not as it was saved")
        self.checksums = dict(zip(self.names, checksums, strict=False))

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def expect_format(self, name: str, what: str) -> None:
        """Raise an error, "<path> <what> that glmlens saved", unless the metadata has this format."""
        if self.metadata.get("format") != name:
            raise self.error(f"{self.path} {what} that glmlens saved")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self.file.get_slice(name).get_shape())

    def outline(self, name: str) -> Tensor:
        """Return an empty tensor of the same shape and dtype on the meta device, without reading numbers."""
        return torch.empty_like(self.file.get_tensor(name), device="meta")

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor. Raises if its checksum differs, or if the file changed since it was opened."""
        if name not in self.names:
            raise self.error(f"{self.path}: there is no tensor {name!r}; there are {', '.join(self.names[:9])}")
        # The file is memory-mapped: reading a part that was truncated since would end the process (SIGBUS). A file that
        # was deleted or replaced does no harm: the old one stays mapped.
        with suppress(OSError):
            now = self.path.stat()
            if os.path.samestat(now, self.opened) and (now.st_size, now.st_mtime_ns) != self.opened_as:
                raise self.error(f"{self.path} was changed after it was opened: load it again")
        try:
            tensor = self.file.get_tensor(name)
            checksum = checksum_of(tensor) if name in self.checksums else None
            copy = tensor.clone()
        except (SafetensorError, OSError, MemoryError, RuntimeError) as e:
            raise self.error(f"{self.path}: tensor {name!r} cannot be read: {e}") from e
        if checksum is not None and checksum != self.checksums[name]:
            raise self.error(f"{self.path}: tensor {name!r} is not as it was saved: make the file again")
        return copy

    def read_all(self, what: str, needed: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return the `needed` tensors, and those of the `optional` ones that exist.

        Raises an error that names `what` if a needed one is missing.
        """
        missing = sorted(set(needed) - set(self.names))
        if missing:
            present = ", ".join(self.names[:9]) or "no tensors"
            raise self.error(f"{self.path} has {present}; {what} also needs {', '.join(missing)}")
        return {name: self.read(name) for name in (*needed, *(name for name in optional if name in self.names))}

    @property
    def opened_as(self) -> tuple[int, int]:
        """The size and time of modification of the file when it was opened."""
        return self.opened.st_size, self.opened.st_mtime_ns


def checksum_of(tensor: Tensor) -> str:
    """Return the CRC-32 of the bytes of a tensor as 8 hexadecimal digits."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(data.data):08x}"


def hash_header(path: Path) -> str:
    """Return the SHA-256 of the header of a safetensors file, its 8 bytes of length included."""
    with path.open("rb") as file:
        size = file.read(8)
        return sha256(size + file.read(int.from_bytes(size, "little"))).hexdigest()


# ---- writing ----


@contextmanager
def write_whole(path: str | Path, error: Error = FileError, *, sync: bool = True) -> Iterator[Path]:
    """Yield a new file beside `path` that replaces `path` at the end, or is removed on an error.

    Parent folders are created. With `sync` the file survives a power cut after the return. An existing file keeps its
    permissions; of a link, the target is written. Raises OSError, and `error` if `path` is a folder, pipe or device.
    """
    path = expand_path(path, error)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    refuse_strange(target, None, error)
    if target.exists() and not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "this file may not be written", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".glmlens-{uuid.uuid4().hex}.new")
    os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        mode = stat.S_IMODE((target if target.exists() else new).stat().st_mode)
        yield new
        with suppress(OSError):  # a file system without permissions
            new.chmod(mode)  # safetensors, for one, makes files that only their owner may read
        if sync:
            sync_path(new)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)
    if sync:
        sync_path(target.parent)


def sync_path(path: Path) -> None:
    """Flush a file or folder to the disk, where its file system can."""
    with suppress(OSError):
        opened = os.open(path, os.O_RDONLY)
        try:
            os.fsync(opened)
        finally:
            os.close(opened)


def write_bytes(path: str | Path, data: bytes, error: Error = FileError) -> None:
    """Write a file atomically."""
    with write_whole(path, error) as new:
        new.write_bytes(data)


def dump_json(content: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """Return an object as JSON in UTF-8, with a line end."""
    try:
        return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can express
        return (json.dumps(content, indent=indent) + "\n").encode("utf-8")


def write_json(path: str | Path, content: Mapping[str, Any], error: Error = FileError, indent: int | None = 1) -> None:
    """Write an object as JSON atomically. Raises `error` for more than `read_json` would read."""
    data = dump_json(content, indent)
    if len(data) > MOST_JSON or data.count(b",") > MOST_VALUES:
        raise error(
            f"{path}: {len(data):,} bytes; {MOST_JSON:,} at most, with {MOST_VALUES:,} values, could be read again: "
            f"save less in one file"
        )
    write_bytes(path, data, error)


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    error: Error = FileError,
    *,
    sync: bool = True,
) -> str:
    """Write tensors and their checksums as safetensors atomically; return the file's `TensorFile.header`."""
    alone = own_memory(tensors)
    checksums = " ".join(checksum_of(alone[name]) for name in sorted(alone))
    with write_whole(path, error, sync=sync) as new:
        save_file(alone, new, {**(metadata or {}), CHECKSUMS: checksums})
        with new.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MOST_HEADER:
            raise error(f"{path}: {len(alone):,} tensors are more than could be read again: save less in one file")
        digest = hash_header(new)
    return digest


def own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU that share no memory, as safetensors requires; own tensors are not copied."""
    alone: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, x in tensors.items():
        x = x.detach().cpu().contiguous()
        shares = x.untyped_storage().nbytes() != x.nbytes or x.data_ptr() in taken
        alone[name] = x.clone() if shares else x
        taken.add(alone[name].data_ptr())
    return alone


# ---- locking ----


@contextmanager
def lock_folder(folder: Path, what: str, error: Error = FileError) -> Iterator[None]:
    """Hold the lock of an existing folder against other threads, processes and machines.

    The lock is released when the process ends, however it ends. If another holds it, raises `error` that names the
    holder. A file system without locks gives a warning instead.
    """
    path = folder / LOCK
    file = take_lock(path, what, error)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before it is released: `take_lock` sees that the name is gone
        os.close(file)


def take_lock(path: Path, what: str, error: Error) -> int:
    """Return the descriptor of the open file that holds the lock. Raises `error` if another process holds it."""
    flags = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        refuse_strange(path, None, error)
        file = os.open(path, flags, 0o666)
        try:
            lock_file(file, path, what, error)
            if is_at(file, path):
                os.ftruncate(file, 0)
                os.write(file, dump_json({"host": socket.gethostname(), "pid": os.getpid(), "since": time.ctime()}))
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the last holder removed this file between open and lock: try again


def is_at(file: int, path: Path) -> bool:
    """Whether an open file still is the file at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def lock_file(file: int, path: Path, what: str, error: Error) -> None:
    """Lock an open file, or raise `error` that names the process that has locked it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no locks on this system")
        fcntl.flock(
            file, fcntl.LOCK_EX | fcntl.LOCK_NB
        )  # the lock is of this descriptor: it excludes other threads too
    except OSError as e:
        if e.errno in NO_LOCKS:
            warnings.warn(
                f"{path.parent}: this file system keeps no locks ({e.strerror}): make sure that nothing else writes "
                f"{what} there",
                stacklevel=5,
            )
            return
        if e.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise error(
            f"{path.parent}: {holder_of(path)} is writing {what} there: wait until it ends, or give another folder"
        ) from e


def holder_of(path: Path) -> str:
    """Return a description of the process that holds a lock, from the lock's file."""
    try:
        holder = read_json(path, 10_000)
        here = holder["host"] == socket.gethostname()
        me = ", this one," if here and holder["pid"] == os.getpid() else ""
        return f"process {int(holder['pid'])}{me} on {str(holder['host'])[:80]} (since {str(holder['since'])[:40]})"
    except (OSError, ValueError, LookupError, TypeError):
        return "another process"
