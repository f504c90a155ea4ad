"""What every explorer is made of: controls, views, one place for what went wrong, and work that can be stopped."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from contextvars import copy_context
from io import TextIOBase
from numbers import Real
from typing import Any

import ipywidgets as W
import plotly.graph_objects as go

from glmlens.integers import read_integer
from glmlens.lens import Lens
from glmlens.prompt import Prompt
from glmlens.widgets.chart import Chart

OFTEN = 0.1  # seconds between two signs of progress
SETTLE = 0.15  # seconds in which a control's last value arrives: a page holds it back until the one before is answered
ROW = {"flex_flow": "row wrap", "align_items": "center"}


class Stopped(KeyboardInterrupt):
    """Somebody pressed Stop."""


class Explorer(W.VBox):
    """A question to a model that can be asked again with the mouse, the keyboard or a line of code.

    `inputs` are what the model has to be run for, by `run` or the Run button; `places` are what is looked at in what it
    said, by `select`, which every click, slider and key calls. `state` is all of both. What is printed and what goes
    wrong in a callback appears under the views. A subclass has `compute`, `show` and `figure`.
    """

    closed = True  # until it has been made

    def __init__(
        self,
        lens: Lens,
        inputs: Mapping[str, Any],
        places: Mapping[str, Any],
        views: Sequence[W.Widget | Chart],
        given: Mapping[str, Any],
    ):
        self.lens, self.inputs, self.places = lens, dict(inputs), dict(places)
        self.lock, self.stopping, self.working = threading.RLock(), threading.Event(), threading.Lock()
        self.quiet = self.closed = False
        self.worker: threading.Thread | None = None
        self.wanted = dict(given)
        self._state = {**given, **{name: control.value for name, control in self.places.items()}}
        self.run_button = W.Button(description="Run", tooltip="ask the model again")
        self.stop_button = W.Button(description="Stop", disabled=True, tooltip="stop what is running")
        self.bar = W.IntProgress(layout={"visibility": "hidden", "width": "120px"})
        self.note = W.Label()
        self.said = W.Output()
        self.seen = 0.0
        self.listen()
        work = [self.run_button, self.stop_button, self.bar, self.note]
        rows = [W.Box([*some], layout=ROW) for some in (self.inputs.values(), work, self.places.values()) if some]
        self.charts = [view for view in views if isinstance(view, Chart)]
        shown = [view.box if isinstance(view, Chart) else view for view in views]
        super().__init__([*rows, *shown, self.said])

    def listen(self) -> None:
        for name, control in self.inputs.items():
            control.observe(lambda change, name=name: self.typed(name, change["new"]), "value")
        for name, control in self.places.items():
            control.observe(lambda change, name=name: self.moved(name, change["new"]), "value")
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())

    # ---- what a subclass has ----

    def compute(self, inputs: Mapping[str, Any]) -> Any:
        """What the model says to these inputs: long work, that calls `tick` and touches no widget."""
        raise NotImplementedError

    def show(self, found: Any = None) -> None:
        """Draw the state; `found`, when it is given, is what `compute` has just returned. Quick."""
        raise NotImplementedError

    def figure(self) -> go.Figure:
        """What is seen, as a figure of its own that stays as it is."""
        raise NotImplementedError

    def make_room(self, places: Mapping[str, Any]) -> None:
        """Let the sliders reach as far as these places have others; for places that are not there, do nothing."""

    # ---- asking ----

    @property
    def state(self) -> dict[str, Any]:
        """All inputs and places by name: `select(**...)` and `run(**...)` take them back."""
        return dict(self._state)

    def select(self, **places: Any) -> None:
        """Look at another place; ValueError for one that is not there."""
        self.alive()
        strange = places.keys() - self.places.keys()
        if strange:
            known = f"select takes {', '.join(self.places)}; run takes {', '.join(self.inputs)}"
            raise ValueError(f"no place {', '.join(sorted(strange))} to select: {known}")
        with self.lock, self.hushed():
            before = self.state
            try:
                self.make_room({**before, **places})
                self._state |= {name: fitting(self.places[name], name, value) for name, value in places.items()}
                self.show()
            except BaseException:
                self._state = before
                self.make_room(before)
                raise
            finally:
                self.synchronise()

    def run(self, **inputs: Any) -> None:
        """Ask the model again, with other inputs if some are given; returns when it has answered.

        What goes wrong is raised. Interrupting the kernel stops it, and so does the Stop button where callbacks have a
        thread of their own. RuntimeError while it is running already.
        """
        self.alive()
        strange = inputs.keys() - self.inputs.keys()
        if strange:
            known = f"run takes {', '.join(self.inputs)}; select takes {', '.join(self.places)}"
            raise ValueError(f"no input {', '.join(sorted(strange))}: {known}")
        self.begin()
        try:
            self.answer(self.wanted | inputs)
        finally:
            self.end()

    def first(self) -> None:
        """Run as soon as it is made; what goes wrong leaves nothing behind."""
        try:
            self.run()
        except BaseException:
            self.close()
            raise

    def start(self, want: Callable[[], None] | None = None) -> None:
        """Run in a thread of its own, as the Run button does; what goes wrong appears under the views.

        A pressed button's message overtakes the last value of a slider. So `want`, which says what is wanted besides
        the inputs, is called in that thread, when every control has been heard.
        """
        with self.caught():
            self.alive()
            self.begin()
            context = copy_context()
            self.worker = threading.Thread(target=context.run, args=(self.work, want), daemon=True)
            self.worker.start()

    def stop(self) -> None:
        """Stop what is running, at the end of its present slice."""
        self.stopping.set()

    def alive(self) -> None:
        if self.closed:
            raise RuntimeError("this explorer is closed: make another")

    # ---- working ----

    def work(self, want: Callable[[], None] | None) -> None:
        try:
            with self.caught():
                if self.stopping.wait(SETTLE):
                    raise Stopped
                if want is not None:
                    with self.lock:
                        want()
                self.answer(self.wanted)
        finally:
            self.end()

    def answer(self, wanted: Mapping[str, Any]) -> None:
        wanted = dict(wanted)
        found = self.compute(wanted)
        with self.lock, self.hushed():
            if not self.closed:
                self._state |= wanted
                self.wanted = wanted
                self.show(found)
                self.synchronise()

    def begin(self) -> None:
        if not self.working.acquire(blocking=False):
            raise RuntimeError("it is running already: stop() or wait")
        self.stopping.clear()
        self.run_button.disabled, self.stop_button.disabled = True, False
        self.bar.value, self.bar.layout.visibility = 0, "visible"

    def end(self) -> None:
        self.run_button.disabled, self.stop_button.disabled = False, True
        self.bar.layout.visibility, self.note.value = "hidden", ""
        self.working.release()

    def tick(self, done: int, total: int, what: str = "") -> None:
        """Say how far the work is; raises Stopped when it is to stop."""
        if self.stopping.is_set():
            raise Stopped
        if time.monotonic() - self.seen > OFTEN or done == total:
            self.seen = time.monotonic()
            self.bar.max, self.bar.value = max(total, 1), done
            self.note.value = f"{done} of {total} {what}"

    # ---- hearing ----

    def typed(self, name: str, value: Any) -> None:
        if not self.quiet:
            self.wanted[name] = value

    def moved(self, name: str, value: Any) -> None:
        if not self.quiet and value != self._state[name]:
            self.asked(**{name: value})

    def asked(self, **places: Any) -> None:
        """`select` as a callback calls it: what goes wrong appears under the views."""
        with self.caught():
            self.select(**places)

    def synchronise(self) -> None:
        """Every control as the state has it."""
        for name, control in {**self.inputs, **self.places}.items():
            if name in self.places or isinstance(self._state[name], str):
                control.value = self._state[name]

    @contextmanager
    def hushed(self) -> Iterator[None]:
        """Controls may be changed inside, and nothing is asked for that."""
        was, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = was

    @contextmanager
    def caught(self) -> Iterator[None]:
        """What is printed and what goes wrong inside appears under the views, instead of what was there."""
        if not self.closed:
            self.said.outputs = ()
        with ExitStack() as stack:
            for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
                stack.enter_context(overheard(name, self.say, redirect))
            try:
                yield
            except Stopped:
                self.say("stdout", "stopped\n")
            except Exception as e:
                self.failed(e)

    def say(self, name: str, text: str) -> None:
        with self.lock:
            if self.closed:
                return
            last = self.said.outputs[-1] if self.said.outputs else {}
            before = last["text"] if last.get("name") == name else ""
            kept = self.said.outputs[:-1] if before else self.said.outputs
            self.said.outputs = (*kept, {"output_type": "stream", "name": name, "text": before + whole(text)})

    def failed(self, e: Exception) -> None:
        lines = whole("".join(traceback.format_exception(e))).splitlines()
        shown = {"output_type": "error", "ename": type(e).__name__, "evalue": whole(str(e)), "traceback": lines}
        with self.lock:
            if not self.closed:
                self.said.outputs = (*self.said.outputs, shown)

    # ---- the end ----

    def close(self) -> None:
        """Stop, take every widget away from the page, and let go of the model and of all that it said."""
        if self.closed:
            return
        self.stop()
        with self.lock:
            self.closed = True
            for chart in self.charts:
                chart.close()
            for widget in family(self):
                widget.unobserve_all()
                W.Widget.close(widget)
            for name in [name for name in vars(self) if name not in KEPT]:
                if not name.startswith("_"):
                    delattr(self, name)
            self._state = {}


KEPT = {"closed", "comm", "lock", "working", "stopping", "quiet", "run_button", "stop_button", "bar", "note", "seen"}


def prompt_box(prompt: Prompt) -> W.Textarea:
    """Where a prompt is typed; one that is no text is not shown, and stays until another is typed."""
    said = prompt if isinstance(prompt, str) else ""
    layout = {"width": "min(680px, 95%)"}
    box = W.Textarea(said, description="prompt", rows=2, layout=layout, continuous_update=True)
    box.placeholder = "" if said else "given as token ids"
    return box


def family(widget: W.Widget) -> list[W.Widget]:
    """A widget and all those inside it, their layouts and styles too; those inside come last."""
    found: dict[int, W.Widget] = {}
    todo = [widget]
    while todo:
        one = todo.pop()
        if id(one) in found:
            continue
        found[id(one)] = one
        for name in one.trait_names():
            value = getattr(one, name, None)
            todo += [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, W.Widget)]
    return list(found.values())


def fitting(control: Any, name: str, value: Any) -> Any:
    """The value if the control can have it; ValueError that says what there is."""
    if hasattr(control, "options"):
        known = [option[1] if isinstance(option, tuple) else option for option in control.options]
        fits, there = value in known, ", ".join(map(repr, known))
    elif hasattr(control, "max"):
        there = f"{control.min} to {control.max}"
        if isinstance(control, W.IntSlider):
            value = read_integer(value, name)
        real = isinstance(value, Real) and not isinstance(value, bool)
        fits = real and bool(control.min <= value <= control.max)  # pyright: ignore[reportOperatorIssue]
    else:
        fits, there = isinstance(value, type(control.value)), f"a {type(control.value).__name__}"
    if not fits:
        raise ValueError(f"{name} {value!r} asked for; there is {there}")
    return value


Tell = Callable[[str, str], None]


class Ear(TextIOBase):
    """A stream of which one thread's text is told, and everybody else's goes where it went."""

    def __init__(self, name: str, tell: Tell, rest: Any):
        self.stream, self.told, self.rest, self.thread = name, tell, rest, threading.get_ident()

    def write(self, text: str) -> int:
        if self.thread != threading.get_ident():
            return self.rest.write(text)
        self.told(self.stream, text)
        return len(text)

    def flush(self) -> None:
        self.rest.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rest, name)


@contextmanager
def overheard(name: str, tell: Tell, redirect: Any) -> Iterator[None]:
    """What this thread writes to sys.stdout or sys.stderr, told."""
    ear = Ear(name, tell, getattr(sys, name))
    setattr(sys, name, ear)
    try:
        yield
    finally:
        ear.thread, ear.told = 0, ignore  # others may have it for their own stream by now
        if getattr(sys, name) is ear:
            setattr(sys, name, ear.rest)


def ignore(name: str, text: str) -> None: ...


def whole(text: str) -> str:
    """Text that can be sent: half a character is the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
