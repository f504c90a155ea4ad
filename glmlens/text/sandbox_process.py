"""Run untrusted templates and tokenizer files in a child process of bounded memory and time.

A child is a new interpreter that imports one module of this package (not the package itself, which would import torch)
and answers jobs, a line of JSON each, with that module's `answer`. It is reused for the next job. It is killed when a
job exceeds its time or gets no answer, when this process ends, and when its `Child` is garbage collected.
"""

import atexit
import importlib
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from glmlens.errors import GlmlensError

MOST_MEMORY = 1 << 30
MOST_ANSWER = 1 << 26
BOOT = """
import sys, types
package = types.ModuleType("glmlens")
package.__path__ = [sys.argv[1]]
sys.modules["glmlens"] = package
sys.path[:] = sys.argv[4:]
from glmlens.text import sandbox_process
sandbox_process.serve(sys.argv[2], int(sys.argv[3]))
"""


class ChildError(GlmlensError, ValueError):
    """A child that could not be started."""


class ChildLate(ChildError):
    """A job that exceeded its time."""


class ChildEnded(ChildError):
    """A child that ended, ran out of memory or sent too long an answer."""


class Child:
    """A process that answers jobs with `glmlens.{module}.answer`; started at the first job, reused for later ones."""

    def __init__(self, module: str, memory: int = MOST_MEMORY, most_answer: int = MOST_ANSWER):
        self.module, self.memory, self.most_answer = module, memory, most_answer
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        CHILDREN.add(self)

    def ask(self, job: Any, seconds: float) -> Any:
        """Return the answer to `job`, both JSON. Raise ChildLate, ChildEnded, or ChildError where none can start."""
        line = json.dumps([seconds, job]).encode() + b"\n"
        with self._lock:
            process = self._start()
            late = threading.Event()
            timer = threading.Timer(seconds, lambda: (late.set(), process.kill()))
            timer.daemon = True
            timer.start()
            try:
                received = exchange(process, line, self.most_answer)
                timer.cancel()
                if late.is_set():
                    raise ChildLate(f"no answer within {seconds:g} s")
                try:
                    return json.loads(received)
                except (ValueError, RecursionError) as e:
                    raise ChildEnded("the process ended, ran out of memory or answered too much") from e
            except BaseException:  # an interrupt too: the next job would otherwise read this job's answer
                timer.cancel()
                self._end()
                raise

    def close(self) -> None:
        """End the process; another job starts a new one."""
        with self._lock:
            self._end()

    def _start(self) -> "subprocess.Popen[bytes]":
        """Return the running process, or a new one once it is ready; ChildError where none can be started."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._end()
        paths = [path for path in sys.path if path]  # without the current folder
        command = [
            sys.executable,
            "-I",
            "-c",
            BOOT,
            str(Path(__file__).parents[1]),
            self.module,
            str(self.memory),
            *paths,
        ]
        pipe = subprocess.PIPE
        try:
            # In a session of its own: an interrupt of a notebook's kernel goes to the whole group of processes.
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, start_new_session=True
            )
            ready = exchange(self._process, b"", 1)
        except OSError:
            ready = b""
        except BaseException:
            self._end()
            raise
        if self._process is None or not ready:
            self._end()
            raise ChildError(f"no process could be started: {sys.executable} does not run glmlens.{self.module}")
        return self._process  # the time of the job starts here

    def _end(self) -> None:
        """Kill the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            close_pipes(process)
            process.wait()

    def detach_after_fork(self) -> None:
        """Drop the process, in a fork of this process: it belongs to the parent."""
        process, self._process, self._lock = self._process, None, threading.Lock()
        if process is not None:
            close_pipes(process)
            process.returncode = 0  # only the parent can wait for it

    def __del__(self) -> None:
        self._end()


CHILDREN: "weakref.WeakSet[Child]" = weakref.WeakSet()


def exchange(process: "subprocess.Popen[bytes]", line: bytes, most: int) -> bytes:
    """Send a line and return the answer: what there is of it where the process ends or sends more than `most` bytes."""
    assert process.stdin
    assert process.stdout
    rest, received = memoryview(line), bytearray()
    with suppress(BrokenPipeError):
        while rest:
            rest = rest[process.stdin.write(rest) :]
    while not received.endswith(b"\n") and len(received) < most:
        part = process.stdout.read(1 << 16)
        if not part:
            break
        received += part
    return bytes(received)


def close_pipes(process: "subprocess.Popen[bytes]") -> None:
    """Close the pipes to and from a process."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):
                pipe.close()


def close_all() -> None:
    """End all child processes, when this process ends."""
    for child in list(CHILDREN):
        child.close()


def detach_all_after_fork() -> None:
    """Drop all child processes, in a fork of this process."""
    for child in list(CHILDREN):
        child.detach_after_fork()


atexit.register(close_all)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=detach_all_after_fork)


def serve(module: str, memory: int) -> None:
    """Answer the jobs on standard input until it ends, with bounded memory. Runs in the child."""
    worker = importlib.import_module(f"glmlens.{module}")
    if hasattr(worker, "prepare"):
        worker.prepare()
    limit_memory(memory)
    print(flush=True)  # ready
    for line in sys.stdin.buffer:
        seconds, job = json.loads(line)
        limit_seconds(seconds)
        sys.stdout.write(json.dumps(worker.answer(job)) + "\n")
        sys.stdout.flush()


def limit_memory(memory: int) -> None:
    """Limit the address space of this process, in bytes, and write no core dumps."""
    with suppress(ImportError, ValueError, OSError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_seconds(seconds: float) -> None:
    """Limit the CPU time of this process, so that it ends even if its parent is gone."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        spent = time.process_time() + seconds + 2
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent), resource.getrlimit(resource.RLIMIT_CPU)[1]))
