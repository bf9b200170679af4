"""A headless Chromium, driven through a pair of pipes by its own protocol (DevTools): no port, and no library.

https://chromedevtools.github.io/devtools-protocol/; on the pipes each message is JSON and ends with a NUL.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 60.0  # seconds for any answer
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
         "--disable-extensions", "--no-first-run", "--no-default-browser-check", "--disable-gpu", "--hide-scrollbars",
         "--disable-dev-shm-usage"]  # fmt: skip


def find() -> str | None:
    """The browser's path."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class BrowserError(Exception):
    """The browser said no, or nothing."""


@dataclass
class Page:
    """A tab, and all that went wrong in it: errors of scripts, messages of the console."""

    _reading: int
    _writing: int
    _session: str = ""
    errors: list[str] = field(default_factory=list)
    asked: dict[str, str] = field(default_factory=dict)
    _seen: deque[str] = field(default_factory=deque)
    _held: bytearray = field(default_factory=bytearray)
    _last: int = 0

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One call of the protocol, and its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + PATIENCE
        while (answer := self._next(end)).get("id") != self._last:
            self._note(answer)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def begin(self) -> None:
        """Attach to a new tab."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def look(self, *, width: int = 1280, height: int = 900, scheme: str = "light", media: str = "") -> None:
        """The size of the window, light or dark, and "print" for how it is printed."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme_ = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme_])

    def open(self, path: Path) -> None:
        """Load a file, and wait until it stands."""
        self._seen.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + PATIENCE
        while "Page.loadEventFired" not in self._seen:
            self._note(self._next(end))
        self.settle()

    def settle(self) -> None:
        """Let it draw what it is about to draw."""
        frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"
        self.call("Runtime.evaluate", expression=frames, awaitPromise=True)

    def ask(self, expression: str) -> Any:
        """What an expression comes to, in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    @property
    def asked_for(self) -> set[str]:
        """The addresses that it asked for."""
        return set(self.asked.values())

    def forget(self) -> None:
        """Begin anew with what went wrong and what was asked for."""
        self.errors.clear()
        self.asked.clear()

    def click(self, selector: str, *, at: tuple[float, float] = (0.5, 0.5), times: int = 1) -> None:
        """Click as a person does: scroll to it, and press the mouse at a place in its box (0 to 1, each way)."""
        where = f"document.querySelector({json.dumps(selector)})"
        self.ask(f"{where}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.ask(
            f"(() => {{ const b = {where}.getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; }})()"
        )
        x, y = box[0] + box[2] * at[0], box[1] + box[3] * at[1]
        for kind in ("mouseMoved", "mousePressed", "mouseReleased") * times:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def drag(self, selector: str, start: tuple[float, float], by: float) -> None:
        """Press at a place in a box, move by so many pixels to the right, and let go."""
        where = f"document.querySelector({json.dumps(selector)}).getBoundingClientRect()"
        box = self.ask(f"(() => {{ const b = {where}; return [b.x, b.y, b.width, b.height]; }})()")
        x, y = box[0] + box[2] * start[0], box[1] + box[3] * start[1]
        moves = [("mousePressed", 0.0), *(("mouseMoved", by * n / 5) for n in range(1, 6)), ("mouseReleased", by)]
        for kind, moved in moves:
            self.call("Input.dispatchMouseEvent", type=kind, x=x + moved, y=y, button="left", buttons=1, clickCount=1)
        self.settle()

    def key(self, key: str) -> None:
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=key if len(key) == 1 else "")
        self.settle()

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """A PNG of the page, all of it."""
        clip: dict[str, Any] = {}
        if whole:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"clip": {**size, "scale": 1}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **clip)["data"]))

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._reading], [], [], max(0.0, end - time.monotonic()))
            data = os.read(self._reading, 1 << 16) if ready else b""
            if not data:
                raise BrowserError("the browser ended" if ready else f"no answer in {PATIENCE} s")
            self._held += data
        message, _, rest = self._held.partition(b"\0")
        self._held = bytearray(rest)
        out: dict[str, Any] = json.loads(message)
        return out

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method", ""), event.get("params", {})
        self._seen.append(method)
        match method:
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled":
                self.errors.append(str([arg.get("value") for arg in params["args"]]))
            case "Log.entryAdded":
                self.errors.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.asked[params["requestId"]] = params["request"]["url"]
            case "Network.loadingFailed" if params.get("blockedReason") == "csp":
                self.asked.pop(params["requestId"], None)  # never left the page
            case "Page.javascriptDialogOpening":
                self.errors.append(f"dialog: {params['message']}")


@contextmanager
def opened(folder: Path) -> Iterator[Page]:
    """A browser with one empty tab, and its own new profile in ``folder``."""
    program = find()
    assert program is not None
    profile = tempfile.mkdtemp(dir=folder)
    # Neither root nor a container has what its sandbox needs, and it sees no page but ours.
    options = ["--headless", "--no-sandbox", "--remote-debugging-pipe", f"--user-data-dir={profile}", *QUIET]
    (low_from_us, to_it), (from_it, low_to_us) = os.pipe(), os.pipe()
    # The protocol's pipes are descriptors 3 and 4; above 9 they cannot be in each other's way.
    from_us, to_us = (fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (low_from_us, low_to_us))
    line = f'exec "$@" 3<&{from_us} 4>&{to_us}'
    with tempfile.TemporaryFile() as said:
        words = ["bash", "-c", line, "bash", program, *options]
        browser = subprocess.Popen(words, pass_fds=(from_us, to_us), stdin=subprocess.DEVNULL, stdout=said, stderr=said,
                                   start_new_session=True)  # fmt: skip
        for fd in (low_from_us, low_to_us, from_us, to_us):
            os.close(fd)
        try:
            page = Page(from_it, to_it)
            try:
                page.begin()
            except (BrowserError, BrokenPipeError) as e:
                said.seek(0)
                raise BrowserError(f"{program}: {e}\n{said.read().decode(errors='replace')}") from e
            yield page
        finally:
            os.close(to_it)
            os.close(from_it)
            try:
                browser.wait(10)  # it ends when its pipes do
            except subprocess.TimeoutExpired:
                os.killpg(browser.pid, signal.SIGKILL)
                browser.wait()
            shutil.rmtree(profile, ignore_errors=True)
