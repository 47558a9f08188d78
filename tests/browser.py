"""A headless Chromium for tests: its tabs driven by the DevTools protocol over a pair of pipes."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from base64 import b64decode
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

_SECONDS = 30.0
# The browser reads commands from file descriptor 3 and writes to 4.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(given), fcntl.F_DUPFD, 10) for given in sys.argv[1:3]]
for wanted, end in zip((3, 4), ends):
    os.dup2(end, wanted)
    os.close(end)
os.execv(sys.argv[3], sys.argv[3:])
"""
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Browser:
    """A browser's process and the pipes to it."""

    def __init__(self, profile: Path) -> None:
        """Start one that keeps its files in a folder."""
        self._events: list[dict[str, Any]] = []
        self._number = 0
        self._rest = b""
        their_in, self._commands = os.pipe()
        self._answers, their_out = os.pipe()
        launch = [sys.executable, "-c", _LAUNCH, str(their_in), str(their_out), str(CHROMIUM)]
        self._process = subprocess.Popen(
            [*launch, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(their_in, their_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(their_in)
        os.close(their_out)

    def close(self) -> None:
        """End the process."""
        self.call("Browser.close")
        self._process.wait(_SECONDS)
        os.close(self._commands)
        os.close(self._answers)

    def open(self, url: str, **settings: Any) -> "Tab":
        """Open an address in a tab with no cookies and storage of others; settings are the tab's."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        asked = {"url": "about:blank", "browserContextId": context}
        target = self.call("Target.createTarget", **asked)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        return Tab(self, session, url, **settings)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            told = self._read()
            if told.get("id") == self._number:
                assert "error" not in told, f"{method}: {told['error']}"
                return dict(told["result"])
            self._events.append(told)

    def events(self, session: str) -> list[dict[str, Any]]:
        """Return all events of a tab that have been read."""
        return [event for event in self._events if event.get("sessionId") == session]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._answers], [], [], _SECONDS)
            assert ready, "the browser is silent"
            content = os.read(self._answers, 1 << 20)
            assert content, "the browser has gone"
            self._rest += content
        message, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(message))


class Tab:
    """A page, used as people use it: by its pointer and its keys."""

    def __init__(
        self, browser: Browser, session: str, url: str, *, width: int = 1100, dark: bool = False
    ) -> None:
        self._browser = browser
        self._session = session
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        size = {"width": width, "height": 860, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self._await("Page.loadEventFired")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol."""
        return self._browser.call(method, self._session, **parameters)

    def value(self, expression: str) -> Any:
        """Return what an expression of JavaScript gives in the page."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, f"{expression}: {told['exceptionDetails']}"
        return told["result"].get("value")

    def wait(self, expression: str, seconds: float = _SECONDS) -> Any:
        """Wait until an expression is true; return its value."""
        deadline = time.monotonic() + seconds
        while not (value := self.value(expression)):
            assert time.monotonic() < deadline, f"never true: {expression}\n{self.text()}"
            time.sleep(0.02)
        return value

    def text(self, selector: str = "body") -> str:
        """Return the text that is shown in an element."""
        return str(self.value(f"document.querySelector({selector!r})?.innerText"))

    def click(self, selector: str) -> None:
        """Click the middle of an element."""
        box = self.value(
            f"(() => {{ const node = document.querySelector({selector!r});"
            "node.scrollIntoView({ block: 'center', behavior: 'instant' });"
            "const box = node.getBoundingClientRect();"
            "return [box.x + box.width / 2, box.y + box.height / 2, box.width]; })()"
        )
        assert box[2] > 0, f"{selector} is not shown"
        where = {"x": box[0], "y": box[1], "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, **where)

    def write(self, selector: str, text: str) -> None:
        """Put a text in the place of what a field holds."""
        self.value(f"document.querySelector({selector!r}).select()")
        self.call("Input.insertText", text=text)

    def press(self, key: str, times: int = 1) -> None:
        """Press a key such as Enter or ArrowRight."""
        code = {"Enter": 13, "ArrowLeft": 37, "ArrowRight": 39, "Home": 36, "End": 35, "Tab": 9}[
            key
        ]
        told = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        for _ in range(times):
            more = {"text": "\r"} if key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", **told, **more)
            self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def picture(self, file: Path) -> None:
        """Save what is shown as PNG."""
        file.write_bytes(b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def requests(self) -> list[dict[str, Any]]:
        """Return every request that the page has made."""
        return [event["request"] for event in self._told("Network.requestWillBeSent")]

    def complaints(self) -> list[Any]:
        """Return what the page wrote to its console, threw, or was refused."""
        names = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [told for name in names for told in self._told(name)]

    def _await(self, name: str) -> None:
        deadline = time.monotonic() + _SECONDS
        while not self._told(name):
            assert time.monotonic() < deadline, f"the page never told {name}"
            time.sleep(0.02)

    def _told(self, name: str) -> list[dict[str, Any]]:
        self.value("0")  # what happened before this has been told before its answer
        events = self._browser.events(self._session)
        return [event["params"] for event in events if event["method"] == name]
