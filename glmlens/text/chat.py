"""Render chat messages to text with the checkpoint's own template.

A template is untrusted code. jinja2's sandbox protects Python's internals but limits neither loops nor memory. A
template therefore runs in a child process that is killed after a second, except for the few whose hash is known.
Every template has its own process, reused for its next chat, so that no template can affect another's output.
"""

import functools
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

from glmlens.errors import GlmlensError
from glmlens.text.sandbox_process import Child, ChildEnded, ChildError, ChildLate

Message = Mapping[str, Any]

MAX_RENDER_SECONDS = 1.0
MAX_CHILD_BYTES = 1 << 30
MAX_RENDERED_CHARACTERS = 1 << 24
MOST_CHILDREN = 4
TRUSTED_TEMPLATES = {  # by sha256
    "27288f957f8364c990a2ce13bf5f8bf86921c4bce467ce698c76dcc69466d821",  # glm-4-9b-chat
    "1b34ccb54f7e405d12d9ade11f230bcbd7490c8f1e59c76c83f353e0b5e54c2c",  # the demo model
}
CHILDREN: dict[str, Child] = {}  # by the sha256 of the template


class TemplateError(GlmlensError, ValueError):
    """A chat template that failed, did not end within its time, or produced too much text."""


def render_chat(template: str, messages: Sequence[Message], required: Collection[str] = (), /, **variables: Any) -> str:
    """Return the text of `messages` rendered by `template`, with the settings of transformers.

    Besides jinja2's own, a template can use loop controls, tojson, raise_exception and strftime_now.

    Raises TemplateError for a template that fails, does not end within a second, or produces too much text; TypeError
    where it does not read a `required` variable, and for messages or variables that are not JSON.
    """
    variables = {"messages": list(messages), **variables}
    key = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
    try:
        job = json.dumps([template, variables, sorted(required)])
    except (TypeError, ValueError) as e:
        raise TypeError(f"chat messages and the variables of a template are text, numbers, lists and dicts: {e}") from e
    if key in TRUSTED_TEMPLATES:
        kind, answer = answer_job(template, variables, required)
    else:
        kind, answer = render_in_child(key, json.loads(job))
    if kind == "unread":
        raise TypeError(unread_message(*answer))
    if kind == "failed":
        raise TemplateError(answer)
    return answer


def render_open(
    template: str, messages: Sequence[Message], field: str, required: Collection[str] = (), /, **variables: Any
) -> str:
    """Return the text of `messages` up to the end of `field` of the last one, as continue_final_message does.

    Raises ValueError where the last message has no text in `field`, and where the template does not write it.
    """
    # A marker is appended to the message; the text ends where the template writes the marker.
    final = messages[-1].get(field)
    mark = "CONTINUE_FINAL_MESSAGE_TAG "
    if isinstance(final, str):
        text, marked = final, final + mark
    elif isinstance(final, list | tuple) and any("text" in part for part in final):
        last = max(i for i, part in enumerate(final) if "text" in part)
        text = final[last]["text"]
        marked = [{**part, "text": text + mark} if i == last else part for i, part in enumerate(final)]
    else:
        raise ValueError(f"continue_final_message: the last message has no {field!r} with a text to continue")
    rendered = render_chat(template, [*messages[:-1], {**messages[-1], field: marked}], required, **variables)
    end = rendered.rfind(mark.strip())
    if end < 0 or text.strip() not in rendered:
        raise ValueError(f"continue_final_message: the chat template does not write the {field!r} of the last message")
    # Where the template strips the message, the marker lost its space: the message then ends without spaces too.
    return rendered[:end] if rendered[end:].startswith(mark) else rendered[:end].rstrip()


def check_tools(tools: Any) -> None:
    """Raise TypeError unless `tools` is None or a list of tools as JSON."""
    if tools is None:
        return
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise TypeError(f"tools is a {type(tools).__name__}; expected a list of tools as JSON")
    for i, tool in enumerate(tools):
        about = tool.get("function", tool) if isinstance(tool, Mapping) else None
        if not isinstance(about, Mapping) or not isinstance(about.get("name", tool.get("type")), str):
            raise TypeError(
                f"tools[{i}] is {tool!r:.80}; expected {{'type': 'function', 'function': {{'name': ..., 'description': "
                f"..., 'parameters': ...}}}}"
            )


def unread_message(names: Sequence[str], known: Sequence[str]) -> str:
    """Return the error message for variables that a template does not read."""
    hint = ""
    if "tools" in names:
        hint = '; where it reads the tools of a message, pass {"role": "system", "content": "", "tools": tools}'
    return f"the chat template reads no {', '.join(map(repr, names))}; it reads {', '.join(known) or 'nothing'}{hint}"


def render_in_process(template: str, variables: Mapping[str, Any]) -> str:
    """Return the rendered template; TemplateError for any error in it."""
    try:
        return compile_template(template)[0].render(**variables)
    except TemplateError:
        raise
    except Exception as e:
        raise TemplateError(f"the chat template failed: {type(e).__name__}: {e}") from e


@functools.lru_cache(8)
def compile_template(template: str) -> tuple[Any, frozenset[str]]:
    """Return the compiled template and the names of the variables that it reads."""
    from jinja2 import meta

    environment = make_environment()
    try:
        return environment.from_string(template), frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except Exception as e:
        raise TemplateError(f"the chat template failed: {type(e).__name__}: {e}") from e


@functools.cache
def make_environment() -> Any:
    """Return the sandboxed jinja2 environment, with the settings and extensions of transformers."""
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

    class Generation(Extension):  # {% generation %} marks the assistant's text, for training masks: rendered as it is
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> Scope:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Undefined:  # by default it renders as nothing
            raise SecurityError(f"{attribute!r} of a {type(obj).__name__} is not accessible to a template")

    extensions = [loopcontrols, Generation]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def answer_job(template: str, variables: Mapping[str, Any], required: Collection[str]) -> tuple[str, Any]:
    """Return ("rendered", text), ("failed", reason), or ("unread", [required variables not read, variables read])."""
    try:
        text = render_in_process(template, variables)
        known = compile_template(template)[1] if required else frozenset()
        unread = set(required) - known
        # A template may use the name `tools` for those of a message alone. The variable then has no effect on the text.
        if "tools" in required and render_in_process(template, {**variables, "tools": None}) == text:
            unread.add("tools")
            known -= {"tools"}
        if unread:
            return "unread", [sorted(unread), sorted(known - make_environment().globals.keys())]
        return "rendered", text
    except TemplateError as e:
        return "failed", str(e)


def answer(job: list[Any]) -> tuple[str, Any]:
    """Answer a job in the child process; see `answer_job`."""
    return answer_job(*job)


def prepare() -> None:
    """Prepare the child process, before the time of its first job starts."""
    make_environment()


def render_in_child(key: str, job: list[Any]) -> tuple[str, Any]:
    """Return the answer to a job from the template's child process; TemplateError where it fails."""
    child = CHILDREN.get(key) or CHILDREN.setdefault(key, Child("text.chat", MAX_CHILD_BYTES, MAX_RENDERED_CHARACTERS))
    # Close the processes of the templates that were first used longest ago.
    for other in list(CHILDREN)[:-MOST_CHILDREN]:
        if other != key and (unused := CHILDREN.pop(other, None)):
            unused.close()
    try:
        return tuple(child.ask(job, MAX_RENDER_SECONDS))
    except ChildLate as e:
        raise TemplateError(f"the chat template did not come to an end within {MAX_RENDER_SECONDS:g} s") from e
    except ChildEnded as e:
        raise TemplateError("the chat template ran out of memory, or produced too much text") from e
    except ChildError as e:
        raise TemplateError(f"{e}; has it jinja2?") from e
