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
from glmlens.text.prompts import Prompt
from glmlens.widgets.chart import Chart

PROGRESS_INTERVAL = 0.1  # seconds between two signs of progress
SETTLE_SECONDS = (
    0.15  # seconds in which a control's last value arrives: a page holds it back until the one before is answered
)
ROW_LAYOUT = {"flex_flow": "row wrap", "align_items": "center"}


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
        initial_state: Mapping[str, Any],
    ):
        self.lens, self.inputs, self.places = lens, dict(inputs), dict(places)
        self.lock, self.stopping, self.working = threading.RLock(), threading.Event(), threading.Lock()
        self.quiet = self.closed = False
        self.worker: threading.Thread | None = None
        self.pending_inputs = dict(initial_state)
        self._state = {**initial_state, **{name: control.value for name, control in self.places.items()}}
        self.run_button = W.Button(description="Run", tooltip="ask the model again")
        self.stop_button = W.Button(description="Stop", disabled=True, tooltip="stop what is running")
        self.bar = W.IntProgress(layout={"visibility": "hidden", "width": "120px"})
        self.note = W.Label()
        self.output = W.Output()
        self.last_progress = 0.0
        self.observe_controls()
        work = [self.run_button, self.stop_button, self.bar, self.note]
        rows = [
            W.Box([*some], layout=ROW_LAYOUT) for some in (self.inputs.values(), work, self.places.values()) if some
        ]
        self.charts = [view for view in views if isinstance(view, Chart)]
        shown = [view.box if isinstance(view, Chart) else view for view in views]
        super().__init__([*rows, *shown, self.output])

    def observe_controls(self) -> None:
        for name, control in self.inputs.items():
            control.observe(lambda change, name=name: self.on_input_change(name, change["new"]), "value")
        for name, control in self.places.items():
            control.observe(lambda change, name=name: self.on_place_change(name, change["new"]), "value")
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())

    # ---- what a subclass has ----

    def compute(self, inputs: Mapping[str, Any]) -> Any:
        """What the model says to these inputs: long work, that calls `tick` and touches no widget."""
        raise NotImplementedError

    def show(self, result: Any = None) -> None:
        """Draw the state; `found`, when it is given, is what `compute` has just returned. Quick."""
        raise NotImplementedError

    def figure(self) -> go.Figure:
        """What is seen, as a figure of its own that stays as it is."""
        raise NotImplementedError

    def update_ranges(self, places: Mapping[str, Any]) -> None:
        """Let the sliders reach as far as these places have others; for places that are not there, do nothing."""

    # ---- asking ----

    @property
    def state(self) -> dict[str, Any]:
        """All inputs and places by name: `select(**...)` and `run(**...)` take them back."""
        return dict(self._state)

    def select(self, **places: Any) -> None:
        """Look at another place; ValueError for one that is not there."""
        self.require_open()
        strange = places.keys() - self.places.keys()
        if strange:
            known = f"select takes {', '.join(self.places)}; run takes {', '.join(self.inputs)}"
            raise ValueError(f"no place {', '.join(sorted(strange))} to select: {known}")
        with self.lock, self.pause_callbacks():
            before = self.state
            try:
                self.update_ranges({**before, **places})
                self._state |= {
                    name: check_control_value(self.places[name], name, value) for name, value in places.items()
                }
                self.show()
            except BaseException:
                self._state = before
                self.update_ranges(before)
                raise
            finally:
                self.update_controls()

    def run(self, **inputs: Any) -> None:
        """Ask the model again, with other inputs if some are given; returns when it has answered.

        What goes wrong is raised. Interrupting the kernel stops it, and so does the Stop button where callbacks have a
        thread of their own. RuntimeError while it is running already.
        """
        self.require_open()
        strange = inputs.keys() - self.inputs.keys()
        if strange:
            known = f"run takes {', '.join(self.inputs)}; select takes {', '.join(self.places)}"
            raise ValueError(f"no input {', '.join(sorted(strange))}: {known}")
        self.begin_work()
        try:
            self.compute_and_show(self.pending_inputs | inputs)
        finally:
            self.end_work()

    def run_first(self) -> None:
        """Run as soon as it is made; what goes wrong leaves nothing behind."""
        try:
            self.run()
        except BaseException:
            self.close()
            raise

    def start(self, before_run: Callable[[], None] | None = None) -> None:
        """Run in a thread of its own, as the Run button does; what goes wrong appears under the views.

        A pressed button's message overtakes the last value of a slider. So `want`, which says what is wanted besides
        the inputs, is called in that thread, when every control has been heard.
        """
        with self.show_errors():
            self.require_open()
            self.begin_work()
            context = copy_context()
            self.worker = threading.Thread(target=context.run, args=(self.run_worker, before_run), daemon=True)
            self.worker.start()

    def stop(self) -> None:
        """Stop what is running, at the end of its present slice."""
        self.stopping.set()

    def require_open(self) -> None:
        if self.closed:
            raise RuntimeError("this explorer is closed: make another")

    # ---- working ----

    def run_worker(self, before_run: Callable[[], None] | None) -> None:
        try:
            with self.show_errors():
                if self.stopping.wait(SETTLE_SECONDS):
                    raise Stopped
                if before_run is not None:
                    with self.lock:
                        before_run()
                self.compute_and_show(self.pending_inputs)
        finally:
            self.end_work()

    def compute_and_show(self, inputs: Mapping[str, Any]) -> None:
        inputs = dict(inputs)
        found = self.compute(inputs)
        with self.lock, self.pause_callbacks():
            if not self.closed:
                self._state |= inputs
                self.pending_inputs = inputs
                self.show(found)
                self.update_controls()

    def begin_work(self) -> None:
        if not self.working.acquire(blocking=False):
            raise RuntimeError("it is running already: stop() or wait")
        self.stopping.clear()
        self.run_button.disabled, self.stop_button.disabled = True, False
        self.bar.value, self.bar.layout.visibility = 0, "visible"

    def end_work(self) -> None:
        self.run_button.disabled, self.stop_button.disabled = False, True
        self.bar.layout.visibility, self.note.value = "hidden", ""
        self.working.release()

    def report_progress(self, done: int, total: int, what: str = "") -> None:
        """Say how far the work is; raises Stopped when it is to stop."""
        if self.stopping.is_set():
            raise Stopped
        if time.monotonic() - self.last_progress > PROGRESS_INTERVAL or done == total:
            self.last_progress = time.monotonic()
            self.bar.max, self.bar.value = max(total, 1), done
            self.note.value = f"{done} of {total} {what}"

    # ---- hearing ----

    def on_input_change(self, name: str, value: Any) -> None:
        if not self.quiet:
            self.pending_inputs[name] = value

    def on_place_change(self, name: str, value: Any) -> None:
        if not self.quiet and value != self._state[name]:
            self.select_safely(**{name: value})

    def select_safely(self, **places: Any) -> None:
        """`select` as a callback calls it: what goes wrong appears under the views."""
        with self.show_errors():
            self.select(**places)

    def update_controls(self) -> None:
        """Every control as the state has it."""
        for name, control in {**self.inputs, **self.places}.items():
            if name in self.places or isinstance(self._state[name], str):
                control.value = self._state[name]

    @contextmanager
    def pause_callbacks(self) -> Iterator[None]:
        """Controls may be changed inside, and nothing is asked for that."""
        was, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = was

    @contextmanager
    def show_errors(self) -> Iterator[None]:
        """What is printed and what goes wrong inside appears under the views, instead of what was there."""
        if not self.closed:
            self.output.outputs = ()
        with ExitStack() as stack:
            for name, redirect in (("stdout", redirect_stdout), ("stderr", redirect_stderr)):
                stack.enter_context(capture_thread_output(name, self.append_output, redirect))
            try:
                yield
            except Stopped:
                self.append_output("stdout", "stopped\n")
            except Exception as e:
                self.append_error(e)

    def append_output(self, name: str, text: str) -> None:
        with self.lock:
            if self.closed:
                return
            last = self.output.outputs[-1] if self.output.outputs else {}
            before = last["text"] if last.get("name") == name else ""
            kept = self.output.outputs[:-1] if before else self.output.outputs
            self.output.outputs = (
                *kept,
                {"output_type": "stream", "name": name, "text": before + replace_surrogates(text)},
            )

    def append_error(self, e: Exception) -> None:
        lines = replace_surrogates("".join(traceback.format_exception(e))).splitlines()
        shown = {
            "output_type": "error",
            "ename": type(e).__name__,
            "evalue": replace_surrogates(str(e)),
            "traceback": lines,
        }
        with self.lock:
            if not self.closed:
                self.output.outputs = (*self.output.outputs, shown)

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
            for widget in collect_widgets(self):
                widget.unobserve_all()
                W.Widget.close(widget)
            for name in [name for name in vars(self) if name not in KEPT_ATTRIBUTES]:
                if not name.startswith("_"):
                    delattr(self, name)
            self._state = {}


KEPT_ATTRIBUTES = {
    "closed",
    "comm",
    "lock",
    "working",
    "stopping",
    "quiet",
    "run_button",
    "stop_button",
    "bar",
    "note",
    "last_progress",
}


def prompt_box(prompt: Prompt) -> W.Textarea:
    """Where a prompt is typed; one that is no text is not shown, and stays until another is typed."""
    said = prompt if isinstance(prompt, str) else ""
    layout = {"width": "min(680px, 95%)"}
    box = W.Textarea(said, description="prompt", rows=2, layout=layout, continuous_update=True)
    box.placeholder = "" if said else "given as token ids"
    return box


def collect_widgets(widget: W.Widget) -> list[W.Widget]:
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


def check_control_value(control: Any, name: str, value: Any) -> Any:
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


TextCallback = Callable[[str, str], None]


class ThreadStream(TextIOBase):
    """A stream of which one thread's text is told, and everybody else's goes where it went."""

    def __init__(self, name: str, tell: TextCallback, rest: Any):
        self.stream, self.callback, self.fallback, self.thread = name, tell, rest, threading.get_ident()

    def write(self, text: str) -> int:
        if self.thread != threading.get_ident():
            return self.fallback.write(text)
        self.callback(self.stream, text)
        return len(text)

    def flush(self) -> None:
        self.fallback.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.fallback, name)


@contextmanager
def capture_thread_output(name: str, tell: TextCallback, redirect: Any) -> Iterator[None]:
    """What this thread writes to sys.stdout or sys.stderr, told."""
    ear = ThreadStream(name, tell, getattr(sys, name))
    setattr(sys, name, ear)
    try:
        yield
    finally:
        ear.thread, ear.callback = 0, ignore_text  # others may have it for their own stream by now
        if getattr(sys, name) is ear:
            setattr(sys, name, ear.fallback)


def ignore_text(name: str, text: str) -> None: ...


def replace_surrogates(text: str) -> str:
    """Text that can be sent: half a character is the replacement character."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
