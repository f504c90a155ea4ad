"""Base class of the explorers: controls, charts, an output area for errors, and background work that can be stopped."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

PROGRESS_INTERVAL = 0.1  # seconds between two updates of the progress bar
# The page holds back a control's last value until the kernel has answered the one before. A button's message can
# overtake it, so a run started by a button waits this many seconds first.
SETTLE_SECONDS = 0.15
ROW_LAYOUT = {"flex_flow": "row wrap", "align_items": "center"}


class Stopped(KeyboardInterrupt):
    """Raised inside running work after Stop was pressed.

    A signal, not an error: as a KeyboardInterrupt it passes `except Exception`, and a sweep that gets it returns the
    cells that are finished.
    """


class Explorer(W.VBox):
    """An interactive view of a model, controlled by mouse, keyboard or code.

    `inputs` are controls whose change needs a run of the model: `run`, or the Run button. `places` are controls that
    select a part of the result: `select`, which every click, slider and key calls. `state` holds the values of both by
    name. Printed text and errors of callbacks appear under the charts. A subclass defines `compute`, `show` and
    `figure`, and `update_ranges` if a slider's range depends on another place.
    """

    closed = True  # until the constructor has run: close() of a half-built explorer does nothing

    def __init__(
        self,
        lens: Lens,
        inputs: Mapping[str, Any],
        places: Mapping[str, Any],
        views: Sequence[W.Widget | Chart],
        initial_state: Mapping[str, Any],
    ):
        self.lens = lens
        self.inputs = dict(inputs)
        self.places = dict(places)
        self.lock = threading.RLock()  # held while state and charts change
        self.stopping = threading.Event()  # set by stop(), read by report_progress()
        self.working = threading.Lock()  # held during a run: one run at a time
        self.quiet = False  # whether changes of controls are ignored, because the explorer itself sets them
        self.closed = False
        self.worker: threading.Thread | None = None
        self.pending_inputs = dict(initial_state)  # inputs of the next run; those of the last one are in the state
        self._state = {**initial_state, **{name: control.value for name, control in self.places.items()}}
        self.run_button = W.Button(description="Run", tooltip="run the model with these inputs")
        self.stop_button = W.Button(description="Stop", disabled=True, tooltip="stop the current run")
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
        """Connect every control and button to its callback."""
        for name, control in self.inputs.items():
            control.observe(lambda change, name=name: self.on_input_change(name, change["new"]), "value")
        for name, control in self.places.items():
            control.observe(lambda change, name=name: self.on_place_change(name, change["new"]), "value")
        self.run_button.on_click(lambda _: self.start())
        self.stop_button.on_click(lambda _: self.stop())

    # ---- defined by a subclass ----

    def compute(self, inputs: Mapping[str, Any]) -> Any:
        """Run the model on these inputs and return the result.

        May take long, in a thread: calls `report_progress` and changes no widget.
        """
        raise NotImplementedError

    def show(self, result: Any = None) -> None:
        """Draw the state. `result` is the new result of `compute` after a run, and None after a `select`."""
        raise NotImplementedError

    def figure(self) -> go.Figure:
        """Return the main chart as a figure that later changes of the explorer leave alone."""
        raise NotImplementedError

    def update_ranges(self, places: Mapping[str, Any]) -> None:
        """Set the ranges of sliders that depend on these places. Places out of range are ignored."""

    # ---- select and run ----

    @property
    def state(self) -> dict[str, Any]:
        """The values of all inputs and places by name, as `run(**...)` and `select(**...)` take them."""
        return dict(self._state)

    def select(self, **places: Any) -> None:
        """Set places by name and redraw. Raises ValueError for an unknown name or a value out of range."""
        self.require_open()
        strange = places.keys() - self.places.keys()
        if strange:
            known = f"select takes {', '.join(self.places)}; run takes {', '.join(self.inputs)}"
            raise ValueError(f"no view setting {', '.join(sorted(strange))}: {known}")
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
        """Run the model, with these inputs changed, and return when the result is drawn.

        Errors are raised here. An interrupt of the kernel stops the run, and so does the Stop button in front ends that
        handle it in a thread. Raises ValueError for an unknown input, and RuntimeError during another run.
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
        """Run at the end of a constructor; close the explorer if that fails, so that no widget stays behind."""
        try:
            self.run()
        except BaseException:
            self.close()
            raise

    def start(self, before_run: Callable[[], None] | None = None) -> None:
        """Run in a thread, as the Run button does. Errors appear under the charts.

        A button's message can arrive before the last value of a slider. So `before_run`, which sets further pending
        inputs from the controls, is called in the thread, after SETTLE_SECONDS.
        """
        with self.show_errors():
            self.require_open()
            self.begin_work()
            context = copy_context()
            self.worker = threading.Thread(target=context.run, args=(self.run_worker, before_run), daemon=True)
            self.worker.start()

    def stop(self) -> None:
        """Stop the current run at its next `report_progress`."""
        self.stopping.set()

    def require_open(self) -> None:
        """Raise RuntimeError if the explorer is closed."""
        if self.closed:
            raise RuntimeError("this explorer is closed: make another")

    # ---- a run ----

    def run_worker(self, before_run: Callable[[], None] | None) -> None:
        """Run in the worker thread; `begin_work` has been called."""
        try:
            with self.show_errors():
                # Wait for the last values of controls, unless Stop comes first.
                if self.stopping.wait(SETTLE_SECONDS):
                    raise Stopped
                if before_run is not None:
                    with self.lock:
                        before_run()
                self.compute_and_show(self.pending_inputs)
        finally:
            self.end_work()

    def compute_and_show(self, inputs: Mapping[str, Any]) -> None:
        """Compute the result of these inputs, then set the state and draw it; the lock is held for drawing alone."""
        inputs = dict(inputs)
        result = self.compute(inputs)
        with self.lock, self.pause_callbacks():
            if not self.closed:  # it may have been closed during the run
                self._state |= inputs
                self.pending_inputs = inputs
                self.show(result)
                self.update_controls()

    def begin_work(self) -> None:
        """Mark a run as begun; raise RuntimeError during another."""
        if not self.working.acquire(blocking=False):
            raise RuntimeError("this explorer is running already: wait, or stop it with stop()")
        self.stopping.clear()
        self.run_button.disabled = True
        self.stop_button.disabled = False
        self.bar.value = 0
        self.bar.layout.visibility = "visible"

    def end_work(self) -> None:
        """Mark the run as ended."""
        self.run_button.disabled = False
        self.stop_button.disabled = True
        self.bar.layout.visibility = "hidden"
        self.note.value = ""
        self.working.release()

    def report_progress(self, done: int, total: int, what: str = "") -> None:
        """Show the progress of a run, and raise Stopped if it is to stop. `compute` calls it between slices of work."""
        if self.stopping.is_set():
            raise Stopped
        if time.monotonic() - self.last_progress > PROGRESS_INTERVAL or done == total:
            self.last_progress = time.monotonic()
            self.bar.max = max(total, 1)
            self.bar.value = done
            self.note.value = f"{done} of {total} {what}"

    # ---- callbacks of controls ----

    def on_input_change(self, name: str, value: Any) -> None:
        """Keep an input's value for the next run."""
        if not self.quiet:
            self.pending_inputs[name] = value

    def on_place_change(self, name: str, value: Any) -> None:
        """Select the value of a place's control."""
        if not self.quiet and value != self._state[name]:
            self.select_safely(**{name: value})

    def select_safely(self, **places: Any) -> None:
        """`select` for callbacks: errors appear under the charts instead of being raised."""
        with self.show_errors():
            self.select(**places)

    def update_controls(self) -> None:
        """Set every control to its value in the state; an input that is no text, such as token ids, is not shown."""
        for name, control in {**self.inputs, **self.places}.items():
            if name in self.places or isinstance(self._state[name], str):
                control.value = self._state[name]

    @contextmanager
    def pause_callbacks(self) -> Iterator[None]:
        """Ignore changes of controls inside the block."""
        before = self.quiet
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = before

    @contextmanager
    def show_errors(self) -> Iterator[None]:
        """Show printed text and errors of the block under the charts, in place of earlier ones."""
        if not self.closed:
            self.output.outputs = ()
        with ExitStack() as stack:
            for name in ("stdout", "stderr"):
                stack.enter_context(capture_thread_output(name, self.append_output))
            try:
                yield
            except Stopped:
                self.append_output("stdout", "stopped\n")
            except Exception as e:
                self.append_error(e)

    def append_output(self, name: str, text: str) -> None:
        """Append text of the stream `name` ("stdout" or "stderr") under the charts."""
        with self.lock:
            if self.closed:
                return
            last = self.output.outputs[-1] if self.output.outputs else {}
            before = last["text"] if last.get("name") == name else ""  # one output per stretch of one stream
            earlier = self.output.outputs[:-1] if before else self.output.outputs
            self.output.outputs = (
                *earlier,
                {"output_type": "stream", "name": name, "text": before + replace_surrogates(text)},
            )

    def append_error(self, e: Exception) -> None:
        """Append an error with its traceback under the charts."""
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

    # ---- closing ----

    def close(self) -> None:
        """Stop the run, remove every widget from the page, and drop the references to the model and the results."""
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
                if not name.startswith("_"):  # those of ipywidgets
                    delattr(self, name)
            self._state = {}


# Attributes that a thread may still use after close(): the run ends at its next report_progress.
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
    """Return the text box of a prompt. A prompt that is no text is not shown, and stays until a text is typed."""
    text = prompt if isinstance(prompt, str) else ""
    layout = {"width": "min(680px, 95%)"}
    box = W.Textarea(text, description="prompt", rows=2, layout=layout, continuous_update=True)
    box.placeholder = "" if text else "given as token ids"
    return box


def collect_widgets(widget: W.Widget) -> list[W.Widget]:
    """Return a widget and all widgets inside it, outermost first, their layouts and styles included."""
    collected: dict[int, W.Widget] = {}  # by id: a layout or style can be shared
    todo = [widget]
    while todo:
        one = todo.pop()
        if id(one) in collected:
            continue
        collected[id(one)] = one
        for name in one.trait_names():
            value = getattr(one, name, None)
            todo += [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, W.Widget)]
    return list(collected.values())


def check_control_value(control: Any, name: str, value: Any) -> Any:
    """Return the value if the control can take it; raise ValueError with the values it takes otherwise."""
    if hasattr(control, "options"):
        known = [option[1] if isinstance(option, tuple) else option for option in control.options]
        fits = value in known
        accepted = ", ".join(map(repr, known))
    elif hasattr(control, "max"):
        accepted = f"{control.min} to {control.max}"
        if isinstance(control, W.IntSlider):
            value = read_integer(value, name)
        real = isinstance(value, Real) and not isinstance(value, bool)
        fits = real and bool(control.min <= value <= control.max)  # pyright: ignore[reportOperatorIssue]
    else:
        fits = isinstance(value, type(control.value))
        accepted = f"a {type(control.value).__name__}"
    if not fits:
        raise ValueError(f"{name} {value!r} asked for; there is {accepted}")
    return value


TextCallback = Callable[[str, str], None]


class ThreadStream(TextIOBase):
    """A stream that passes one thread's text to a callback, and that of other threads to the stream it replaces."""

    def __init__(self, name: str, callback: TextCallback, fallback: Any):
        self.stream = name
        self.callback = callback
        self.fallback = fallback
        self.thread = threading.get_ident()

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
def capture_thread_output(name: str, callback: TextCallback) -> Iterator[None]:
    """Pass what this thread writes to sys.stdout or sys.stderr to `callback`, inside the block."""
    stream = ThreadStream(name, callback, getattr(sys, name))
    setattr(sys, name, stream)
    try:
        yield
    finally:
        # Another block may have wrapped this stream by now: then it stays, and passes everything on.
        stream.thread = 0
        stream.callback = ignore_text
        if getattr(sys, name) is stream:
            setattr(sys, name, stream.fallback)


def ignore_text(name: str, text: str) -> None:
    """Do nothing: the callback of a stream after its block."""


def replace_surrogates(text: str) -> str:
    """Return text that can be encoded: lone surrogates become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
