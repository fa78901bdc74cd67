"""A headless Chromium that tests drive by the DevTools protocol over pipes, where one is installed."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--remote-debugging-pipe",
)
"""It reads orders from descriptor 3 and answers to 4."""


@contextmanager
def browser(folder):
    """Yield a `Tab` of a Chromium whose profile is in ``folder``; skip the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"needs a browser, received none of {', '.join(NAMES)} on PATH")
    (read, theirs_out), (theirs_in, write) = os.pipe(), os.pipe()
    command = [found, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
    start = (
        f"import os, sys; pipes = os.dup({theirs_in}), os.dup({theirs_out}); os.dup2(pipes[0], 3); "
        "os.dup2(pipes[1], 4); os.set_inheritable(3, True); os.set_inheritable(4, True); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", start, *command], pass_fds=(theirs_in, theirs_out), stderr=subprocess.DEVNULL
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Tab(os.fdopen(read, "rb"), os.fdopen(write, "wb"))
    finally:
        process.kill()
        process.wait()


class Tab:
    """A tab of the browser: what it is asked to do, and the ``events`` it told of since."""

    def __init__(self, answers, orders):
        self.answers, self.orders, self.numbers, self.session, self.events = answers, orders, itertools.count(1), {}, []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        """Have the browser do something, and return what it answers."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters, **self.session}
        self.orders.write(json.dumps(message).encode() + b"\0")
        self.orders.flush()
        while True:
            told = self._next()
            if told.get("id") == number:
                assert "error" not in told, told
                return told["result"]
            self.events.append(told)

    def open(self, page, width, *, dark):
        """Show a file in a window of that width, in light or dark colours."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def evaluate(self, expression):
        """Return what an expression of JavaScript is in the page."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def of(self, method):
        """Return the parameters of the events of one kind."""
        return [event["params"] for event in self.events if event["method"] == method]

    def _next(self):
        data = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser has gone"
            data += byte
        return json.loads(data)
