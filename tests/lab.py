"""A JupyterLab of its own, seen through a headless Chromium: runs cells, waits for what is there, types, clicks."""

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

try:
    from browser import PATIENCE, Browser, chromium
except ImportError:  # run as a part of tests, not by pytest
    from tests.browser import PATIENCE, Browser, chromium

OUTPUT = "document.querySelector('.jp-Notebook .jp-OutputArea')"
SETTINGS = {  # what would pop up, and cells that are taken off the page when nobody looks
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},
    "application-extension/sidebar": {},
}
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36}
KEYS |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}
RUN = """(async source => {
  const book = window.jupyterapp.shell.currentWidget.content;
  book.widgets[0].model.sharedModel.setSource(source);
  book.activeCellIndex = 0;
  await window.jupyterapp.commands.execute('notebook:run-cell');
  const outputs = book.widgets[0].model.outputs.toJSON();
  return JSON.stringify(outputs.filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue));
})"""


def missing():
    """What a JupyterLab in a browser needs and is not here, or None."""
    return "Chromium" if chromium() is None else None if find_spec("jupyterlab") else "jupyterlab"


class Lab(Browser):
    """JupyterLab with one notebook open, whose one cell is what `cell` was given last.

    `errors` are exceptions of the page, `requests` every address that it asked for since the start.
    """

    shown = f"({OUTPUT} || document.body).innerText"

    def __init__(self, width=1400, height=1100):
        self.folder = Path(tempfile.mkdtemp(prefix="lab-"))
        self.server = self.serve()
        super().__init__(width, height)
        self.open_notebook()

    def serve(self):
        """Start the server, with settings and notebooks of its own."""
        for name, settings in SETTINGS.items():
            plugin, _, file = name.partition("/")
            path = self.folder / "settings" / "@jupyterlab" / plugin / f"{file}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))
        (self.folder / "root").mkdir()
        cell = {"cell_type": "code", "source": "", "metadata": {}, "outputs": [], "execution_count": None, "id": "one"}
        spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        book = {"cells": [cell], "metadata": {"kernelspec": spec}, "nbformat": 4, "nbformat_minor": 5}
        (self.folder / "root" / "a.ipynb").write_text(json.dumps(book))
        homes = {"CONFIG_DIR": "config", "RUNTIME_DIR": "runtime", "DATA_DIR": "data"}
        own = {f"JUPYTER_{name}": str(self.folder / home) for name, home in homes.items()}
        own |= {f"JUPYTERLAB_{name}S_DIR": str(self.folder / f"{name.lower()}s") for name in ("SETTING", "WORKSPACE")}
        own |= {"IPYTHONDIR": str(self.folder / "ipython"), "OMP_NUM_THREADS": "1"}
        own["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        options = ["ServerApp.ip=127.0.0.1", "ServerApp.port=0", f"ServerApp.root_dir={self.folder / 'root'}"]
        options += ["LabApp.expose_app_in_browser=True", "LabApp.extension_manager=readonly"]
        command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *(f"--{o}" for o in options)]
        with (self.folder / "log").open("w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own)

    def open_notebook(self):
        """Find the server's port, open the notebook, and wait for its kernel."""
        end = time.monotonic() + PATIENCE
        while not (found := [*(self.folder / "runtime").glob("jpserver-*.json")]) or not self.answers(found[0]):
            if self.server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"no JupyterLab: {(self.folder / 'log').read_text()[-3000:]}")
            time.sleep(0.2)
        said = json.loads(found[0].read_text())
        self.port = said["port"]
        url = f"http://127.0.0.1:{self.port}/lab/tree/a.ipynb?reset&token={said['token']}"
        self.call("Page.navigate", url=url)
        self.wait("window.jupyterapp?.shell?.currentWidget?.context?.isReady")
        self.run("window.jupyterapp.shell.currentWidget.context.sessionContext.ready.then(() => 0)")
        self.run("window.jupyterapp.shell.currentWidget.revealed.then(() => 0)")
        self.run("window.jupyterapp.commands.execute('application:toggle-left-area').then(() => 0)")

    @staticmethod
    def answers(file):
        try:
            return bool(json.loads(file.read_text())["port"])
        except ValueError:
            return False

    def note(self, method, params):
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            said = details.get("exception", {}).get("description") or details["text"]
            if "[anywidget] Failed to initialize model" not in said:  # it took two seconds: see keep_listening.js
                self.errors.append(said)
        elif method in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            self.requests.append((params.get("request") or params)["url"][:200])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"a dialog: {params['message']}")

    def strangers(self):
        """Requests that went elsewhere than to this server."""
        known = ("data:", "blob:", f"http://127.0.0.1:{self.port}/", f"ws://127.0.0.1:{self.port}/", "about:")
        return [url for url in self.requests if not url.startswith(known)]

    def cell(self, source, fails=False):
        """Make this the notebook's only cell and run it; AssertionError when it raises, unless it `fails`."""
        raised = json.loads(self.run(f"{RUN}({json.dumps(source)})"))
        assert fails or not raised, raised
        return raised

    def wait_text(self, text, where=".jp-OutputArea"):
        """Wait until a text stands somewhere in what the cell has shown."""
        self.wait(
            f"[...document.querySelectorAll({json.dumps(where)})].some(e => e.innerText.includes({json.dumps(text)}))"
        )

    def middle(self, element, x=0.5, y=0.5):
        """The place on the page of a point of an element (a JavaScript expression), scrolled into view."""
        self.run(f"{element}.scrollIntoView({{block: 'center'}})")
        box = self.run(f"(r => [r.x, r.y, r.width, r.height])({element}.getBoundingClientRect())")
        return box[0] + x * box[2], box[1] + y * box[3]

    def click_on(self, element, x=0.5, y=0.5):
        """Move to an element and click it, as a hand does."""
        at = self.middle(element, x, y)
        self.move(*at)
        self.click(*at)

    def move(self, x, y):
        for step in (3, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - step, y=y)
            time.sleep(0.05)

    def press(self, *keys):
        """Press keys, one after the other."""
        for key in keys:
            name = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
            self.call("Input.dispatchKeyEvent", type="rawKeyDown", **name)
            self.call("Input.dispatchKeyEvent", type="keyUp", **name)
            time.sleep(0.05)

    def write(self, element, text):
        """Replace the text of an input element, as a hand does."""
        self.run(f"({element}.focus(), {element}.select())")
        self.call("Input.insertText", text=text)

    def theme(self, dark):
        name = "JupyterLab Dark" if dark else "JupyterLab Light"
        self.run(f"window.jupyterapp.commands.execute('apputils:change-theme', {{theme: '{name}'}}).then(() => 0)")
        self.wait(f"document.body.dataset.jpThemeName === '{name}'")

    def photograph(self, path):
        """What the cell shows, as a PNG."""
        self.call("Emulation.setDeviceMetricsOverride", **self.size | {"height": 3000})
        time.sleep(0.5)
        box = self.run(f"(r => [r.x, r.y, r.width, r.height])({OUTPUT}.getBoundingClientRect())")
        clip = dict(zip(("x", "y", "width", "height"), box, strict=True), scale=1)
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))
        self.call("Emulation.setDeviceMetricsOverride", **self.size)

    def close(self):
        super().close()
        self.server.terminate()
        try:
            self.server.wait(30)
        except subprocess.TimeoutExpired:
            self.server.kill()
            self.server.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
