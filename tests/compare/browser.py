"""A page in headless Chromium, through its debugging pipe: no driver and no package is needed."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Keys by their codes on a keyboard, which the page does not ask for and the browser does.
_CODES = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9, "Escape": 27}


class Page:
    """What the browser is told and tells over its pipe: JSON messages that end with a NUL.

    Attributes:
        requests: the URLs that the page has asked for.
        errors: what went wrong on the page, from its console and from exceptions.
    """

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out, self._buffer, self._number = into, out, b"", 0
        self.session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def wait_for(self, event: str) -> None:
        while self._next().get("method") != event:
            pass

    def value(self, expression: str) -> Any:
        """What a line of JavaScript comes to on the page."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str) -> None:
        code = _CODES[key]
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self, width: int, height: int) -> bytes:
        """A PNG of the page's top in a window of that size."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + 120
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, "the browser does not answer"
            some = os.read(self._out, 1 << 20)
            assert some, "the browser is gone"
            self._buffer += some
        message, _, self._buffer = self._buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        method, told = found.get("method"), found.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert", "warning"):
            self.errors.append(str(told["args"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.errors.append(str(told["entry"]))
        return found


@contextmanager
def opened(page: Path, profile: Path) -> Iterator[Page]:
    """A file in a browser that has no network."""
    assert CHROMIUM is not None
    from_us, to_browser = os.pipe()
    from_browser, to_us = os.pipe()

    def pipes() -> None:
        # The browser reads from 3 and writes to 4. Copies first: either may be one of these.
        read, write = os.dup(from_us), os.dup(to_us)
        os.dup2(read, 3)
        os.dup2(write, 4)

    process = subprocess.Popen(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
         "--remote-debugging-pipe", f"--user-data-dir={profile}"],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, close_fds=False, preexec_fn=pipes,
    )  # fmt: skip
    os.close(from_us)
    os.close(to_us)
    try:
        found = Page(to_browser, from_browser)
        target = found.call("Target.createTarget", url="about:blank")["targetId"]
        found.session = found.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            found.call(f"{domain}.enable")
        found.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0,
            uploadThroughput=0,
        )  # fmt: skip
        found.call("Page.navigate", url=page.resolve().as_uri())
        found.wait_for("Page.loadEventFired")
        yield found
    finally:
        os.close(to_browser)
        os.close(from_browser)
        process.kill()
        process.wait()
