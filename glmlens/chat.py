"""Chat messages to text, by the checkpoint's own template.

A template is a program from a stranger. jinja2's sandbox keeps it from Python's internals but limits neither its loops
nor its memory, so that it runs in a child process (this file, run by itself) that is ended after a second; the few
templates whose hash is known are run here.
"""

import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

Message = Mapping[str, Any]

SECONDS = 1.0
MOST_MEMORY = 1 << 30
MOST_TEXT = 1 << 24
KNOWN = {  # by sha256
    "27288f957f8364c990a2ce13bf5f8bf86921c4bce467ce698c76dcc69466d821",  # glm-4-9b-chat
    "1b34ccb54f7e405d12d9ade11f230bcbd7490c8f1e59c76c83f353e0b5e54c2c",  # the demo model
}


class TemplateError(ValueError):
    """A chat template that did not come to an end, or not to a text."""


def render(template: str, messages: Sequence[Message], **variables: Any) -> str:
    """The text of `messages` by `template`, with the settings that transformers renders with.

    A template has loop controls, tojson, raise_exception and strftime_now besides what jinja2 gives it.

    Raises TemplateError for one that fails, does not end within a second, or says too much.
    """
    variables = {"messages": list(messages), **variables}
    if hashlib.sha256(template.encode()).hexdigest() in KNOWN:
        return rendered(template, variables)
    return rendered_by_child(template, variables)


def rendered(template: str, variables: Mapping[str, Any]) -> str:
    from jinja2 import Undefined
    from jinja2.exceptions import SecurityError
    from jinja2.exceptions import TemplateError as JinjaError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, **options)

    def raise_exception(message: str) -> None:
        raise JinjaError(message)

    def strftime_now(format: str) -> str:
        return datetime.now().strftime(format)

    class Generation(Extension):  # what the assistant says stands in it, for those who train on that alone
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> Scope:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:  # by default what is forbidden is just empty
            raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is none of a template's business")

    extensions = [loopcontrols, Generation]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    try:
        return environment.from_string(template).render(**variables)
    except Exception as e:
        raise TemplateError(f"the chat template failed: {type(e).__name__}: {e}") from e


def rendered_by_child(template: str, variables: Mapping[str, Any]) -> str:
    job = json.dumps([template, variables]) + "\n"
    command = [sys.executable, "-I", __file__]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, encoding="utf-8") as child:
        assert child.stdin
        assert child.stdout
        if not child.stdout.readline():  # else it has started: from now on the time counts
            raise TemplateError(f"no process could be started for the chat template: {sys.executable} has no jinja2?")
        late = threading.Event()
        timer = threading.Timer(SECONDS, lambda: (late.set(), child.kill()))
        timer.start()
        try:
            child.stdin.write(job)
            child.stdin.close()
            answer = child.stdout.read(MOST_TEXT)
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
            child.kill()
    if late.is_set():
        raise TemplateError(f"the chat template did not come to an end within {SECONDS:g} s")
    try:
        said, text = json.loads(answer)
    except ValueError as e:
        raise TemplateError("the chat template ran out of memory, or said too much") from e
    if not said:
        raise TemplateError(text)
    return text


def child() -> None:
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 - before the time counts

    with suppress(ImportError):  # not on Windows
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    print(flush=True)
    template, variables = json.loads(sys.stdin.readline())
    try:
        answer = [True, rendered(template, variables)]
    except TemplateError as e:
        answer = [False, str(e)]
    print(json.dumps(answer))


if __name__ == "__main__":
    child()
