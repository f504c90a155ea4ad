"""A headless Chromium, driven over a pipe: opens a file, says what went wrong, runs JavaScript, takes pictures."""

import base64
import fcntl
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

PATIENCE = 240  # seconds, for a machine that is busy with other things
FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe"
).split()


def chromium():
    """Return the path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


class Browser:
    """One Chromium with one page at a time; `errors` and `requests` are those of the page that is open."""

    shown = "document.body.innerText"

    def __init__(self, width=1100, height=900):
        self.size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.home = tempfile.mkdtemp(prefix="browser-")
        mine, theirs = self.pipes()
        argv = [chromium(), *FLAGS, f"--user-data-dir={self.home}", "about:blank"]
        null = os.open(os.devnull, os.O_RDWR)
        moved = [(os.POSIX_SPAWN_DUP2, theirs[0], 3), (os.POSIX_SPAWN_DUP2, theirs[1], 4)]
        quiet = [(os.POSIX_SPAWN_DUP2, null, fd) for fd in (0, 1, 2)]
        self.pid = os.posix_spawn(argv[0], argv, dict(os.environ), file_actions=[*moved, *quiet])
        for fd in (*theirs, null):
            os.close(fd)
        self.reads, self.writes = mine
        self.count, self.rest, self.session = itertools.count(1), b"", None
        self.errors, self.requests, self.loaded = [], [], False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", **self.size)

    @staticmethod
    def pipes():
        """Return two pipes whose ends have high numbers: ours (read, write), and the browser's (read, write)."""
        ends = [os.pipe(), os.pipe()]
        (in_read, in_write), (out_read, out_write) = [
            tuple(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in pair) for pair in ends
        ]
        for fd in itertools.chain(*ends):
            os.close(fd)
        return (out_read, in_write), (in_read, out_write)

    def call(self, method, **params):
        """Call a method of the DevTools protocol and return its result."""
        number = next(self.count)
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.writes, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.next()
            if reply.get("id") == number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                return reply["result"]

    def next(self):
        """Return the next message; errors, requests and loading of the page are noted."""
        while b"\0" not in self.rest:
            more = os.read(self.reads, 1 << 20)
            if not more:
                raise RuntimeError("the browser has ended")
            self.rest += more
        line, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(line)
        self.note(message.get("method"), message.get("params", {}))
        return message

    def note(self, method, params):
        """Keep errors, requests and loading of the page."""
        if method == "Runtime.exceptionThrown":
            self.errors.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.errors.append(str(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"]["text"])
        elif method == "Page.javascriptDialogOpening":
            self.errors.append(f"a dialog: {params['message']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"][:200])
        elif method == "Page.loadEventFired":
            self.loaded = True

    def open(self, path, dark=False):
        """Open a file and wait until all its figures are drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.errors, self.requests, self.loaded = [], [], False
        self.call("Page.navigate", url=Path(path).resolve().as_uri())
        while not self.loaded:
            self.next()
        self.wait("[...document.querySelectorAll('.plotly-graph-div')].every(d => d.querySelector('.main-svg'))")
        return self

    def run(self, expression):
        """Return the value of a JavaScript expression; a promise is awaited."""
        done = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(str(done["exceptionDetails"]))
        return done["result"].get("value")

    def wait(self, expression, seconds=PATIENCE):
        """Wait until a JavaScript expression is true, and return its value; TimeoutError shows the page."""
        end = time.monotonic() + seconds
        guarded = (
            f"(() => {{ try {{ const x = {expression}; return x instanceof Node || x }} catch {{ return null }} }})()"
        )
        while not (value := self.run(guarded)):
            if time.monotonic() > end:
                text = self.run(f"{self.shown}.slice(0, 2000)")
                raise TimeoutError(f"{expression}\nerrors: {self.errors}\npage: {text}")
            time.sleep(0.1)
        return value

    def hover(self, x, y, text):
        """Move the mouse to a place of the page, wait for this text in the hover label, and return the whole label."""
        for step in (2, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x - step, y=y)
            time.sleep(0.15)
        label = "[...document.querySelectorAll('.hoverlayer text')].map(t => t.textContent).join('|')"
        self.wait(f"{label}.includes({json.dumps(text)})")
        return self.run(label)

    def click(self, x, y):
        """Click a place of the page."""
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        time.sleep(0.4)

    def picture(self, path):
        """Write a screenshot of the whole page as PNG."""
        height = self.run("document.body.getBoundingClientRect().bottom + 30")
        clip = {"x": 0, "y": 0, "width": self.size["width"], "height": max(height, 100), "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        Path(path).write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        """End the browser and remove its profile."""
        os.kill(self.pid, signal.SIGTERM)
        os.waitpid(self.pid, 0)
        os.close(self.reads)
        os.close(self.writes)
        shutil.rmtree(self.home, ignore_errors=True)
